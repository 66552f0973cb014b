"""Tables from files, and the errors that bad ones get."""

from __future__ import annotations

import json
from pathlib import Path

import log_samples as sample
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hsnn_core.errors import DataError
from hsnn_core.schema import KEY_MISSING, stable_key
from hsnn_train.data.columns import wire_rows
from hsnn_train.data.dataset import load_dataset
from hsnn_train.data.tables import check_tables, load_tables, read_table

CSV = {
    "impressions": "user_id,item_id,time,hour,click,buy\n1,10,5,3,1,0\n2,20,6,4,0,0\n",
    "users": "user_id,age\n1,20\n2,\n",
    "items": "item_id,topics\n10,x|y\n20,\n",
}


def write_csv(folder: Path, **changes: str) -> dict[str, Path]:
    paths = {}
    for name, text in {**CSV, **changes}.items():
        paths[name] = folder / f"{name}.csv"
        paths[name].write_text(text)
    return paths


def test_csv_parquet_and_jsonl_give_the_same_data(tmp_path: Path) -> None:
    csv = write_csv(tmp_path)
    rows = {
        "impressions": [
            {"user_id": 1, "item_id": 10, "time": 5, "hour": 3, "click": 1, "buy": 0},
            {"user_id": 2, "item_id": 20, "time": 6, "hour": 4, "click": 0, "buy": 0},
        ],
        "users": [{"user_id": 1, "age": 20.0}, {"user_id": 2}],
        "items": [{"item_id": 10, "topics": ["x", "y"]}, {"item_id": 20}],
    }
    found = []
    for suffix in ("csv", "parquet", "jsonl"):
        section = {name: f"{name}.{suffix}" for name in rows}
        for name, entries in rows.items():
            if suffix == "parquet":
                pq.write_table(pa.Table.from_pylist(entries), tmp_path / section[name])
            elif suffix == "jsonl":
                (tmp_path / section[name]).write_text("\n".join(map(json.dumps, entries)))
        split = {"fractions": [1, 0, 0]}
        found.append(load_dataset(sample.schema(), section, split, tmp_path, seed=1, progress=False))
    assert csv["items"].is_file()
    assert found[0].items.ids.tolist() == [[2, 2, 3], [3, 0, 0]]
    for other in found[1:]:
        assert other.items.ids.tolist() == found[0].items.ids.tolist()
        np.testing.assert_array_equal(other.train.users.dense, found[0].train.users.dense)
        np.testing.assert_array_equal(other.train.users.ids, found[0].train.users.ids)


def test_string_keys_of_users_and_items() -> None:
    features = {
        "user": {
            "history": {"kind": "sequence", "of": "item", "length": 2, "from": "click", "type": "string"}
        },
        "item": {"item": {"kind": "sparse", "of": "item", "type": "string"}},
    }
    names = {10: "a", 20: "b", 30: "c"}
    log = check_tables(
        sample.tables(
            schema=sample.schema(features=features, interactions={}),
            impressions=sample.impressions(item_id=[names[i] for i in [10, 10, 20, 30, 20, 30]]),
            items=sample.items(item_id=["c", "a", "b"]),
        )
    )
    assert log.item_keys.tolist() == [stable_key("c"), stable_key("a"), stable_key("b")]
    assert log.item_row.tolist() == [1, 1, 2, 0, 2, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"impressions": sample.impressions(click=None)},
            "impressions: column 'click' is missing (label of task click); "
            "columns there: user_id, item_id, time, hour, buy",
        ),
        (
            {"impressions": sample.impressions(time=None)},
            "impressions: column 'time' is missing (keys.time); "
            "columns there: user_id, item_id, hour, click, buy",
        ),
        (
            {"impressions": sample.impressions(click=[1, 0, 2, 0, 0, 1])},
            "impressions: column 'click', row 2: got 2, expected a label 0 or 1",
        ),
        (
            {"impressions": sample.impressions(buy=[1, None, 0, 0, 0, 1])},
            "impressions: column 'buy', row 1: got nothing (null), expected a label 0 or 1",
        ),
        (
            {"impressions": sample.impressions(click=list("abcdef"))},
            "impressions: column 'click': got string, expected labels 0 or 1",
        ),
        (
            {"impressions": sample.impressions(time=[1.5] * 6)},
            "impressions: column 'time': got double, expected an integer or a timestamp",
        ),
        (
            {"impressions": sample.impressions(user_id=[1, None, 1, 1, 1, 1])},
            "impressions: column 'user_id', row 1: the key is missing; every row needs one",
        ),
        (
            {"items": sample.items(item_id=[30, 10, 30])},
            "items: column 'item_id': key 30 is in rows 0 and 2 (1 repeated rows in all); "
            "expected one row per item",
        ),
        (
            {"users": sample.users(user_id=[2, 2])},
            "users: column 'user_id': key 2 is in rows 0 and 1 (1 repeated rows in all); "
            "expected one row per user",
        ),
        (
            {"impressions": sample.impressions(item_id=[10, 10, 99, 30, 98, 30])},
            "impressions: 2 of 6 rows have an item that items lacks, the first in row 2: 99; add the items, "
            "or drop the rows with data.unknown_items: drop",
        ),
        (
            {"items": sample.items(item_id=["30", "10", "20"])},
            "items: column 'item_id': got string, but the schema's feature history has item keys of type "
            "int; set its type, or convert the column",
        ),
        (
            {"users": sample.users(user_id=["2", "1"])},
            "users: column 'user_id': got string keys, and int64 in impressions; expected one type",
        ),
        ({"unknown_items": "ignore"}, "data.unknown_items: got 'ignore', expected refuse or drop"),
        ({"impressions": sample.impressions().slice(0, 0)}, "impressions: no rows"),
        (
            {"impressions": sample.impressions(), "history_by": "session"},
            "impressions: column 'session' is missing (data.history_by); "
            "columns there: user_id, item_id, time, hour, click, buy",
        ),
    ],
)  # fmt: skip
def test_bad_tables_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(DataError) as error:
        check_tables(sample.tables(**changes))
    assert str(error.value) == message


