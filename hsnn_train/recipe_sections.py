"""The sections of a recipe that hold settings, `model`, `train` and `search`, and what is asked of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from hsnn_core.errors import SchemaError
from hsnn_core.schema import Schema

from .hsnn import IndexConfig
from .presets import MoNNConfig, preset

INDEX_METHODS = ("joint", "kmeans", "em", "hierarchy")
CANDIDATES = ("all", "new", "seen_before")
ORDERS = ("labels", "requests")


@dataclass(frozen=True)
class ModelConfig:
    """layers: a preset name per layer, coarse to fine; codebooks: K_l per index layer; columns: for method
    "hierarchy", the item table's columns from coarse to fine; pool: batches the balance loss pools; dropout: of
    histories; id_dropout: share of item ids that training replaces by the unknown id; min_positives: items with fewer
    training positives share the unknown id's embedding, and add none of their own where they are matched."""

    layers: tuple[str, ...] = ("cpu_l", "cpu_m", "cpu_s")
    index: str = "joint"
    codebooks: tuple[int, ...] = (32, 16)
    columns: tuple[str, ...] = ()
    pool: int = 8
    dropout: float = 0.0
    id_dropout: float = 0.0
    min_positives: int = 1

    def monns(self) -> list[MoNNConfig]:
        return [preset(name) for name in self.layers]

    def index_config(self) -> IndexConfig:
        return IndexConfig(self.index, self.codebooks, self.columns, self.pool)


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Weights multiply losses; fractions are of all steps.

    Attributes:
        pool: items that the two towers' sampled softmax runs over, for logs of positives (of `Schema.drawn_task`);
            0: no such loss.
        temperature: of the two towers' softmax over the pool; it is not learnt.
        softmax: weight of the sampled softmax losses beside the cross-entropy, where there is a pool.
        negatives: sampled negatives per impression, label 0 in tasks that are given no other (for logs of positives).
        hard: how many of them are drawn from what the two towers put first, where there is a pool.
        listed: how many of them are drawn from ``listed_from``, a user feature that lists items, where there is a pool:
            what stood before the user beside what was chosen, not what the user chose before. They join the pool.
        unlabelled: sampled unlabelled pairs per impression that only the distillation loss sees (Eq. 2).
        negative_power: sampled items follow popularity ** power; 0 is uniform. Evaluation's are uniform.
        teacher: run directory of a stronger model for the soft labels, as seen from where the command runs;
            none: this model's own last layer.
        refresh_steps: steps between two refreshes of hard paths and representatives.
        towers_first: whether only the item layer's two towers are trained before init_at; with a pool they always are.
        towers_lr: learning rate of that first phase; 0: lr.
        held: share of the users that the first phase leaves out, and whose impressions alone all that comes after is
            trained on: two towers memorise the positives of the users they are trained on, and an OverArch on top would
            learn to believe them. An epoch is a number of steps: the first phase passes epochs · init_at / (1 − held)
            times over its users, the second epochs · (1 − init_at) / held times over its. 0: both see all, as does a
            model whose item layer has no OverArch; `hsnn follow` holds nobody.
        init_at: fraction of steps after which the codebooks get their final k-means initialisation and the
            index losses begin.
        trunk_lr: learning rate of the trunk after that, as a share of the rest's, where the towers came first.
        warmup: fraction, of the steps after init_at, over which the index losses' weight grows linearly; 0 switches
            the warm-up off.
        max_alpha, alpha_exponent, alpha_until: Eq. 8, over that fraction of the steps after init_at; exponent 0
            switches the schedule off.
        commitment: weight of the pull of item vectors towards their codewords, so that what is indexed clusters;
            of method "joint".
        node_distil: weight with which node layers learn what the item layer's towers think of the pool, where there is
            one; heat: by how much both sides are softened for it.
        balance: weight of the FLOPs regulariser; 0 switches it off.
        em_rounds: k-means rounds of method "em".
        order: what the item layer's ensemble is fitted to once all is trained: "labels", or "requests", which want
            their items first among the best (`item_order`); the latter for logs of positives alone, at a price in NE.
    """

    epochs: int = 2
    max_steps: int = 0
    batch_size: int = 512
    lr: float = 0.002
    towers_lr: float = 0.0
    held: float = 0.0
    weight_decay: float = 0.0
    seed: int = 1
    pool: int = 0
    softmax: float = 1.0
    temperature: float = 0.07
    negatives: int = 0
    hard: int = 0
    listed: int = 0
    listed_from: str = ""
    unlabelled: int = 1
    negative_power: float = 0.75
    distil: float = 0.1
    teacher: str = ""
    refresh_steps: int = 200
    towers_first: bool = False
    init_at: float = 0.15
    trunk_lr: float = 0.2
    warmup: float = 0.1
    max_alpha: float = 20.0
    alpha_exponent: float = 1.0
    alpha_until: float = 0.8
    index_loss: float = 0.5
    reconstruction: float = 0.5
    commitment: float = 0.0
    node_distil: float = 0.1
    heat: float = 1.0
    balance: float = 0.2
    interaction_pull: float = 0.1
    em_rounds: int = 3
    order: str = "labels"
    checkpoint_steps: int = 500

    @property
    def two_phases(self) -> bool:
        """Whether the item layer's two towers are trained alone before everything is."""
        return self.towers_first or self.pool > 0

    @property
    def first_lr(self) -> float:
        """Learning rate of the first of two phases."""
        return self.towers_lr or self.lr


