"""config.pbtxt of every model of a repository, from the schema, the snapshot's manifest and the graphs'
signatures.

Configurations are built as protobuf messages, printed, parsed back and compared. They say nothing about a
single snapshot's contents: all versions of a model share one file, so tensor shapes and the schema are
fixed for the life of a repository generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from export.engines import Engine
from export.graphs import Signature, TensorSpec
from export.onnx_files import MAX_BATCH
from hsnn_core.errors import PublishError
from hsnn_core.schema import Schema, first_difference
from hsnn_core.scorer import PAIRS_PER_CALL

ORCHESTRATOR = "hsnn_retrieve"
INDEX = "hsnn_index"
CONFIG_FILE = "config.pbtxt"
_TYPES = {
    "FP32": "TYPE_FP32",
    "FP16": "TYPE_FP16",
    "FP64": "TYPE_FP64",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
    "BYTES": "TYPE_STRING",
}
DEFAULT_ITEM_LOG = ".items/log.db"


@dataclass(frozen=True)
class ServingOptions:
    """What an operator sets per repository.

    `mode`: networks through Triton ("bls") or ONNX Runtime inside the orchestrator ("in_process"). `k`,
    `widths`: the defaults of a request, None: the snapshot's. `workers`: requests that run at once;
    `queue`: requests that may wait. `keep`: snapshots served at once. `instances`: of each tower and
    scorer. `batch_delay_us`: dynamic batching of towers and scorers with this longest wait, None: off. `item_log`: the
    file of the item updates, on a local disk; relative to the repository or absolute."""

    mode: Literal["bls", "in_process"] = "bls"
    k: int | None = None
    widths: tuple[int, ...] | None = None
    workers: int = 4
    queue: int = 64
    keep: int = 1
    instances: int = 1
    batch_delay_us: int | None = None
    item_log: str = DEFAULT_ITEM_LOG

    def __post_init__(self) -> None:
        if self.mode not in ("bls", "in_process"):
            raise PublishError(f"option mode is {self.mode!r}, expected bls or in_process")
        for name in ("workers", "queue", "keep", "instances"):
            if getattr(self, name) < 1:
                raise PublishError(f"option {name} is {getattr(self, name)}, expected at least 1")
        if self.k is not None and self.k < 1:
            raise PublishError(f"option k is {self.k}, expected at least 1")
        if not self.item_log.strip():
            raise PublishError("option item_log is empty, expected the path of a file")
        if ".." in PurePath(self.item_log).parts or "\0" in self.item_log:
            raise PublishError(
                f"option item_log is {self.item_log!r}, expected a path below the repository or an absolute one, "
                "without .."
            )


def orchestrator_config(
    schema: Schema, layers: int, k: int, widths: Sequence[int], options: ServingOptions
) -> pb.ModelConfig:
    """Configuration of `hsnn_retrieve`: one tensor per user feature and, optionally, the request's context in, the best
    K items out (N = `layers`, T tasks).

    `k`, `widths`: the snapshot's defaults, used where `options` leaves them open."""
    widths = tuple(widths) if options.widths is None else options.widths
    if len(widths) != layers - 1:
        raise PublishError(
            f"option widths has {len(widths)} numbers {list(widths)}, expected {layers - 1}: one per "
            "layer above the items"
        )
    tasks = len(schema.tasks)
    config = _config(ORCHESTRATOR, "python", options.keep)
    for wire in schema.user_wire():
        config.input.add(name=wire.name, data_type=_type(wire.datatype), dims=wire.shape)
    for wire in schema.context_wire():
        # Ragged, or requests that exclude different numbers of items would not be handed over together.
        config.input.add(
            name=wire.name,
            data_type=_type(wire.datatype),
            dims=wire.shape,
            optional=True,
            allow_ragged_batch=True,
        )
    outputs = (
        ("item_ids", "INT64", (-1,)),
        ("probabilities", "FP32", (-1, tasks)),
        ("rank_score", "FP32", (-1,)),
        ("valid", "INT32", (1,)),
        ("stage_us", "INT64", (layers + 2,)),
    )
    for name, datatype, dims in outputs:
        config.output.add(name=name, data_type=_type(datatype), dims=dims)
    # One instance: one live index, and the worker pool overlaps requests.
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    # No delay and no queue policy: only, what has arrived is handed over together. One by one, `execute` is the
    # bottleneck of refusing at overload, and requests would wait in front of it, out of admission's sight.
    config.dynamic_batching.SetInParent()
    parameters = {
        "schema": schema.to_json(),
        "schema_hash": schema.hash,
        "mode": options.mode,
        "k": str(options.k or k),
        "widths": ",".join(map(str, widths)),
        "workers": str(options.workers),
        "queue": str(options.queue),
        "item_log": options.item_log,
    }
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    return config


