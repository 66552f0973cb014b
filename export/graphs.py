"""The serving graphs of a trained HSNN: user tower, item tower, one scorer per layer.

Each is a thin module around one method of the model with the tensor names that ONNX files, Triton
configurations and `hsnn_core.scorer.Runner` share. B is the batch (users, or items for the item tower), C
the candidates of a layer. Everything that depends on the user alone is in the user tower, which runs once
per request (paper, Algorithm 2); a scorer sees its result as one packed tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from export.column_scorer import ColumnScorer, has_column_form
from hsnn_train.hsnn import HSNN

Datatype = Literal["FP32", "FP16", "INT32"]
DTYPES: dict[str, type[np.generic]] = {"FP32": np.float32, "FP16": np.float16, "INT32": np.int32}
# How a snapshot may store what its scorers know of nodes and items; they compute in float32 either way.
EMBEDDINGS: dict[str, Datatype] = {"float32": "FP32", "float16": "FP16"}
MODEL_PREFIX = "hsnn_"


class ServingModel(Protocol):
    """What a model offers to be exported; `hsnn_train.hsnn.HSNN` does."""

    layers: int
    tasks: int
    user_dense_width: int
    user_ids_width: int
    item_dense_width: int
    item_ids_width: int
    cross_dense_width: int
    cross_ids_width: int

    @property
    def user_widths(self) -> list[int]: ...

    @property
    def item_widths(self) -> list[int]: ...

    def user_tower(self, dense: Tensor | None, ids: Tensor | None, /) -> tuple[Tensor, ...]: ...

    def item_tower(self, dense: Tensor | None, ids: Tensor | None, /) -> tuple[Tensor, ...]: ...

    def score(
        self,
        layer: int,
        user: Tensor,
        item: Tensor,
        cross_dense: Tensor | None,
        cross_ids: Tensor | None,
        previous: Tensor | None,
        /,
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a serving graph. `dims` are integers, "B" (first, always) or "C"; -1 stands for a width
    that only a run of the graph tells."""

    name: str
    datatype: Datatype
    dims: tuple[int | str, ...]

    def shape(self, batch: int, candidates: int = 1) -> tuple[int, ...]:
        """The dims with numbers for B and C."""
        letters = {"B": batch, "C": candidates}
        return tuple(letters[dim] if isinstance(dim, str) else dim for dim in self.dims)

    def __str__(self) -> str:
        return f"{self.name} {self.datatype} [{', '.join(str(dim) for dim in self.dims)}]"


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of the serving graph `stem` ("user_tower", "item_tower", "scorer_l1", ...)."""

    stem: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def model_name(self) -> str:
        """Name of the Triton model that serves this graph."""
        return MODEL_PREFIX + self.stem

    @property
    def has_candidates(self) -> bool:
        """Whether any input has the candidate axis C (the scorers)."""
        return any("C" in spec.dims for spec in self.inputs)


class ServingGraph(nn.Module):
    """Base of the wrappers: `forward` takes the present inputs in the order of `signature.inputs`."""

    def __init__(self, model: ServingModel, signature: Signature) -> None:
        super().__init__()
        self.model = model
        self.signature = signature

    def named(self, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The inputs by name; those the schema does not have are missing."""
        return {spec.name: tensor for spec, tensor in zip(self.signature.inputs, tensors, strict=True)}

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run in torch on named arrays; the reference of the parity gates."""
        tensors = [
            torch.from_numpy(np.require(inputs[spec.name], requirements=["C", "W"]))
            for spec in self.signature.inputs
        ]
        with torch.inference_mode():
            outputs = self.reference(tensors)
        return {spec.name: out.numpy() for spec, out in zip(self.signature.outputs, outputs, strict=True)}

    def reference(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """What the graph has to compute: what it does, unless it is another form of the model's computation."""
        outputs: tuple[Tensor, ...] = self(*tensors)
        return outputs


class UserTowerGraph(ServingGraph):
    """user_dense (B, Du), user_ids (B, Su) -> user_l1 (B, U_1) .. user_lN (B, U_N)."""

    def __init__(self, model: ServingModel) -> None:
        outputs = tuple(
            TensorSpec(f"user_l{n}", "FP32", ("B", w)) for n, w in enumerate(model.user_widths, 1)
        )
        inputs = _features("user", model.user_dense_width, model.user_ids_width)
        super().__init__(model, Signature("user_tower", inputs, outputs))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = self.named(tensors)
        return tuple(self.model.user_tower(given.get("user_dense"), given.get("user_ids")))


class ItemTowerGraph(ServingGraph):
    """item_dense (B, Di), item_ids (B, Si) -> item_l1 (B, E_1) .. item_lN (B, E_N), index (B, d_index):
    the vector that Learning-To-Index assigns to nodes (paper §3.2, v in Algorithm 1). B counts items."""

    def __init__(self, model: ServingModel) -> None:
        outputs = tuple(
            TensorSpec(f"item_l{n}", "FP32", ("B", w)) for n, w in enumerate(model.item_widths, 1)
        )
        inputs = _features("item", model.item_dense_width, model.item_ids_width)
        super().__init__(
            model, Signature("item_tower", inputs, (*outputs, TensorSpec("index", "FP32", ("B", -1))))
        )

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = self.named(tensors)
        return tuple(self.model.item_tower(given.get("item_dense"), given.get("item_ids")))


