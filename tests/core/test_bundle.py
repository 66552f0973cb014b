from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from core_fakes import assert_same_result, small_world, write_small_bundle

from hsnn_core import bundle as bundle_module
from hsnn_core.bundle import Bundle
from hsnn_core.errors import FormatError, PublishError, SchemaMismatch
from hsnn_core.item_attributes import ItemAttributes
from hsnn_core.manifest import read_manifest
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import search

GOLDEN = Path(__file__).parent / "golden" / "bundle_v1"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundle") / "bundle"
    world = small_world()
    return world, directory, write_small_bundle(directory, world)


@pytest.fixture
def copied(written, tmp_path):
    """A bundle to damage."""
    return Path(shutil.copytree(written[1], tmp_path / "copy"))


def edit_manifest(directory: Path, **changes) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(directory: Path, verify: bool = True) -> str:
    with pytest.raises(FormatError) as caught:
        Bundle.open(directory, verify=verify)
    return str(caught.value)


def test_round_trip(written):
    world, directory, manifest = written
    bundle = Bundle.open(directory)
    corpus = world.corpus()
    assert bundle.manifest == manifest
    assert bundle.schema.to_json() == world.schema.to_json()
    for name, array in corpus.index.to_arrays().items():
        np.testing.assert_array_equal(bundle.index.to_arrays()[name], array)
    for ours, theirs in zip(bundle.embeddings + bundle.codebooks, corpus.embeddings + corpus.codebooks):
        np.testing.assert_array_equal(ours, theirs)
        assert not ours.flags.writeable
    assert (len(bundle.embeddings), len(bundle.codebooks)) == (3, 2)

    users = bundle.transform.encode_users(world.user_raw)
    np.testing.assert_array_equal(users.ids, world.transform.encode_users(world.user_raw).ids)
    rank = np.array([1.0, 0.5])
    plain = LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, world.runner)
    assert_same_result(
        search(bundle.index, bundle.scorer(world.runner), users, [2, 3], 5, rank),
        search(corpus.index, plain, users, [2, 3], 5, rank),
    )


def test_scorer_has_the_buckets_of_the_manifest(written):
    world, directory, _ = written
    bundle = Bundle.open(directory)
    world.runner.calls.clear()
    users = bundle.transform.encode_users(world.user_raw)
    search(bundle.index, bundle.scorer(world.runner), users, [2, 3], 5, np.array([1.0, 0.5]))
    first, second, _ = (inputs["item"].shape[1] for _, inputs in world.runner.calls)
    assert first == 4
    assert second in (8, 16)


def test_manifest_says_what_the_snapshot_is(written):
    world, directory, manifest = written
    assert read_manifest(directory) == manifest
    index = world.corpus().index
    expected = {
        "format": "hsnn-bundle",
        "format_version": 1,
        "schema_hash": world.schema.hash,
        "tasks": ["click", "buy"],
        "layers": 3,
        "nodes": [index.nodes(1), index.nodes(2), 30],
        "widths": [2, 3],
        "k": 5,
        "max_k": 20,
        "buckets": [[4], [8, 16], []],
        "embedding_widths": [5, 6, 7],
        "engine": "onnxruntime",
    }
    assert {name: manifest[name] for name in expected} == expected
    assert manifest["models"]["scorers"] == ["hsnn_scorer_l1", "hsnn_scorer_l2", "hsnn_scorer_l3"]
    assert set(manifest["files"]) == {"schema.json", "transform.hsnn", "index.hsnn", "smoke.npz"}
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == (directory / name).stat().st_size


def test_smoke_request_replays(written):
    world, directory, _ = written
    bundle = Bundle.open(directory)
    smoke = bundle.smoke()
    assert set(smoke.users) == {"age", "country", "history"}
    users = bundle.transform.encode_users(smoke.users)
    result = search(bundle.index, bundle.scorer(world.runner), users, [2, 3], 5, np.array([1.0, 0.5]))
    np.testing.assert_array_equal(result.item_ids, smoke.item_ids)
    np.testing.assert_array_equal(result.probabilities, smoke.probabilities)