def index_config(schema: Schema, options: ServingOptions) -> pb.ModelConfig:
    """Configuration of `hsnn_index`: n updates in, each one JSON; status and message of each out, and the log's
    position. It has as many versions as the networks, so that updates are taken all through a rollout."""
    config = _config(INDEX, "python", options.keep + 1)
    config.max_batch_size = 0  # a call is a batch already
    config.input.add(name="updates", data_type=_type("BYTES"), dims=[-1])
    outputs = (
        ("status", "INT32", -1),
        ("message", "BYTES", -1),
        ("position", "INT64", 1),
        ("stats", "BYTES", 1),
    )
    for name, datatype, length in outputs:
        config.output.add(name=name, data_type=_type(datatype), dims=[length])
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    parameters = {"schema": schema.to_json(), "schema_hash": schema.hash, "item_log": options.item_log}
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    return config


def network_config(
    signature: Signature, engine: Engine, buckets: Sequence[int], options: ServingOptions
) -> pb.ModelConfig:
    """Configuration of a tower or scorer: the graph's tensors without the batch axis; the candidate axis is
    -1.

    One more version than the orchestrator keeps: a request that began on the old snapshot still finds its
    networks while the new one takes over."""
    config = _config(signature.model_name, engine.backend, options.keep + 1)
    for spec in signature.inputs:
        config.input.add(name=spec.name, data_type=_type(spec.datatype), dims=_dims(signature, spec))
    for spec in signature.outputs:
        config.output.add(name=spec.name, data_type=_type(spec.datatype), dims=_dims(signature, spec))
    group = config.instance_group.add(count=options.instances)
    group.kind = pb.ModelInstanceGroup.Kind.Value(engine.kind)
    if engine.library is not None:
        group.profile.extend(str(i) for i in range(len(set(buckets)) or 1))
    if options.batch_delay_us is not None:
        config.dynamic_batching.max_queue_delay_microseconds = options.batch_delay_us
    config.parameters["engine"].string_value = engine.name
    if signature.has_candidates and engine.library is None:
        config.parameters["pairs_per_call"].string_value = str(PAIRS_PER_CALL)
    for candidates in sorted(set(buckets)) or [1]:
        name = f"candidates_{candidates}" if signature.has_candidates else "one"
        warmup = config.model_warmup.add(name=name, batch_size=1)
        for spec in signature.inputs:
            tensor = warmup.inputs[spec.name]
            tensor.data_type = _type(spec.datatype)
            tensor.dims.extend(spec.shape(1, candidates)[1:])
            tensor.zero_data = True
    return config


def options_of(orchestrator: pb.ModelConfig, network: pb.ModelConfig) -> ServingOptions:
    """The options that wrote two configurations of a repository; `k` and `widths` are left to the
    snapshot."""
    parameters = orchestrator.parameters
    batching = network.HasField("dynamic_batching")
    return ServingOptions(
        mode="in_process" if parameters["mode"].string_value == "in_process" else "bls",
        workers=int(parameters["workers"].string_value),
        queue=int(parameters["queue"].string_value),
        keep=orchestrator.version_policy.latest.num_versions,
        instances=network.instance_group[0].count,
        batch_delay_us=network.dynamic_batching.max_queue_delay_microseconds if batching else None,
        item_log=parameters["item_log"].string_value or DEFAULT_ITEM_LOG,
    )


def renamed(config: pb.ModelConfig, name: str) -> pb.ModelConfig:
    """The same configuration under another model's name."""
    copy = pb.ModelConfig()
    copy.CopyFrom(config)
    copy.name = name
    return copy


def to_text(config: pb.ModelConfig) -> str:
    """The file's text, the same for the same configuration; it parses back to `config`."""
    text = text_format.MessageToString(config)
    again = parse(text, config.name)
    if again != config:
        raise PublishError(f"model {config.name}: the printed configuration does not parse back to itself")
    check(again)
    return text