class ScorerGraph(ServingGraph):
    """Layer l of Algorithm 2: user (B, U_l), item (B, C, E_l), cross_dense (B, C, 3P), cross_ids (B, C, M),
    previous (B, C, (l-1)T) -> monn (B, C, T), logits (B, C, T), the latter after the linear ensemble. ``item``: the
    datatype of that input."""

    def __init__(self, model: ServingModel, layer: int, item: Datatype = "FP32") -> None:
        inputs = [
            TensorSpec("user", "FP32", ("B", model.user_widths[layer - 1])),
            TensorSpec("item", item, ("B", "C", model.item_widths[layer - 1])),
        ]
        if model.cross_dense_width:
            inputs.append(TensorSpec("cross_dense", "FP32", ("B", "C", model.cross_dense_width)))
        if model.cross_ids_width:
            inputs.append(TensorSpec("cross_ids", "INT32", ("B", "C", model.cross_ids_width)))
        if layer > 1:
            inputs.append(TensorSpec("previous", "FP32", ("B", "C", (layer - 1) * model.tasks)))
        outputs = tuple(TensorSpec(name, "FP32", ("B", "C", model.tasks)) for name in ("monn", "logits"))
        super().__init__(model, Signature(f"scorer_l{layer}", tuple(inputs), outputs))
        self.layer = layer

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return self.score(self.named(tensors))

    def score(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The model's own scores of the named inputs."""
        return self.model.score(
            self.layer,
            given["user"],
            given["item"].float(),
            given.get("cross_dense"),
            given.get("cross_ids"),
            given.get("previous"),
        )


class ColumnScorerGraph(ScorerGraph):
    """`ScorerGraph` as `ColumnScorer` evaluates it. `run`, the reference of the parity gates, stays the model's own."""

    def __init__(self, model: HSNN, layer: int, item: Datatype = "FP32") -> None:
        super().__init__(model, layer, item)
        self.columns = ColumnScorer(model, layer)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = self.named(tensors)
        found: tuple[Tensor, Tensor] = self.columns(
            given["user"],
            given["item"].float(),
            given.get("cross_dense"),
            given.get("cross_ids"),
            given.get("previous"),
        )
        return found

    def reference(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return self.score(self.named(tuple(tensors)))


class AnchoredGraph(ServingGraph):
    """A graph whose `unused` inputs are tied to its last output with weight 0.

    A model may ignore an input that its schema has (a two-tower takes no interaction features), but the
    search sends it, and engines drop what no node reads."""

    def __init__(self, graph: ServingGraph, unused: tuple[str, ...]) -> None:
        super().__init__(graph.model, graph.signature)
        self.graph = graph
        self.unused = unused

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        *outputs, last = self.graph(*tensors)
        given = self.named(tensors)
        for name in self.unused:
            last = last + 0.0 * given[name].to(last.dtype).sum(-1, keepdim=True)
        return (*outputs, last)


def scorer_graph(model: ServingModel, layer: int, item: Datatype = "FP32") -> ScorerGraph:
    """The graph of ``layer`` (from 1), in the form that is quickest to run."""
    if isinstance(model, HSNN) and has_column_form(model, layer):
        return ColumnScorerGraph(model, layer, item)
    return ScorerGraph(model, layer, item)


def serving_graphs(model: ServingModel, item: Datatype = "FP32") -> list[ServingGraph]:
    """Every graph of a model, in the order in which they are published: towers, then scorers 1..N. ``item``: how these
    are given embeddings."""
    scorers = [scorer_graph(model, layer, item) for layer in range(1, model.layers + 1)]
    graphs: list[ServingGraph] = [UserTowerGraph(model), ItemTowerGraph(model), *scorers]
    return [graph.eval() for graph in graphs]


def example_inputs(
    signature: Signature,
    batch: int,
    candidates: int,
    rng: np.random.Generator,
    id_limits: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Random inputs for a graph. Ids are drawn below `id_limits[name]` (one cardinality per column);
    without limits they are 0 (padding) and 1 (unknown), which every id space has."""
    inputs: dict[str, np.ndarray] = {}
    for spec in signature.inputs:
        shape = spec.shape(batch, candidates)
        if spec.datatype == "INT32":
            limit = 2 if id_limits is None else id_limits[spec.name]
            inputs[spec.name] = rng.integers(0, limit, shape, dtype=np.int32)
        else:
            inputs[spec.name] = rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[spec.datatype])
    return inputs


def _features(owner: str, dense_width: int, ids_width: int) -> tuple[TensorSpec, ...]:
    specs: list[TensorSpec] = []
    if dense_width:
        specs.append(TensorSpec(f"{owner}_dense", "FP32", ("B", dense_width)))
    if ids_width:
        specs.append(TensorSpec(f"{owner}_ids", "INT32", ("B", ids_width)))
    return tuple(specs)
