"""A model repository of hsnn_index alone, for items of the tiny snapshot's schema with some eligibility."""

from __future__ import annotations

from pathlib import Path

from tiny_snapshot import SCHEMA

from export.pbtxt import INDEX, ServingOptions, index_config, to_text
from export.vendor import INDEX_SOURCES, vendor
from hsnn_core.schema import Schema

ELIGIBLE = Schema.from_dict(
    SCHEMA
    | {
        "eligibility": {
            "country": {"kind": "set", "type": "string", "max": 3},
            "running": {"kind": "range", "from": "start_time", "until": "end_time", "default": "now"},
            "paused": {"kind": "flag"},
        },
        "bid": "bid",
    }
)


def write_index(root: Path, version: int, schema: Schema = ELIGIBLE, item_log: str = ".items/log.db") -> Path:
    """One version, as publishing lays it out; the configuration keeps three. Returns its directory."""
    directory = root / INDEX / str(version)
    directory.mkdir(parents=True)
    vendor(directory, INDEX_SOURCES)
    (directory / "schema.json").write_text(schema.to_json())
    config = index_config(schema, ServingOptions(keep=2, item_log=item_log))
    (root / INDEX / "config.pbtxt").write_text(to_text(config))
    return directory