def parse(text: str, where: str) -> pb.ModelConfig:
    """Read a config.pbtxt; PublishError with `where` and the parser's line when it is none."""
    try:
        return text_format.Parse(text, pb.ModelConfig())
    except text_format.ParseError as error:
        raise PublishError(f"{where}: not a Triton model configuration: {error}") from error


def check(config: pb.ModelConfig) -> None:
    """Refuse (PublishError) what Triton would refuse or silently skip."""
    problems = []
    names = [tensor.name for tensor in (*config.input, *config.output)]
    if not config.name or not config.backend:
        problems.append("name and backend must be set")
    if not config.input or not config.output:
        problems.append("needs inputs and outputs")
    if len(set(names)) != len(names):
        problems.append(f"tensor names repeat: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
    for tensor in (*config.input, *config.output):
        if tensor.data_type == pb.DataType.TYPE_INVALID:
            problems.append(f"tensor {tensor.name} has no datatype")
        if not tensor.dims or any(dim == 0 or dim < -1 for dim in tensor.dims):
            problems.append(f"tensor {tensor.name} has dims {list(tensor.dims)}, expected -1 or positive")
    if not config.instance_group or any(group.count < 1 for group in config.instance_group):
        problems.append("instance counts must be explicit and at least 1")
    if any(warmup.batch_size < 1 for warmup in config.model_warmup):
        problems.append("model_warmup needs batch_size of at least 1: Triton skips 0 silently")
    if problems:
        raise PublishError(f"model {config.name}: {'; '.join(problems)}")


def check_compatible(old: pb.ModelConfig, new: pb.ModelConfig) -> None:
    """Refuse a configuration that the versions already published could not be served under.

    Tensors, batch size, backend and schema belong to a repository generation. PublishError names the first
    difference."""
    difference = _difference(old, new)
    if difference:
        raise PublishError(
            f"model {new.name}: {difference}; versions already published would no longer load. Publish "
            "into a new, empty repository (a new generation) and move the traffic there"
        )


def _difference(old: pb.ModelConfig, new: pb.ModelConfig) -> str | None:
    for field in ("backend", "max_batch_size"):
        if getattr(old, field) != getattr(new, field):
            return f"{field} {getattr(old, field)} would become {getattr(new, field)}"
    for kind in ("input", "output"):
        ours, theirs = (_tensors(getattr(config, kind)) for config in (old, new))
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            if ours.get(name) != theirs.get(name):
                was, becomes = (side.get(name, "absent") for side in (ours, theirs))
                return f"{kind} {name}: {was} would become {becomes}"
    if old.instance_group and old.instance_group[0].profile:
        # A plan holds the profiles it was built with, and every version is opened with the same list.
        built, wanted = ([warmup.name for warmup in config.model_warmup] for config in (old, new))
        if built != wanted:
            return f"optimisation profiles {built} would become {wanted}"
    hashes = [
        config.parameters["schema_hash"].string_value if "schema_hash" in config.parameters else ""
        for config in (old, new)
    ]
    if hashes[0] != hashes[1]:
        return f"schema {hashes[0]} would become {hashes[1]}{_schema_difference(old, new)}"
    return None


def _schema_difference(old: pb.ModelConfig, new: pb.ModelConfig) -> str:
    ours, theirs = (Schema.from_json(config.parameters["schema"].string_value) for config in (old, new))
    return f" ({first_difference(ours, theirs)})"


def _config(name: str, backend: str, versions: int) -> pb.ModelConfig:
    config = pb.ModelConfig(name=name, backend=backend, max_batch_size=MAX_BATCH)
    config.version_policy.latest.num_versions = versions
    return config


def _type(datatype: str) -> Any:
    return pb.DataType.Value(_TYPES[datatype])


def _dims(signature: Signature, spec: TensorSpec) -> list[int]:
    if spec.dims[0] != "B":
        raise PublishError(f"graph {signature.stem}: {spec}, expected the batch B as first axis")
    return [-1 if isinstance(dim, str) else dim for dim in spec.dims[1:]]


def _tensors(tensors: Any) -> dict[str, str]:
    return {
        tensor.name: f"{pb.DataType.Name(tensor.data_type)[5:]} {list(tensor.dims)}" for tensor in tensors
    }