@dataclass(frozen=True)
class SearchConfig:
    """widths: nodes kept after each layer above the items (the beam); k: items returned by default; max_k: the
    most a request may ask for; requests: evaluation requests for recall; candidates: which items evaluation
    searches among: "all", "new" (not the request's own history) or "seen_before" (items that had appeared
    in the log before the request)."""

    widths: tuple[int, ...] = (8, 64)
    k: int = 100
    max_k: int = 1000
    requests: int = 1000
    candidates: str = "all"

    @property
    def growing(self) -> bool:
        """Whether the catalogue grows: only what had appeared before a request is a candidate."""
        return self.candidates == "seen_before"

    @property
    def fresh(self) -> bool:
        """Whether what a user has had is no candidate."""
        return self.candidates == "new"


S = TypeVar("S", ModelConfig, TrainConfig, SearchConfig)


def read_section(kind: type[S], raw: Any, path: str) -> S:
    """A section as its dataclass; SchemaError names the dotted path, what was got and what is known."""
    if raw is None:
        return kind()
    if not isinstance(raw, Mapping):
        raise SchemaError(f"{path}: got {type(raw).__name__}, expected a mapping")
    known = {f.name: f for f in fields(kind)}
    values: dict[str, Any] = {}
    defaults = kind()
    for key, value in raw.items():
        if key not in known:
            raise SchemaError(f"{path}.{key}: unknown key; known keys: {', '.join(known)}")
        default = getattr(defaults, key)
        if isinstance(default, tuple):
            if not isinstance(value, list | tuple):
                raise SchemaError(f"{path}.{key}: got {value!r}, expected a list")
            values[key] = tuple(value)
        elif isinstance(default, bool):
            if not isinstance(value, bool):
                raise SchemaError(f"{path}.{key}: got {value!r}, expected true or false")
            values[key] = value
        elif isinstance(default, float):
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise SchemaError(f"{path}.{key}: got {value!r}, expected a number")
            try:
                values[key] = float(value)  # YAML reads 1e-3, without a dot, as text
            except ValueError:
                raise SchemaError(f"{path}.{key}: got {value!r}, expected a number") from None
        elif not isinstance(value, type(default)) or isinstance(value, bool):
            raise SchemaError(f"{path}.{key}: got {value!r}, expected {type(default).__name__}")
        else:
            values[key] = value
    return kind(**values)