def test_impressions_of_unknown_items_are_counted_and_dropped() -> None:
    log = check_tables(
        sample.tables(impressions=sample.impressions(item_id=[10, 10, 99, 30, 98, 30]), unknown_items="drop")
    )
    assert log.tables.notes == ("2 of 6 impressions dropped: their items are not in the items table",)
    assert log.user_key.tolist() == [1, 2, 1, 1]
    assert log.labels[:, 0].tolist() == [1, 1, 0, 1]
    with pytest.raises(DataError, match="not one of 6 rows has an item of items; got for example 7"):
        check_tables(sample.tables(impressions=sample.impressions(item_id=[7] * 6), unknown_items="drop"))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "age", pa.array([1.0, float("nan")]),
            "users: column 'age', row 1: got nan, expected finite numbers; leave missing values empty (null)",
        ),
        ("age", pa.array(["1", "2"]), "users: column 'age': got string, expected numbers (kind: dense)"),
        ("age", pa.array([[1.0], [1.0, 2.0]]), "users: column 'age', row 1: got 2 numbers, expected 1"),
        (
            "hour", pa.array(["1", "2"]),
            "users: column 'hour': got string, expected int keys (the schema says type: int)",
        ),
        (
            "hour", pa.array([23, 24]),
            "users: column 'hour', row 1: got 24, expected 0 to 23 (the schema says range: 24)",
        ),
        (
            "hour", pa.array([None, -1]),
            "users: column 'hour', row 1: got -1, expected 0 to 23 (the schema says range: 24)",
        ),
        (
            "topics", pa.array([["a"], ["b", None]]),
            "users: column 'topics', row 1: null inside a list; leave it out",
        ),
        (
            "topics", pa.array([[1], [2]]),
            "users: column 'topics': got int64, expected string keys (the schema says type: string)",
        ),
    ],
)  # fmt: skip
def test_bad_feature_columns_are_refused(name: str, values: pa.Array, message: str) -> None:
    with pytest.raises(DataError) as error:
        wire_rows(values, sample.schema().feature(name), "users")
    assert str(error.value) == message


def test_wire_rows_keep_the_first_of_a_set_and_the_last_of_a_sequence() -> None:
    schema = sample.schema()
    values = pa.array([[1, 2, 3], None, [], [4]])
    missing = int(KEY_MISSING)
    found = wire_rows(values, schema.feature("history"), "users")
    assert found.tolist() == [[2, 3], [missing, missing], [missing, missing], [4, missing]]
    texts = pa.array([["a", "b", "c"], None]).cast(pa.list_(pa.dictionary(pa.int32(), pa.string())))
    found = wire_rows(texts.cast(pa.list_(pa.string())), schema.feature("topics"), "items")
    assert found.tolist() == [[stable_key("a"), stable_key("b")], [missing, missing]]
    ages = wire_rows(pa.array([1, None], pa.int32()), schema.feature("age"), "users")
    assert ages.tolist() == [[1.0], [30.0]]


def test_timestamps_become_milliseconds() -> None:
    stamps = pa.array([0, 1, 2, 3, 4, 5], pa.timestamp("s"))
    log = check_tables(sample.tables(impressions=sample.impressions(time=stamps)))
    assert log.time.tolist() == [0, 1000, 2000, 3000, 4000, 5000]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    schema = sample.schema()
    with pytest.raises(DataError, match=r"items: no such file: .*absent\.parquet"):
        read_table(tmp_path / "absent.parquet", schema, "items")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"ending in '.txt', expected .parquet, .csv or .jsonl"):
        read_table(tmp_path / "a.txt", schema, "items")
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"items \(a.parquet\): cannot be read as parquet"):
        read_table(tmp_path / "a.parquet", schema, "items")
    with pytest.raises(DataError, match=r"data.items: missing; expected the path"):
        load_tables(schema, {"impressions": tmp_path / "a.parquet"})


def test_errors_name_the_file(tmp_path: Path) -> None:
    paths = write_csv(tmp_path, impressions="user_id,item_id,time,hour,click,buy\n1,10,5,3,7,0\n")
    with pytest.raises(DataError, match=r"impressions \(impressions.csv\): column 'click', row 0: got 7"):
        check_tables(load_tables(sample.schema(), paths))
    paths = write_csv(tmp_path, users="user_id,age\n1,NaN\n")
    section = {name: path.name for name, path in paths.items()}
    with pytest.raises(DataError, match=r"users \(users.csv\): column 'age', row 0: got nan"):
        load_dataset(sample.schema(), section, {}, tmp_path, seed=1)
    with pytest.raises(DataError, match=r"data.items: got 3, expected text"):
        load_dataset(sample.schema(), {"items": 3}, {}, tmp_path, seed=1)
    with pytest.raises(DataError, match=r"data.clicks: unknown key, expected adapter, or of impressions"):
        load_dataset(sample.schema(), {"clicks": "x"}, {}, tmp_path, seed=1)
