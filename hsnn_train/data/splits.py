"""How impressions are divided into train, valid and test.

split: {by: time, fractions: [0.8, 0.1, 0.1]}          the log cut at two moments
split: {by: user_time, fractions: [0.8, 0.1, 0.1]}     every user's own log cut
split: {by: last_days, valid_days: 1, test_days: 1, unit: s}
split: {by: leave_one_out}                             a user's last positive: test, the one before: valid
split: {by: column, column: split}                     a column that says train, valid or test
split: {by: column, column: split, valid_share: 0.03}  the same, with this share of train, drawn at random, for valid
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from hsnn_core.errors import DataError, SchemaError

from .columns import column, is_text
from .tables import Log

TRAIN, VALID, TEST = 0, 1, 2
NAMES = ("train", "valid", "test")
PER_DAY = {"s": 86_400, "ms": 86_400_000, "us": 86_400_000_000}
LONGEST_DAYS = 36_525  # a log of more than a century has its unit wrong


@dataclass(frozen=True)
class Split:
    """A way to divide; ``unit`` is that of the time column, ``task`` the one whose positives are left out
    (default: the first). ``valid_share`` is for splits published without a valid part, which would leave nothing to
    tune or calibrate on."""

    by: str = "time"
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    valid_days: float = 1.0
    test_days: float = 1.0
    unit: str = "s"
    column: str = "split"
    valid_share: float = 0.0
    task: str | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Split:
        """The `split:` section of a recipe. Raises SchemaError naming the dotted path that is wrong."""
        known = [f.name for f in fields(cls)]
        for key in raw:
            if key not in known:
                raise SchemaError(f"split.{key}: unknown key; known keys: {', '.join(known)}")
        values = dict(raw)
        for key in ("by", "unit", "column", "task"):
            if not isinstance(values.get(key) or "", str):
                raise SchemaError(f"split.{key}: got {values[key]!r}, expected a name")
        if values.get("by", "time") not in _WAYS:
            raise SchemaError(f"split.by: got {values['by']!r}, expected one of {', '.join(_WAYS)}")
        for key in ("valid_days", "test_days"):
            if key in values and not (_is_number(values[key]) and values[key] >= 0):
                raise SchemaError(f"split.{key}: got {values[key]!r}, expected a number of days >= 0")
        share = values.get("valid_share", 0.0)
        if not _is_number(share) or not 0 <= share < 1:
            raise SchemaError(
                f"split.valid_share: got {share!r}, expected a share of train, at least 0, below 1"
            )
        if share and values.get("by", "time") != "column":
            raise SchemaError(
                "split.valid_share: is for splits by column alone; the others have a valid part"
            )
        if values.get("unit", "s") not in PER_DAY:
            raise SchemaError(f"split.unit: got {values['unit']!r}, expected one of {', '.join(PER_DAY)}")
        if "fractions" in values:
            parts = values["fractions"]
            if not _are_fractions(parts):
                raise SchemaError(
                    f"split.fractions: got {parts!r}, expected three numbers >= 0 for train (> 0), valid and "
                    "test that sum to 1"
                )
            values["fractions"] = tuple(float(part) for part in parts)
        return cls(**values)

    def assign(self, log: Log) -> np.ndarray:
        """TRAIN, VALID or TEST of every impression, (S,) int8. Raises DataError when train is empty."""
        parts: np.ndarray = _WAYS[self.by](self, log)
        if not (parts == TRAIN).any():
            counts = ", ".join(f"{name} {int((parts == n).sum())}" for n, name in enumerate(NAMES))
            raise DataError(f"split by {self.by}: no impression is left to train ({counts}); change split:")
        return parts


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_fractions(parts: Any) -> bool:
    return (
        isinstance(parts, list | tuple)
        and len(parts) == len(NAMES)
        and all(_is_number(part) and part >= 0 for part in parts)
        and parts[TRAIN] > 0
        and abs(sum(parts) - 1) < 1e-6
    )


def _by_time(split: Split, log: Log) -> np.ndarray:
    """Cut at moments: impressions of one moment stay together, in the later part."""
    count = len(log.time)
    ordered = np.sort(log.time)
    parts = np.zeros(count, np.int8)
    for fraction in np.cumsum(split.fractions)[:2]:
        cut = round(float(fraction) * count)
        if cut < count:
            parts += log.time >= ordered[cut]
    return parts


def _by_user_time(split: Split, log: Log) -> np.ndarray:
    """Cut every user's impressions in their own order, at least one of them to train."""
    order, rank, count = _within_users(log)
    parts = np.zeros(len(order), np.int8)
    for fraction in np.cumsum(split.fractions)[:2]:
        parts[order] += rank >= np.maximum(np.ceil(fraction * count - 1e-9), 1)
    return parts


