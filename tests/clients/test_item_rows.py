"""Rows of item tables -> updates, and the files that they come in."""

from __future__ import annotations

import io
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from clients.item_rows import ItemRows
from hsnn_cli.item_files import ItemFile
from hsnn_core.errors import DataError
from hsnn_core.item_updates import parse_update
from hsnn_core.schema import Schema

SCHEMA = Schema.from_dict(
    {
        "name": "shop",
        "keys": {"user": "user_id", "item": "sku"},
        "tasks": [{"name": "click"}],
        "features": {
            "user": {"history": {"kind": "sequence", "of": "item", "length": 5}},
            "item": {
                "item": {"kind": "sparse", "of": "item"},
                "category": {"kind": "sparse", "vocab": 10, "max": 3},
                "brand": {"kind": "sparse", "hash": 10, "type": "string"},
                "price": {"kind": "dense"},
                "shape": {"kind": "dense", "dim": 2},
            },
        },
        "eligibility": {
            "country": {"kind": "set", "type": "string", "max": 3},
            "running": {"kind": "range", "from": "start_time", "until": "end_time"},
            "paused": {"kind": "flag"},
            "advertiser": {"kind": "key", "type": "int"},
        },
        "bid": "bid",
    }
)
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
TABLE: list[dict[str, Any]] = [
    {"sku": 17, "category": [4, 2], "brand": "a|b", "price": 2.5, "shape": [1.0, 2.0], "country": ["IT", "DE"],
     "start_time": START.timestamp(), "end_time": None, "paused": False, "advertiser": 5, "bid": 0.7,
     "sequence": 9, "deleted": None, "title": "a shoe"},
    {"sku": 18, "category": None, "brand": None, "price": None, "shape": None, "country": None, "start_time": None,
     "end_time": None, "paused": True, "advertiser": None, "bid": None, "sequence": None, "deleted": None,
     "title": None},
    {"sku": 19, "category": [1], "brand": "c", "price": 1.0, "shape": [0.0, 1.0], "country": ["IT"],
     "start_time": None, "end_time": 9.0, "paused": None, "advertiser": 1, "bid": 1.0, "sequence": 3,
     "deleted": True, "title": "gone"},
]  # fmt: skip
UPDATES = [
    {
        "id": 17,
        "sequence": 9,
        "features": {"category": [4, 2], "brand": "a|b", "price": 2.5, "shape": [1.0, 2.0]},
        "eligibility": {
            "country": ["IT", "DE"],
            "running": [START.timestamp(), None],
            "paused": False,
            "advertiser": 5,
        },
        "bid": 0.7,
    },
    {"id": 18, "features": {}, "eligibility": {"paused": True}},
    {"id": 19, "sequence": 3, "deleted": True},
]


def csv_text(rows: list[dict[str, Any]]) -> str:
    def field(value: Any) -> str:
        if isinstance(value, list):
            return "|".join(map(str, value))
        return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    return "\n".join([",".join(rows[0]), *(",".join(map(field, row.values())) for row in rows)]) + "\n"


def write(path: Path, rows: list[dict[str, Any]] = TABLE) -> Path:
    if path.suffix == ".parquet":
        table = pa.Table.from_pylist(rows)
        seconds = pa.array([None if t is None else int(t * 1e6) for t in table["start_time"].to_pylist()])
        times = seconds.cast(pa.timestamp("us"))  # a table may have times where another has seconds
        table = table.set_column(table.column_names.index("start_time"), "start_time", times)
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        path.write_text(csv_text(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(name: str | Path, kind: str | None = None) -> list[Any]:
    with ItemFile(str(name), SCHEMA, kind) as file:
        return list(file.updates())


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_table_means_the_same_in_every_format(ending: str, tmp_path: Path) -> None:
    with ItemFile(str(write(tmp_path / f"items.{ending}")), SCHEMA) as file:
        assert list(file.updates()) == UPDATES
        assert file.unused == {"title"}
        assert file.read == file.total
    for update in UPDATES:
        parse_update(SCHEMA, json.dumps({"sequence": 1} | update))


def test_json_lines_may_be_updates_themselves(tmp_path: Path) -> None:
    path = tmp_path / "updates.jsonl"
    lines = [*(json.dumps(update) for update in UPDATES), "", "{not json", "[1]"]
    path.write_text("\n".join(lines))
    assert read(path) == [*UPDATES, "{not json", [1]]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_standard_input(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / f"items.{kind}").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read("-", None if kind == "jsonl" else kind) == UPDATES


def test_text_that_is_not_of_its_type_is_left_to_the_server() -> None:
    rows = ItemRows(SCHEMA)
    typed = rows.typed(
        {"sku": "x", "price": "cheap", "category": "1|y", "paused": "perhaps", "advertiser": "z"}
    )
    update = rows.update(typed)
    assert update == {
        "id": "x",
        "features": {"category": [1, "y"], "price": "cheap"},
        "eligibility": {"paused": "perhaps", "advertiser": "z"},
    }


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    for name, text in (
        (
            "gone.csv",
            "gone.csv: No such file or directory; expected a file of items, or - for standard input",
        ),
        ("items.xls", r"ends in '.xls', expected .parquet, .csv or .jsonl; or say --format"),
    ):
        with pytest.raises(DataError, match=text):
            read(tmp_path / name)
    missing = r"short\.{}: no column category, shape, got .*price.*; an upsert replaces all that is known of an item"
    for ending in ("csv", "parquet"):
        rows = [{name: v for name, v in row.items() if name not in ("shape", "category")} for row in TABLE]
        with pytest.raises(DataError, match=missing.format(ending)):
            read(write(tmp_path / f"short.{ending}", rows))
    (tmp_path / "ragged.csv").write_text(csv_text(TABLE) + "1,2\n")
    with pytest.raises(DataError, match=r"ragged\.csv, line 5: "):
        read(tmp_path / "ragged.csv")
    (tmp_path / "latin.csv").write_bytes(csv_text(TABLE).replace("a shoe", "Schuh für").encode("latin1"))
    with pytest.raises(DataError, match=r"latin\.csv, line 2: not UTF-8"):
        read(tmp_path / "latin.csv")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read as Parquet"):
        read(tmp_path / "bad.parquet")