def check_ranges(model: ModelConfig, train: TrainConfig, search: SearchConfig) -> None:
    """SchemaError for numbers that could only fail later, in the middle of a run."""
    sections = {"model": model, "train": train, "search": search}
    smallest = {
        1: ("model.pool", "model.min_positives",
            "model.codebooks", "train.epochs", "train.batch_size", "train.refresh_steps",
            "train.checkpoint_steps", "train.em_rounds", "search.widths", "search.k", "search.max_k",
            "search.requests"),
        0: ("train.max_steps", "train.seed", "train.negatives", "train.unlabelled", "train.pool", "train.hard",
            "train.listed"),
    }  # fmt: skip
    for least, paths in smallest.items():
        for path in paths:
            section, key = path.split(".")
            value = getattr(sections[section], key)
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, int) or isinstance(number, bool) or number < least:
                    raise SchemaError(f"{path}: got {number!r}, expected a whole number of at least {least}")
    for key in ("init_at", "warmup", "alpha_until"):
        share = getattr(train, key)
        if not 0 <= share <= 1:
            raise SchemaError(f"train.{key}: got {share!r}, expected a fraction of the steps, 0 to 1")
    for key in (
        "distil",
        "interaction_pull",
        "index_loss",
        "reconstruction",
        "balance",
        "commitment",
        "node_distil",
        "trunk_lr",
        "weight_decay",
        "softmax",
        "towers_lr",
    ):
        weight = getattr(train, key)
        if not weight >= 0:
            raise SchemaError(f"train.{key}: got {weight!r}, expected a number of at least 0")
    for key in ("dropout", "id_dropout"):
        share = getattr(model, key)
        if not 0 <= share < 1:
            raise SchemaError(f"model.{key}: got {share!r}, expected a share of at least 0 and below 1")
    if train.order not in ORDERS:
        raise SchemaError(f"train.order: got {train.order!r}, expected {' or '.join(ORDERS)}")
    if train.order == "requests" and not train.pool:
        raise SchemaError(
            "train.order: requests is for logs of positives alone; set train.pool too, or labels"
        )
    if train.pool and not train.negatives:
        raise SchemaError("train.pool: is for logs of positives alone; set train.negatives (8, say) too")
    if train.pool and train.unlabelled:
        raise SchemaError(f"train.unlabelled: got {train.unlabelled}, expected 0 beside train.pool")
    if train.hard + train.listed >= (train.negatives if train.pool else 1):
        raise SchemaError(
            f"train.hard and train.listed: got {train.hard} and {train.listed}, expected less than train.negatives "
            f"({train.negatives}) together, since every item must have a chance, and 0 without train.pool"
        )
    if train.towers_lr and not train.two_phases:
        raise SchemaError("train.towers_lr: has no effect without train.pool or train.towers_first")
    if not 0 <= train.held < 1:
        raise SchemaError(
            f"train.held: got {train.held!r}, expected a share of the users, at least 0 and below 1"
        )
    if train.held and not train.two_phases:
        raise SchemaError("train.held: has no effect without train.pool or train.towers_first")
    for key in ("lr", "temperature", "heat"):
        if not getattr(train, key) > 0:
            raise SchemaError(f"train.{key}: got {getattr(train, key)!r}, expected a number above 0")
    if train.teacher and not ((train.unlabelled or train.pool) and train.distil):
        raise SchemaError(
            "train.teacher: has no effect without train.distil and either train.unlabelled or train.pool above 0"
        )
    if search.k > search.max_k:
        raise SchemaError(f"search.k: got {search.k}, more than search.max_k ({search.max_k})")


def check_order(train: TrainConfig, schema: Schema) -> None:
    """SchemaError where ``train.order: requests`` would fit a probability that does not rank items by itself."""
    ranking = [task.name for task in schema.tasks if task.rank]
    if train.order == "requests" and ranking != [schema.tasks[0].name]:
        raise SchemaError(
            f"train.order: got requests, which is fitted to the first task, {schema.tasks[0].name}, as if it ranked by "
            f"itself; what ranks is {', '.join(ranking)}; expected labels, or rank 0 of all other tasks"
        )


def check_listed(train: TrainConfig, schema: Schema) -> None:
    """SchemaError unless ``train.listed_from`` is a feature that negatives can be drawn from, where any are."""
    lists = [f.name for f in schema.user_features if f.encoding == "item" and f.kind == "sequence"]
    if train.listed and train.listed_from not in lists:
        raise SchemaError(
            f"train.listed_from: got {train.listed_from!r}, expected a sequence of items of the user's: "
            f"{', '.join(lists) or 'the schema has none'}"
        )
    if bool(train.listed) != bool(train.listed_from):
        raise SchemaError(
            f"train.listed_from: got {train.listed_from!r} beside train.listed {train.listed}; set both"
        )
