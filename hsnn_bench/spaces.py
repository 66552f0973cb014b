"""What is tuned: per method the parameters, their ranges and where the search begins.

A method of `implicit` has the parameters of its class in `implicit_models`; a method of ours has dotted keys of a
recipe. The first trial of every method is its ``start``, so that tuning never ends below it; ours start where the
recipe stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hsnn_core.errors import DataError
from hsnn_train.recipe_sections import TrainConfig


@dataclass(frozen=True)
class Real:
    """A real number from low to high."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Whole:
    """A whole number from low to high, both possible."""

    low: int
    high: int
    log: bool = False


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[str | int | float | bool, ...]


Knob = Real | Whole | Choice


@dataclass(frozen=True)
class Method:
    """A method to tune.

    Attributes:
        knobs: the search space.
        start: the first trial; a value for every knob. Ours have none before `around`.
        recipe: for our own methods, what makes the recipe this method: dotted keys and their values.
        ours: whether the method is trained from a recipe.
        timed: whether it needs requests whose times compare (`search.candidates: seen_before`).
    """

    knobs: Mapping[str, Knob]
    start: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    ours: bool = False
    timed: bool = False


_OURS: dict[str, Knob] = {
    "train.lr": Real(3e-4, 3e-2, log=True),
    "train.epochs": Whole(2, 20, log=True),
    "train.batch_size": Choice((256, 512, 1024)),
    "train.temperature": Real(0.05, 0.3, log=True),
}


def _flat(preset: str, knobs: Mapping[str, Knob]) -> Method:
    """One MoNN over all items, without an index."""
    single = {"model.layers": [preset], "model.codebooks": [], "search.widths": []}
    return Method(knobs, {}, single, ours=True)


def around(space: Method, train: TrainConfig) -> Method:
    """A method of ours for a recipe: it starts at the recipe's values, and what they exceed is widened to hold them. A
    recipe that counts steps has its number of steps as the knob, from half to twice: epochs would do nothing."""
    knobs = dict(space.knobs)
    if "train.epochs" in knobs and train.max_steps:
        del knobs["train.epochs"]
        knobs["train.max_steps"] = Whole(max(1, train.max_steps // 2), 2 * train.max_steps, log=True)
    start = {key: getattr(train, key.removeprefix("train.")) for key in knobs}
    if "train.towers_lr" in knobs:
        start |= {"train.lr": train.first_lr, "train.towers_lr": 0.0}
    return replace(space, knobs={key: _holding(knob, start[key]) for key, knob in knobs.items()}, start=start)


def _holding(knob: Knob, value: Any) -> Knob:
    if isinstance(knob, Choice):
        return knob if value in knob.values else Choice((*knob.values, value))
    return replace(knob, low=min(knob.low, value), high=max(knob.high, value))


METHODS: dict[str, Method] = {
    "popularity": Method({}, {}),
    "recent": Method({"positives": Whole(100, 200_000, log=True)}, {"positives": 5000}, timed=True),
    "item_knn": Method(
        {
            "weighting": Choice(("cosine", "tfidf", "bm25")),
            "neighbours": Whole(20, 1000, log=True),
            "k1": Real(0.3, 300.0, log=True),
            "b": Real(0.0, 1.0),
            "decay": Choice((1.0, 0.9, 0.8, 0.6, 0.4)),
        },
        {"weighting": "tfidf", "neighbours": 200, "k1": 100.0, "b": 0.2, "decay": 1.0},
    ),
    "lists": Method(
        {
            "length": Whole(20, 1000, log=True),
            "damping": Real(0.0, 0.6),
            "decay": Choice((1.0, 0.9, 0.8, 0.6, 0.4)),
        },
        {"length": 200, "damping": 0.2, "decay": 1.0},
    ),
    "als": Method(
        {
            "factors": Choice((32, 64, 128, 256)),
            "regularization": Real(1e-3, 1e2, log=True),
            "alpha": Real(0.3, 100.0, log=True),
            "iterations": Whole(5, 30),
            "decay": Choice((1.0, 0.9, 0.8, 0.6, 0.4)),
        },
        {"factors": 64, "regularization": 1.0, "alpha": 5.0, "iterations": 15, "decay": 1.0},
    ),
    "bpr": Method(
        {
            "factors": Choice((32, 64, 128, 256)),
            "learning_rate": Real(3e-3, 0.3, log=True),
            "regularization": Real(1e-4, 0.1, log=True),
            "iterations": Whole(30, 200, log=True),
        },
        {"factors": 64, "learning_rate": 0.05, "regularization": 0.01, "iterations": 100},
    ),
    # two towers have the first phase alone: a recipe's own rate of it would make train.lr do nothing
    "two_tower": _flat("cpu_xs", _OURS | {"train.towers_lr": Choice((0.0,))}),
    "mol": _flat("cpu_mol", _OURS),
    "flat": _flat("cpu_s", _OURS),
    "hsnn": Method(_OURS, {}, ours=True),
}


def methods_for(candidates: str) -> list[str]:
    """The methods that such evaluation requests (`search.candidates`) allow."""
    return [name for name, found in METHODS.items() if candidates == "seen_before" or not found.timed]


def method(name: str) -> Method:
    """The method of that name. Raises DataError that lists the known ones."""
    if name not in METHODS:
        raise DataError(f"method {name!r}: unknown; known: {', '.join(METHODS)}")
    return METHODS[name]