def test_the_first_format_version_stays_readable():
    """tests/core/golden/bundle_v1 was written by `write_small_bundle` at format version 1, when widths were exact."""
    bundle = Bundle.open(GOLDEN)
    assert bundle.manifest["format_version"] == 1
    smoke = bundle.smoke()
    users = bundle.transform.encode_users(smoke.users)
    scorer = bundle.scorer(small_world().runner)
    result = search(
        bundle.index, scorer, users, bundle.manifest["widths"], 5, np.array([1.0, 0.5]), adapt=False
    )
    np.testing.assert_array_equal(result.item_ids, smoke.item_ids)
    np.testing.assert_allclose(result.probabilities, smoke.probabilities, atol=1e-5)


def test_bundle_without_interactions(tmp_path):
    world = small_world(interactions=False)
    write_small_bundle(tmp_path / "bundle", world)
    assert Bundle.open(tmp_path / "bundle").i2if is None


def test_files_that_the_manifest_does_not_list_are_left_alone(copied):
    (copied / "model.py").write_text("pass\n")
    assert Bundle.open(copied).index.items == 30


@pytest.mark.parametrize("name", ["schema.json", "transform.hsnn", "index.hsnn", "smoke.npz"])
def test_a_missing_file(copied, name):
    entry = read_manifest(copied)["files"][name]
    (copied / name).unlink()
    assert refusal(copied) == refusal(copied, verify=False)
    assert refusal(copied) == (
        f"{copied / name}: missing, expected {entry['bytes']} bytes with sha256 {entry['sha256']}; "
        "copy the whole directory again"
    )


@pytest.mark.parametrize("name", ["schema.json", "transform.hsnn", "index.hsnn", "smoke.npz"])
def test_an_edited_file_names_both_hashes(copied, name):
    entry = read_manifest(copied)["files"][name]
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    digest = bundle_module._fingerprint(copied / name)["sha256"]
    assert refusal(copied) == (
        f"{copied / name}: {entry['bytes']} bytes with sha256 {digest}, expected {entry['bytes']} bytes with "
        f"sha256 {entry['sha256']}; the file was edited or cut short, copy the directory again"
    )


@pytest.mark.parametrize("name", ["schema.json", "transform.hsnn", "index.hsnn", "smoke.npz"])
def test_a_file_cut_short(copied, name):
    entry = read_manifest(copied)["files"][name]
    (copied / name).write_bytes((copied / name).read_bytes()[:100])
    digest = bundle_module._fingerprint(copied / name)["sha256"]
    assert refusal(copied) == (
        f"{copied / name}: 100 bytes with sha256 {digest}, expected {entry['bytes']} bytes with "
        f"sha256 {entry['sha256']}; the file was edited or cut short, copy the directory again"
    )
    assert refusal(copied, verify=False) == (
        f"{copied / name}: 100 bytes, expected {entry['bytes']}; the file was edited or cut short, "
        "copy the directory again"
    )


def test_no_manifest(tmp_path):
    assert refusal(tmp_path) == (
        f"{tmp_path}/manifest.json: missing, expected the manifest of a bundle; is this a bundle's directory?"
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": "zip"}, "format 'zip', expected 'hsnn-bundle'"),
        (
            {"format_version": 2},
            "format version 2, expected 1; export the snapshot again with this release",
        ),
        (
            {"files": {}},
            "files.schema.json, files.transform.hsnn, files.index.hsnn, files.smoke.npz missing; export ",
        ),
    ],
)
def test_a_manifest_of_something_else(copied, changes, text):
    edit_manifest(copied, **changes)
    assert refusal(copied).startswith(f"{copied}/manifest.json: {text}")


