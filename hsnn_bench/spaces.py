"""What is tuned: per method the parameters, their ranges and where the search begins.

A method of `implicit` has the parameters of its class in `implicit_models`; a method of ours has dotted keys of a
recipe. The first trial of every method is its ``start``, so that tuning never ends below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hsnn_core.errors import DataError


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
        start: the first trial; a value for every knob.
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
_OURS_START = {"train.lr": 3e-3, "train.epochs": 9, "train.batch_size": 512, "train.temperature": 0.12}


def _flat(preset: str) -> Method:
    """One MoNN over all items, without an index."""
    # A recipe's own rate of the first phase would make train.lr do nothing for two towers; untuned it stands.
    single = {"model.layers": [preset], "model.codebooks": [], "search.widths": []}
    knobs, start = _OURS | {"train.towers_lr": Choice((0.0,))}, _OURS_START | {"train.towers_lr": 0.0}
    return Method(knobs, start, single, ours=True)


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
    "two_tower": _flat("cpu_xs"),
    "mol": _flat("cpu_mol"),
    "flat": _flat("cpu_s"),
    "hsnn": Method(_OURS, _OURS_START, ours=True),
}


def methods_for(candidates: str) -> list[str]:
    """The methods that such evaluation requests (`search.candidates`) allow."""
    return [name for name, found in METHODS.items() if candidates == "seen_before" or not found.timed]


def method(name: str) -> Method:
    """The method of that name. Raises DataError that lists the known ones."""
    if name not in METHODS:
        raise DataError(f"method {name!r}: unknown; known: {', '.join(METHODS)}")
    return METHODS[name]
