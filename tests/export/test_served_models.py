"""Models of every depth and schema on the real Triton, and the smoke request as the gate before they go live."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from standin_world import SCHEMA, standin_source
from untrained import FLAT, TWO_TOWER, untrained_run

from clients.items import ItemClient
from clients.retrieval import RetrievalClient
from export.export_run import export_run, export_source
from export.publish import publish
from export.rollout import promote, rollback
from export.sample_users import sample_users
from hsnn_cli.pipeline import ask, check_against_offline
from hsnn_core.errors import PublishError, ServerError
from hsnn_core.schema import Schema
from hsnn_server.triton import TritonServer
from hsnn_train.checkpoint import load_run

pytestmark = pytest.mark.triton


def less(users: list[str], items: list[str]) -> Schema:
    """SCHEMA with some of its features and no interactions."""
    raw = SCHEMA.to_dict() | {"interactions": {}}
    kept = {"user": users, "item": items}
    features = {
        owner: {name: raw["features"][owner][name] for name in names} for owner, names in kept.items()
    }
    return Schema.from_dict(raw | {"features": features})


NO_CROSSINGS = less(["age", "taste", "history", "country"], ["item", "category", "price"])
IDS_ALONE = less(["history"], ["item"])
NUMBERS_OF_USERS = less(["age", "taste"], ["item", "price"])
TWO_LAYERS = {"layers": ["cpu_m", "cpu_s"], "index": "joint", "codebooks": [6]}
DOT_ABOVE = {"layers": ["two_tower_xs", "cpu_s"], "index": "joint", "codebooks": [6]}
FOUR_LAYERS = {"layers": ["cpu_s"] * 4, "index": "joint", "codebooks": [4, 3, 2]}


@pytest.mark.parametrize(
    ("model", "schema"),
    [
        pytest.param(TWO_TOWER, NO_CROSSINGS, id="one two-tower layer, no interactions"),
        pytest.param(FLAT, NUMBERS_OF_USERS, id="one layer, users without ids"),
        pytest.param(TWO_LAYERS, IDS_ALONE, id="two layers, ids alone"),
        pytest.param(DOT_ABOVE, SCHEMA, id="a two-tower layer above a small one"),
        pytest.param(FOUR_LAYERS, SCHEMA, id="four layers"),
    ],
)
def test_any_depth_and_schema_is_served_as_searched(
    model: dict[str, Any], schema: Schema, tmp_path: Path
) -> None:
    untrained_run(tmp_path / "run", model, schema)
    export_run(tmp_path / "run", progress=False)
    repository = tmp_path / "repository"
    publish(tmp_path / "run", repository)
    transform = load_run(tmp_path / "run").transform
    wire = sample_users(schema, transform, 20, seed=3)
    with TritonServer(repository) as server:
        assert promote(repository, server.admin) == 1
        with RetrievalClient(server.urls.grpc, timeout=20) as client:
            assert len(client.connect().widths) == len(model["layers"]) - 1
            served = ask(client, wire, k=10)
    report = check_against_offline(tmp_path / "run", transform.encode_users(wire), served, 10)
    assert report["users"] == 20
    assert report["mismatched"] == 0
    assert report["largest_score_difference"] < 1e-5
    assert report["full_width_equals_exhaustive"] == "20 of 20"


def test_networks_that_fail_the_smoke_request_never_go_live(tmp_path: Path) -> None:
    """A file that is changed after its publishing, in a way that every other check lets through."""
    repository = tmp_path / "repository"
    ours = export_source(standin_source(), tmp_path / "ours", progress=False)
    other = export_source(standin_source(seed=9), tmp_path / "other", progress=False)
    publish(ours.path, repository)
    with (
        TritonServer(repository) as server,
        RetrievalClient(server.urls.grpc, timeout=20) as client,
    ):
        promote(repository, server.admin)
        with ItemClient(server.urls.grpc) as items:
            assert items.delete([5]).status == ["applied"]
        assert (repository / ".items" / "log.db").is_file()
        before = client.retrieve([{"age": 30.0}])
        assert publish(ours.path, repository) == 2
        shutil.copy(other.path / "scorer_l2.onnx", repository / "hsnn_scorer_l2" / "2" / "model.onnx")
        with pytest.raises(PublishError, match="snapshot 2: its networks do not answer the smoke request"):
            promote(repository, server.admin)
        assert server.admin.versions("hsnn_retrieve") == [1]
        assert server.admin.versions("hsnn_index") == [1, 2]  # updates are taken all through
        with pytest.raises(ServerError, match="can't run hsnn_user_tower version 9: .*version 9"):
            server.admin.infer("hsnn_user_tower", 9, {"user_ids": np.zeros((1, 5), np.int32)}, ["user_l1"])
        after = client.retrieve([{"age": 30.0}])
        assert (after, after.version) == (before, "1")
        assert rollback(repository, server.admin) == 1
        assert publish(ours.path, repository) == 3
        assert promote(repository, server.admin) == 3
        assert client.retrieve([{"age": 30.0}]).version == "3"