def test_a_manifest_cut_short_or_without_a_field(copied):
    text = (copied / "manifest.json").read_text()
    manifest = json.loads(text)
    del manifest["max_k"], manifest["engine"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert refusal(copied) == f"{copied}/manifest.json: max_k, engine missing; export the snapshot again"
    (copied / "manifest.json").write_text(text[:200])
    assert refusal(copied).startswith(f"{copied}/manifest.json: not valid JSON (")
    (copied / "manifest.json").write_text("[1]")
    assert refusal(copied) == f"{copied}/manifest.json: format None, expected 'hsnn-bundle'"


def test_a_manifest_of_another_snapshot(copied, written):
    schema_hash, nodes = written[2]["schema_hash"], written[2]["nodes"]
    edit_manifest(copied, nodes=[1, 2, 3])
    assert refusal(copied) == (
        f"{copied}/index.hsnn: nodes per layer {nodes}, the manifest says [1, 2, 3]; "
        "the directory mixes two snapshots, export again"
    )
    edit_manifest(copied, schema_hash="0123456789abcdef")
    with pytest.raises(SchemaMismatch) as caught:
        Bundle.open(copied)
    assert str(caught.value) == (
        f"{copied}: schema.json has hash {schema_hash}, the manifest says 0123456789abcdef; "
        "the directory mixes two snapshots, export again"
    )


def test_a_bundle_is_never_overwritten(written):
    world, directory, manifest = written
    with pytest.raises(PublishError) as caught:
        write_small_bundle(directory, world)
    assert str(caught.value) == (
        f"{directory}: exists already; a bundle is never overwritten, remove it or write elsewhere"
    )
    assert read_manifest(directory) == manifest


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"widths": [2]}, "1 widths, expected 2 for an index of 3 layers"),
        ({"buckets": [[]]}, "1 buckets, expected 3 for an index of 3 layers"),
        ({"models": {"scorers": []}}, "0 scorers in models, expected 3 for an index of 3 layers"),
        ({"k": 30}, "k 30 and max_k 20, expected 1 <= k <= max_k"),
    ],
)
def test_settings_that_do_not_fit_write_nothing(tmp_path, monkeypatch, changes, text):
    real = bundle_module.write_bundle
    monkeypatch.setattr("core_fakes.write_bundle", lambda *args, **named: real(*args, **named | changes))
    with pytest.raises(PublishError) as caught:
        write_small_bundle(tmp_path / "bundle", small_world())
    assert str(caught.value) == f"{tmp_path}/bundle: {text}"
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(path, data):
        if path.name == "manifest.json":
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(bundle_module, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_small_bundle(tmp_path / "bundle", small_world())
    assert list(tmp_path.iterdir()) == []


def test_attributes_lie_in_the_index_by_position(tmp_path):
    world = small_world(eligibility={"shop": {"kind": "key"}, "paused": {"kind": "flag"}}, bid="bid")
    rows = [{"shop": int(key)} for key in world.item_keys]
    attributes = ItemAttributes.from_rows(world.schema, rows, np.arange(1, 31))
    settings = {
        "smoke": bundle_module.Smoke({}, np.zeros((0, 5), np.int64), np.zeros((0, 5, 2), np.float32)),
        "widths": [2, 3], "k": 5, "max_k": 20, "buckets": [[], [], []], "engine": "onnxruntime",
        "models": {"user_tower": "hsnn_u", "item_tower": "hsnn_i", "scorers": ["hsnn_a", "hsnn_b", "hsnn_c"]},
    }  # fmt: skip
    bare = world.corpus()
    with pytest.raises(
        PublishError, match="the schema declares eligibility or a bid, the corpus has no attributes"
    ):
        bundle_module.write_bundle(tmp_path / "b", world.schema, world.transform, bare, **settings)
    corpus = bare.with_attributes(attributes)
    bundle_module.write_bundle(tmp_path / "b", world.schema, world.transform, corpus, **settings)
    opened = Bundle.open(tmp_path / "b")
    np.testing.assert_array_equal(opened.attributes.keys["shop"], opened.index.item_ids)
    np.testing.assert_array_equal(opened.attributes.bids, 1 + corpus.index.row_of_position)
    assert bare.with_attributes(None) is bare
