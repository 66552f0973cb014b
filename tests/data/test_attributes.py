"""Eligibility and bids from the item table: the same as from rows, and the errors of bad columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import log_samples as sample
import numpy as np
import pyarrow as pa
import pytest

from hsnn_core.errors import DataError
from hsnn_core.item_attributes import ItemAttributes
from hsnn_train.data.attributes import read_attributes
from hsnn_train.data.dataset import build_dataset, load_dataset
from hsnn_train.data.splits import Split

SECTION = {
    "country": {"kind": "set", "type": "string", "max": 2},
    "shelf": {"kind": "set", "max": 2},
    "running": {"kind": "range", "from": "start", "until": "end", "default": "now"},
    "paused": {"kind": "flag"},
    "owner": {"kind": "key", "type": "string"},
}
SCHEMA = sample.schema(eligibility=SECTION, bid="price")
COLUMNS: dict[str, Any] = {
    "item_id": [30, 10, 20],
    "topics": [["x"], ["x", "y"], None],
    "country": [["IT", "DE"], None, []],
    "shelf": [1, None, 2],
    "start": [1, None, 2],
    "end": [2.5, 3.0, None],
    "paused": [True, None, False],
    "owner": ["a", "b", None],
    "price": [0.5, None, 3.0],
}
ROWS = [
    {"country": ["IT", "DE"], "shelf": 1, "running": [1, 2.5], "paused": True, "owner": "a"},
    {"running": [None, 3], "owner": "b"},
    {"shelf": [2], "running": [2, None]},
]


def table(**changes: Any) -> pa.Table:
    columns = COLUMNS | changes
    return pa.table({name: values for name, values in columns.items() if values is not None})


def assert_same(ours: ItemAttributes | None, theirs: ItemAttributes) -> None:
    assert ours is not None
    arrays = ours.to_arrays()
    for name, values in theirs.to_arrays().items():
        if name.endswith(".keys"):  # rows have each key once, ascending
            ptr = arrays[name.removesuffix("keys") + "ptr"]
            arrays[name] = np.concatenate([np.sort(part) for part in np.split(arrays[name], ptr[1:-1])])
        np.testing.assert_array_equal(arrays[name], values, err_msg=name)


def test_columns_and_rows_say_the_same() -> None:
    rows = ItemAttributes.from_rows(SCHEMA, ROWS, [0.5, None, 3.0])
    assert_same(read_attributes(SCHEMA, table(), "items"), rows)
    second = pa.array([1_000_000, None, 2_000_000], pa.timestamp("us"))
    as_others = table(paused=[1, 0, None], start=second, shelf=[[1], None, [2]])
    assert_same(read_attributes(SCHEMA, as_others, "items"), rows)
    assert read_attributes(sample.schema(), table(), "items") is None


def test_a_table_of_csv_has_them_too(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(
        "item_id,topics,country,shelf,start,end,paused,owner,price\n"
        "30,x,IT|DE,1,1,2.5,true,a,0.5\n10,x|y,,,,3,,b,\n20,,,2,2,,false,,3\n"
    )
    (tmp_path / "log.csv").write_text("user_id,item_id,time,hour,age,click,buy\n1,10,5,3,20,1,0\n")
    section = {"impressions": "log.csv", "items": "items.csv"}
    dataset = load_dataset(SCHEMA, section, {"fractions": [1, 0, 0]}, tmp_path, seed=1, progress=False)
    assert_same(dataset.attributes, ItemAttributes.from_rows(SCHEMA, ROWS, [0.5, None, 3.0]))


def test_a_dataset_without_the_section_needs_no_columns() -> None:
    assert build_dataset(sample.schema(), sample.tables(), Split(), 1).attributes is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"start": None},
            "items: column 'start' is missing (eligibility.running); columns there: item_id, topics,",
        ),
        ({"price": None}, "items: column 'price' is missing (bid)"),
        (
            {"country": [1, 2, 3]},
            "items: column 'country': got int64, expected string keys (the schema says type",
        ),
        (
            {"country": [["IT"], ["a", "b", "c"], None]},
            "items: column 'country', row 1: got 3 keys, expected at most 2 (the schema says max: 2)",
        ),
        (
            {"country": [["IT"], ["a", None], None]},
            "items: column 'country', row 1: null inside a list; leave it",
        ),
        ({"end": ["x", "y", "z"]}, "items: column 'end': got string, expected numbers or timestamps"),
        (
            {"end": [1.0, float("nan"), 2.0]},
            "items: column 'end', row 1: got nan, expected finite numbers; leave",
        ),
        (
            {"end": [0, 1, 2]},
            "items: columns 'start' and 'end', row 0: got [1.0, 0.0], expected from <= until",
        ),
        ({"paused": [1, 2, 0]}, "items: column 'paused', row 1: got 2, expected true or false"),
        ({"paused": ["a", "b", "c"]}, "items: column 'paused', row 0: got 'a', expected true or false"),
        ({"owner": [1, 2, 3]}, "items: column 'owner': got int64, expected string keys"),
        (
            {"price": [1.0, 0.0, 2.0]},
            "items: column 'price', row 1: got 0.0, expected a bid above 0 that float32",
        ),
    ],
)
def test_bad_columns_are_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError) as caught:
        read_attributes(SCHEMA, table(**changes), "items")
    assert text in str(caught.value)
