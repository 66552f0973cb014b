"""What both clients share: the served model's facts, one request's tensors, one answer's hits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput, InferResult

from hsnn_core.errors import RequestError, ServerError
from hsnn_core.schema import Schema, check_same

from .encode import DTYPES, Context, Excluded, ExcludedItems, UserEncoder, WireUsers, context_tensors
from .tracing import Trace

MODEL = "hsnn_retrieve"
OUTPUTS = ("item_ids", "probabilities", "rank_score", "valid")


class Hit(NamedTuple):  # of all frozen types the quickest to make, a thousand per answer
    """One retrieved item: its id, the probability of every task, and the score it was ranked by."""

    item_id: int
    scores: dict[str, float]
    rank_score: float


@dataclass(frozen=True)
class Timings:
    """Microseconds inside the server: the user tower, each layer 1..N, and the whole request."""

    user_tower: int
    layers: tuple[int, ...]
    total: int


class Results(list[list[Hit]]):
    """One list of hits per user, best first.

    ``version``: the snapshot that answered; ``timings``: None unless asked for.
    """

    def __init__(self, hits: list[list[Hit]], version: str, timings: Timings | None) -> None:
        super().__init__(hits)
        self.version = version
        self.timings = timings


@dataclass(frozen=True)
class ServedModel:
    """What the model's configuration says: its schema and the defaults of a request. `canary_share`,
    `canary_shadow`: what clients shall give a canary (`clients.canary`); 0 for the stable model."""

    name: str
    schema: Schema
    k: int
    widths: tuple[int, ...]
    max_users: int
    mode: str
    canary_share: float = 0.0
    canary_shadow: bool = False


def served_model(config: Any, expected: Schema | None) -> ServedModel:
    """``config``: the ModelConfig protobuf. SchemaMismatch when ``expected`` is given and differs."""
    facts = {key: value.string_value for key, value in config.parameters.items()}
    missing = [key for key in ("schema", "k", "widths") if key not in facts]
    if missing:
        raise ServerError(
            f"the configuration of {config.name} lacks the parameters {missing}, got {sorted(facts)}; "
            "this is not an HSNN orchestrator, or it was published by another version of HSNN"
        )
    schema = Schema.from_json(facts["schema"])
    if expected is not None:
        check_same(expected, schema)
    return ServedModel(
        name=config.name,
        schema=schema,
        k=int(facts["k"]),
        widths=tuple(int(width) for width in facts["widths"].split(",") if width),
        max_users=config.max_batch_size,
        mode=facts.get("mode", ""),
        canary_share=float(facts.get("canary_share", 0)),
        canary_shadow=facts.get("canary_shadow") == "true",
    )


@dataclass(frozen=True)
class Question:
    """What a request asks beside its users; see `RetrievalClient.retrieve`."""

    k: int | None = None
    widths: Sequence[int] | None = None
    timings: bool = False
    context: Context | None = None
    exclude_items: ExcludedItems | None = None
    exclude: Excluded | None = None
    rank_by: str | None = None
    tasks: Sequence[str] | None = None
    after: int | None = None
    trace: Trace | None = None


class Codec:
    """Requests and answers of one served model."""

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self._encoder = UserEncoder(model.schema)
        self._tasks = [task.name for task in model.schema.tasks]
        self._datatypes = {numpy: wire for wire, numpy in DTYPES.items()}

    def request(self, users: Sequence[Mapping[str, Any]] | WireUsers, question: Question) -> dict[str, Any]:
        """The arguments of tritonclient's ``infer``, but for the times."""
        tensors = self._encoder.encode(users)
        count = len(next(iter(tensors.values())))
        if count > self.model.max_users:
            raise RequestError(
                f"users: got {count}, expected at most {self.model.max_users} in one request; split the list"
            )
        tensors |= context_tensors(
            self.model.schema, count, question.context, question.exclude_items, question.exclude
        )
        inputs = []
        for name, values in tensors.items():
            tensor = InferInput(name, list(values.shape), self._datatypes[values.dtype.type])
            tensor.set_data_from_numpy(values)
            inputs.append(tensor)
        names = (*OUTPUTS, "stage_us") if question.timings else OUTPUTS
        return {
            "model_name": self.model.name,
            "inputs": inputs,
            "outputs": [InferRequestedOutput(name) for name in names],
            "parameters": self._parameters(question),
            "headers": {} if question.trace is None else question.trace.headers,
        }

    def _parameters(self, question: Question) -> dict[str, Any]:
        k, widths = question.k, question.widths
        parameters: dict[str, Any] = {"schema_hash": self.model.schema.hash}
        if k is not None:
            parameters["k"] = _whole("k", k)
        if widths is not None:
            if len(widths) != len(self.model.widths):
                raise RequestError(
                    f"widths: got {list(widths)}, expected {len(self.model.widths)} numbers, one for each "
                    f"layer but the last (the default is {list(self.model.widths)})"
                )
            parameters["widths"] = ",".join(str(_whole("widths", width)) for width in widths)
        if question.tasks is not None:
            parameters["tasks"] = self._chosen_tasks(question.tasks)
        if question.after:
            parameters["after"] = _whole("after", question.after)
        if question.rank_by is not None:
            parameters["rank_by"] = self._rank_by(question.rank_by)
        return parameters

    def _chosen_tasks(self, tasks: Sequence[str]) -> str:
        if isinstance(tasks, str) or not tasks or not set(tasks) <= set(self._tasks):
            raise RequestError(f"tasks: got {tasks!r}, expected a list with one or more of {self._tasks}")
        return ",".join(dict.fromkeys(tasks))

    def _rank_by(self, rank_by: str) -> str:
        known = ["probability", *(["bid"] if self.model.schema.bid is not None else [])]
        if rank_by not in known:
            hint = "" if "bid" in known else " (the schema declares no bid)"
            raise RequestError(f"rank_by: got {rank_by!r}, expected one of {known}{hint}")
        return rank_by

    def answer(self, result: InferResult) -> Results:
        """item_ids (B, K), probabilities (B, K, T), rank_score (B, K), valid (B, 1) -> hits per user."""
        item_ids, probabilities, rank_score, valid = (result.as_numpy(name) for name in OUTPUTS)
        hits = []
        for row, count in enumerate(valid[:, 0].tolist()):
            scores = probabilities[row, :count].tolist()
            hits.append(
                [
                    Hit(item_id, dict(zip(self._tasks, task_scores)), score)
                    for item_id, task_scores, score in zip(
                        item_ids[row, :count].tolist(), scores, rank_score[row, :count].tolist()
                    )
                ]
            )
        stages = result.as_numpy("stage_us")
        return Results(hits, result.get_response().model_version, _timings(stages))


def _timings(stages: np.ndarray | None) -> Timings | None:
    if stages is None:
        return None
    user_tower, *layers, total = stages[0].tolist()  # every user of a request shares its stages
    return Timings(user_tower, tuple(layers), total)


def _whole(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise RequestError(f"{name}: got {value!r}, expected a whole number >= 1")
    return int(value)
