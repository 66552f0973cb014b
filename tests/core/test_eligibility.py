"""Attributes, contexts and bitmaps against a plain reading of the rules, item by item."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from core_schemas import ads
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schema_eligibility import targeted

from hsnn_core import eligibility
from hsnn_core.arrayfile import open_arrays, write_arrays
from hsnn_core.eligibility import AttributeBitmaps, Context, clear_bits
from hsnn_core.errors import FeatureError, FormatError
from hsnn_core.item_attributes import ItemAttributes
from hsnn_core.schema import KEY_MISSING, Schema

SCHEMA = targeted()
COUNTRIES = ["IT", "DE", "FR", "JP"]
TIMES = st.one_of(st.none(), st.integers(-3, 3), st.floats(-3, 3))


@st.composite
def bounds(draw: st.DrawFn) -> Any:
    pair = draw(st.one_of(st.none(), st.tuples(TIMES, TIMES)))
    if pair is None or None in pair:
        return pair
    return sorted(pair)


ITEM = st.fixed_dictionaries(
    {},
    optional={
        "country": st.one_of(
            st.none(), st.sampled_from(COUNTRIES), st.lists(st.sampled_from(COUNTRIES), max_size=9)
        ),
        "placement": st.lists(st.sampled_from(["feed", "story"]), max_size=3),
        "running": bounds(),
        "age": bounds(),
        "paused": st.sampled_from([True, False, None]),
        "advertiser": st.one_of(st.none(), st.integers(-2, 3)),
    },
)
REQUEST = st.fixed_dictionaries(
    {},
    optional={
        "country": st.sampled_from([*COUNTRIES, "ZZ", None]),
        "placement": st.lists(st.sampled_from(["feed", "story", "nowhere"]), max_size=2),
        "running": TIMES,
        "age": TIMES,
    },
)
EXCLUDED = st.fixed_dictionaries({}, optional={"advertiser": st.lists(st.integers(-2, 4), max_size=3)})


def listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def eligible(item: dict[str, Any], request: dict[str, Any], excluded: dict[str, Any], now: float) -> bool:
    """The rules of `schema_eligibility`, in plain words."""
    for name in ("country", "placement"):
        own = listed(item.get(name))
        if own and not set(own) & set(listed(request.get(name))):
            return False
    for name, default in (("running", float(np.floor(now))), ("age", None)):
        start, until = item.get(name) or (None, None)
        value = request.get(name) if request.get(name) is not None else default
        if value is None:
            if start is not None or until is not None:
                return False
        elif (start is not None and value < start) or (until is not None and value >= until):
            return False
    if item.get("paused"):
        return False
    advertiser = item.get("advertiser")
    return advertiser is None or advertiser not in excluded.get("advertiser", [])


@settings(max_examples=300, deadline=None)
@given(
    items=st.lists(ITEM, max_size=20),
    requests=st.lists(st.tuples(REQUEST, EXCLUDED), min_size=1, max_size=4),
    now=st.floats(-4, 4),
    data=st.data(),
)
def test_bitmaps_are_the_rules_read_item_by_item(
    items: list[dict[str, Any]], requests: list[tuple[Any, Any]], now: float, data: st.DataObject
) -> None:
    attributes = ItemAttributes.from_rows(SCHEMA, items)
    rows = np.array(data.draw(st.permutations(range(len(items)))), np.int64)
    half = len(rows) // 2
    if len(items):  # taken apart and put together in another order
        attributes = ItemAttributes.concatenate([attributes.take(rows[:half]), attributes.take(rows[half:])])
    assert len(attributes) == len(items)
    again = ItemAttributes.from_arrays(SCHEMA, attributes.to_arrays())
    assert again is not None
    context = Context.from_rows(SCHEMA, [c for c, _ in requests], now, [e for _, e in requests])
    bitmaps = AttributeBitmaps(again)
    assert len(context) == len(requests)
    for _ in range(2):  # made, then kept
        for user, (request, excluded) in enumerate(requests):
            bits = bitmaps.matching(context, user)
            assert (bits.dtype, bits.shape) == (np.uint8, (-(-len(items) // 8),))
            found = np.unpackbits(bits, bitorder="little")
            wanted = [eligible(items[row], request, excluded, now) for row in rows]
            assert found[: len(items)].tolist() == [int(w) for w in wanted]
            assert not found[len(items) :].any()
            bits[:] = 0  # the caller's own


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 70), data=st.data())
def test_clear_bits(size: int, data: st.DataObject) -> None:
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1)))), np.int32)
    bits = np.packbits(mask, bitorder="little")
    clear_bits(bits, rows)
    mask[rows] = False
    np.testing.assert_array_equal(bits, np.packbits(mask, bitorder="little"))


def test_the_clock_counts_in_whole_seconds_and_each_costs_one_bitmap(monkeypatch: pytest.MonkeyPatch) -> None:
    attributes = ItemAttributes.from_rows(SCHEMA, [{"running": [10, 11]}, {"running": [None, 11.5]}, {}])
    bitmaps = AttributeBitmaps(attributes)
    made: list[int] = []
    packed = eligibility._packed
    monkeypatch.setattr(eligibility, "_packed", lambda mask: made.append(1) or packed(mask))

    def found(now: float) -> int:
        return int(bitmaps.matching(Context.from_wire(SCHEMA, {}, 1, now), 0)[0])

    assert [found(now) for now in (9.99, 10.0, 10.999, 10.3, 11.0, 11.99)] == [
        0b110,
        0b111,
        0b111,
        0b111,
        0b110,
        0b110,
    ]
    assert len(made) == 3, "seconds 9, 10 and 11"
    for second in range(200):
        found(second)
    assert len(bitmaps._ranges["running"]._kept._bits) == eligibility.KEPT, "bounded"


BOUND = st.one_of(st.integers(-4, 4), st.floats(-4, 4), st.sampled_from([-math.inf, math.inf, math.nan]))


@settings(max_examples=200, deadline=None)
@given(
    bounds=st.lists(st.tuples(BOUND, BOUND), min_size=1, max_size=30),
    times=st.lists(st.one_of(st.integers(-5, 5), st.floats(-5, 5)), min_size=1, max_size=30),
    share=st.sampled_from([0, 2, 64]),
)
def test_a_bitmap_made_of_a_near_one_is_that_of_comparing(
    bounds: list[tuple[float, float]], times: list[float], share: int
) -> None:
    """Whatever the bounds (a file may hold any) and wherever the clock jumps, backwards too; ``share`` 0: every one is
    made of another."""
    sides = np.array(bounds, np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eligibility, "MOVED_FROM", 1)
        patch.setattr(eligibility, "_MOVED_SHARE", share)
        patch.setattr(eligibility, "KEPT", 3)
        ranges = eligibility._RangeBitmaps(sides)
        for time in times:
            wanted = np.packbits((sides[:, 0] <= time) & (time < sides[:, 1]), bitorder="little")
            found = ranges.matching(float(time))
            np.testing.assert_array_equal(found, wanted)
            assert not found.flags.writeable


def test_the_next_second_costs_what_changes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = eligibility.MOVED_FROM
    start = np.arange(rows) * 600.0
    ranges = eligibility._RangeBitmaps(np.stack([start, start + 60], axis=1))
    ranges.matching(0.0)
    compared: list[int] = []
    packed = eligibility._packed
    monkeypatch.setattr(eligibility, "_packed", lambda mask: compared.append(1) or packed(mask))
    for second in (1, 60, 600, 599, 6000):
        ranges.matching(float(second))
    assert not compared
    ranges.matching(600.0 * rows)  # every item has started and ended in between
    assert len(compared) == 1


def test_a_bitmap_is_made_once_and_nobody_else_waits() -> None:
    made: list[float] = []
    begun, go_on = Event(), Event()

    def make(value: float) -> np.ndarray:
        made.append(value)
        if value == 2:
            begun.set()
            assert go_on.wait(10)
        return np.zeros(1, np.uint8)

    kept = eligibility._Kept(make)
    kept(1.0)
    with ThreadPoolExecutor(4) as pool:
        same = [pool.submit(kept, 2.0) for _ in range(4)]
        assert begun.wait(10)
        kept(1.0)  # is there: no waiting for the other one
        go_on.set()
        assert len({id(future.result(10)) for future in same}) == 1
    assert made == [1.0, 2.0]


def test_threads_share_bitmaps() -> None:
    rng = np.random.default_rng(3)
    items = [
        {"country": rng.choice(COUNTRIES, rng.integers(0, 3)).tolist(), "age": [i % 7, i % 7 + 3]}
        for i in range(500)
    ]
    bitmaps = AttributeBitmaps(ItemAttributes.from_rows(SCHEMA, items))
    requests = [{"country": COUNTRIES[n % 4], "age": n % 100 / 10} for n in range(400)]
    context = Context.from_rows(SCHEMA, requests, 0.0)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda user: bitmaps.matching(context, user), range(len(requests))))
    fresh = AttributeBitmaps(ItemAttributes.from_rows(SCHEMA, items))
    for user, bits in enumerate(found):
        np.testing.assert_array_equal(bits, fresh.matching(context, user))


def test_files_hold_attributes(tmp_path: Path) -> None:
    attributes = ItemAttributes.from_rows(
        SCHEMA,
        [{"country": ["IT", "DE"], "paused": True}, {"running": [None, 5], "advertiser": 7}],
        [0.25, None],
    )
    write_arrays(tmp_path / "a.hsnn", "index", attributes.to_arrays())
    arrays = dict(open_arrays(tmp_path / "a.hsnn", "index").arrays)
    again = ItemAttributes.from_arrays(SCHEMA, arrays)
    assert again is not None
    for name, array in attributes.to_arrays().items():
        assert name.startswith("eligibility.")
        np.testing.assert_array_equal(again.to_arrays()[name], array)
    assert again.bids.tolist() == [0.25, 1.0]
    assert again.keys["advertiser"].tolist() == [KEY_MISSING, 7]
    assert ItemAttributes.from_arrays(Schema.from_dict(ads()), arrays) is None
    del arrays["eligibility.paused.flag"]
    with pytest.raises(
        FormatError, match=r"array eligibility.paused.flag is missing, which the schema's eligib"
    ):
        ItemAttributes.from_arrays(SCHEMA, arrays)
    arrays["eligibility.paused.flag"] = np.zeros(3, bool)
    with pytest.raises(
        FormatError, match=r"eligibility.paused.flag: got bool of shape \(3,\), expected bool of shape \(2,\)"
    ):
        ItemAttributes.from_arrays(SCHEMA, arrays)


@pytest.mark.parametrize(
    ("row", "bid", "text"),
    [
        (
            {"color": 3},
            None,
            "eligibility: unknown attribute 'color', expected one of country, placement, running",
        ),
        ({"country": 3}, None, "attribute 'country': got 3 (int) as a key, expected a string (type: string)"),
        (
            {"placement": list("abcde")},
            None,
            "attribute 'placement': got 5 keys, expected at most 4 (the schema says",
        ),
        ({"running": 3}, None, "attribute 'running': got 3, expected [from, until], null where unbounded"),
        (
            {"running": [1, float("nan")]},
            None,
            "attribute 'running': got [1, nan], expected two finite numbers",
        ),
        ({"running": [2, 1]}, None, "attribute 'running': got [2, 1], expected from <= until"),
        ({"paused": 1}, None, "attribute 'paused': got 1, expected true or false"),
        ({"advertiser": [1, 2]}, None, "attribute 'advertiser': got [1, 2], expected one key or none"),
        (
            {"advertiser": KEY_MISSING},
            None,
            "attribute 'advertiser': got -9223372036854775808 (int) as a key",
        ),
        ([], None, "eligibility: got [], expected a mapping of attribute names to values"),
        ({}, 0.0, "bid: got 0.0, expected a finite number above 0 that float32 can hold"),
        ({}, float("nan"), "bid: got nan, expected a finite number above 0"),
        ({}, 1e-50, "bid: got 1e-50, expected a finite number above 0"),
        ({}, "2", "bid: got '2', expected a finite number above 0"),
    ],
)
def test_wrong_item_values_are_named(row: Any, bid: Any, text: str) -> None:
    with pytest.raises(FeatureError) as caught:
        ItemAttributes.from_rows(SCHEMA, [row], [bid])
    assert text in str(caught.value)


def test_what_the_schema_does_not_declare_is_refused() -> None:
    plain = Schema.from_dict(ads())
    with pytest.raises(FeatureError, match="expected one of none: the schema has no eligibility section"):
        ItemAttributes.from_rows(plain, [{"country": "IT"}])
    with pytest.raises(FeatureError, match="bid: got 0.5, expected none: the schema declares no bid"):
        ItemAttributes.from_rows(plain, [{}], [0.5])


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (
            {"context_x": np.zeros((2, 1))},
            "unknown request tensor 'context_x', expected one of context_country, ",
        ),
        (
            {"context_country": np.zeros((2, 1), np.int32)},
            "context_country: got int32 of shape (2, 1), expected int64 of shape (2, 1)",
        ),
        (
            {"context_placement": np.zeros((2, 1), np.int64)},
            "context_placement: got int64 of shape (2, 1), expected int64 of shape (2, 2)",
        ),
        (
            {"exclude_advertiser": np.zeros((1, 5), np.int64)},
            "exclude_advertiser: got int64 of shape (1, 5), expected int64 of shape (2, any number)",
        ),
        (
            {"context_age": np.array([[1.0], [np.inf]])},
            "context_age: got inf, expected finite numbers, or NaN for none",
        ),
    ],
)
def test_wrong_request_tensors_are_named(tensors: dict[str, np.ndarray], text: str) -> None:
    with pytest.raises(FeatureError) as caught:
        Context.from_wire(SCHEMA, tensors, 2, 0.0)
    assert text in str(caught.value)