def _by_last_days(split: Split, log: Log) -> np.ndarray:
    _needs_time(split, log)
    day = PER_DAY[split.unit]
    end = int(log.time.max()) + 1
    span = (end - int(log.time.min())) / day
    if span > LONGEST_DAYS:
        raise DataError(
            f"split by last_days: the log spans {span:.0f} days with unit {split.unit!r}; set split.unit to "
            f"the unit of column {log.tables.schema.time_key!r} ({', '.join(PER_DAY)})"
        )
    parts = np.zeros(len(log.time), np.int8)
    parts += log.time >= end - (split.valid_days + split.test_days) * day
    parts += log.time >= end - split.test_days * day
    return parts


def _leave_one_out(split: Split, log: Log) -> np.ndarray:
    """A user's last positive opens test, the one before it opens valid: what follows each belongs to the
    same part, so that no part holds anything earlier than the part before. Users of fewer than three
    positives train.
    """
    names = [task.name for task in log.tables.schema.tasks]
    if split.task is not None and split.task not in names:
        raise SchemaError(f"split.task: got {split.task!r}, expected one of {', '.join(names)}")
    task = names.index(split.task) if split.task else 0
    order, rank, _ = _within_users(log)
    hit = log.labels[order, task] > 0
    new = rank == 0
    users = np.cumsum(new) - 1
    passed = np.cumsum(hit)
    passed -= (passed - hit)[new][users]  # positives of the user up to and with this one
    total = np.bincount(users, weights=hit).astype(np.int64)[users]
    parts = np.zeros(len(order), np.int8)
    parts[order] = ((passed >= total - 1).astype(np.int8) + (passed >= total)) * (total >= 3)
    return parts


def _by_column(split: Split, log: Log) -> np.ndarray:
    where = log.tables.where("impressions")
    values = column(log.tables.impressions, split.column, where, "split.column")
    if not is_text(values.type):
        raise DataError(f"{where}: column {split.column!r}: got {values.type}, expected {', '.join(NAMES)}")
    coded = values.fill_null("").dictionary_encode()
    number = {name: n for n, name in enumerate(NAMES)}
    of_value = np.array([number.get(value, -1) for value in coded.dictionary.to_pylist()], np.int8)
    parts = of_value[np.asarray(coded.indices)]
    if (parts < 0).any():
        row = int(np.argmax(parts < 0))
        raise DataError(
            f"{where}: column {split.column!r}, row {row}: got {values[row].as_py()!r}, expected "
            f"{', '.join(NAMES)}"
        )
    drawn = np.random.default_rng(0).random(len(parts)) < split.valid_share
    parts[(parts == TRAIN) & drawn] = VALID
    return parts


def _within_users(log: Log) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Impressions ordered by user and time; per place the rank within the user and the user's total."""
    order = np.lexsort((np.arange(len(log.time)), log.time, log.user_key))
    new = np.ones(len(order), bool)
    new[1:] = log.user_key[order][1:] != log.user_key[order][:-1]
    users = np.cumsum(new) - 1
    starts = np.flatnonzero(new)
    return order, np.arange(len(order)) - starts[users], np.bincount(users)[users]


def _needs_time(split: Split, log: Log) -> None:
    if log.tables.schema.time_key is None:
        raise SchemaError(f"keys.time: missing; split by {split.by} needs the column with the time")


_WAYS = {
    "time": _by_time,
    "user_time": _by_user_time,
    "last_days": _by_last_days,
    "leave_one_out": _leave_one_out,
    "column": _by_column,
}
