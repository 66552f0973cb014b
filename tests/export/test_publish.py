from __future__ import annotations

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from kill import few_code_files
from standin_world import standin_source

from export import publish as publishing
from export import vendor
from export.export_run import export_source
from export.exported import Exported
from export.pbtxt import ServingOptions
from export.publish import current_options, publish
from export.repository import locked, recover, snapshots, versions
from export.rollout import promote, rollback
from export.vendor import verify_code
from hsnn_core.bundle import Bundle
from hsnn_core.errors import FormatError, PublishError

MODELS = [
    "hsnn_index",
    "hsnn_item_tower",
    "hsnn_retrieve",
    "hsnn_scorer_l1",
    "hsnn_scorer_l2",
    "hsnn_scorer_l3",
    "hsnn_user_tower",
]

ROOT = Path(__file__).parents[2]
FLAT = ["hsnn_index", "hsnn_item_tower", "hsnn_retrieve", "hsnn_scorer_l1", "hsnn_user_tower"]


def tree(repository: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(repository)): path.read_bytes()
        for path in sorted(repository.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_first_snapshot(exported: Exported, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    assert publish(exported.path.parent, repository) == 1
    assert names(repository) == [".publish.lock", *MODELS]
    for model in MODELS:
        assert names(repository / model) == ["1", "config.pbtxt"]
    assert names(repository / "hsnn_scorer_l2" / "1") == ["model.onnx"]
    version = repository / "hsnn_retrieve" / "1"
    assert {"model.py", "hsnn_core", "manifest.json", "index.hsnn", "smoke.npz", "code.json"} <= set(
        names(version)
    )
    verify_code(version)
    index = repository / "hsnn_index" / "1"
    assert names(index) == ["code.json", "hsnn_core", "log_owner.py", "model.py", "schema.json", "updater.py"]
    verify_code(index)
    assert Bundle.open(version).manifest["models"]["scorers"] == MODELS[3:6]
    assert [snapshot.complete for snapshot in snapshots(repository)] == [True]


def test_versions_follow_each_other_and_are_never_changed(exported: Exported, tmp_path: Path) -> None:
    publish(exported.path, tmp_path)
    before = tree(tmp_path)
    assert publish(exported.path, tmp_path) == 2
    assert publish(exported.path, tmp_path, version=10) == 10
    assert publish(exported.path, tmp_path) == 11
    assert versions(tmp_path) == [1, 2, 10, 11]
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before
    with pytest.raises(PublishError, match="version 11 is not free, expected at least 12"):
        publish(exported.path, tmp_path, version=11)


def test_vendored_code_has_no_tests_or_caches_and_edits_are_noticed(
    exported: Exported, tmp_path: Path
) -> None:
    publish(exported.path, tmp_path)
    version = tmp_path / "hsnn_retrieve" / "1"
    recorded = json.loads((version / "code.json").read_text())
    assert {"model.py", "hsnn_core/search.py", "hsnn_core/__init__.py"} <= set(recorded)
    assert not [name for name in recorded if "test" in name or "__pycache__" in name]
    (version / "hsnn_core" / "search.py").write_text("# edited\n")
    with pytest.raises(
        FormatError, match=r"search\.py: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}; publish again"
    ):
        verify_code(version)


@pytest.mark.parametrize("model", ["hsnn_retrieve", "hsnn_index"])
def test_a_published_version_needs_nothing_but_itself_numpy_and_triton(
    model: str, exported: Exported, tmp_path: Path
) -> None:
    """So it loads in any Triton. Imports inside functions are for what only some ways of serving need."""
    publish(exported.path, tmp_path)
    version = tmp_path / model / "1"
    own = {path.stem for path in version.iterdir()}
    outside = set()
    for path in version.rglob("*.py"):
        tree = ast.parse(path.read_text())
        late = {
            node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.If) for node in ast.walk(f)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found = {str(node.module).partition(".")[0]}
            else:
                continue
            outside |= {(name, "late" if node in late else "at load") for name in found - own}
    foreign = {(name, when) for name, when in outside if name not in sys.stdlib_module_names}
    assert foreign == {
        ("numpy", "at load"),
        ("triton_python_backend_utils", "at load"),
        ("onnxruntime", "late"),  # mode in_process
        ("yaml", "late"),  # schema files, which no server reads
        ("cryptography", "late"),  # signatures, where the machine has trusted keys
    }


def test_options_stay_until_others_are_given(exported: Exported, tmp_path: Path) -> None:
    assert current_options(tmp_path) == ServingOptions()
    options = ServingOptions(mode="in_process", workers=3, keep=2, item_log="/data/items.db")
    publish(exported.path, tmp_path, options=options)
    publish(exported.path, tmp_path)
    assert current_options(tmp_path) == options
    config = tmp_path / "hsnn_user_tower" / "config.pbtxt"
    written = config.stat().st_mtime_ns
    publish(exported.path, tmp_path, options=dataclasses.replace(options, workers=5))
    assert current_options(tmp_path).workers == 5
    assert config.stat().st_mtime_ns == written  # unchanged, so Triton reloads nothing for it


def test_another_shape_needs_a_new_repository(exported: Exported, tmp_path: Path) -> None:
    flat = export_source(standin_source(layers=1), tmp_path / "flat", progress=False)
    repository = tmp_path / "repository"
    publish(exported.path, repository)
    before = tree(repository)
    with pytest.raises(
        PublishError, match=r"model hsnn_user_tower: output user_l2: FP32 \[24\] would become absent"
    ):
        publish(flat.path, repository)
    assert tree(repository) == before
    assert publish(flat.path, tmp_path / "generation2") == 1


def test_a_repository_from_before_item_updates_needs_a_new_generation(
    exported: Exported, tmp_path: Path
) -> None:
    """Its snapshots are served as they were."""
    publish(exported.path, tmp_path)
    manifest = tmp_path / "hsnn_retrieve" / "1" / "manifest.json"
    older = json.loads(manifest.read_text())
    del older["models"]["index"]
    manifest.write_text(json.dumps(older))
    shutil.rmtree(tmp_path / "hsnn_index")
    assert versions(tmp_path) == [1]
    server = FakeServer(tmp_path)
    assert promote(tmp_path, server) == 1
    assert "hsnn_index" not in server.loads
    with pytest.raises(PublishError, match="model hsnn_index is not there, .* into a new, empty repository"):
        publish(exported.path, tmp_path)


def test_an_export_from_before_item_updates_is_exported_again(tmp_path: Path) -> None:
    exported = export_source(standin_source(layers=1), tmp_path / "export", progress=False)
    manifest = exported.bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"index": "hsnn_index"', '"other": "hsnn_index"'))
    with pytest.raises(
        PublishError, match="names None for item updates, expected 'hsnn_index'; export the run again"
    ):
        publish(exported.path, tmp_path / "repository")


def test_a_changed_bundle_is_not_published(tmp_path: Path) -> None:
    exported = export_source(standin_source(layers=1), tmp_path / "export", progress=False)
    index = exported.bundle / "index.hsnn"
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"index\.hsnn: .*sha256"):
        publish(exported.path, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 9}, "format version 9, expected 1; export the run again"),
        ({"graphs": [{}]}, "edited or cut short"),
        ({"parity": [{"gates": 1}]}, "edited or cut short"),
    ],
)
def test_a_damaged_record_of_an_export(
    change: dict, message: str, exported: Exported, tmp_path: Path
) -> None:
    record = json.loads((exported.path / "export.json").read_text()) | change
    (tmp_path / "export.json").write_text(json.dumps(record))
    with pytest.raises(FormatError, match=f"export.json: {message}"):
        publish(tmp_path, tmp_path / "repository")


def test_in_process_needs_onnx_files(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = dataclasses.replace(exported, engine=publishing.open_export(exported.path).engine)
    plans = dataclasses.replace(plans, engine=dataclasses.replace(plans.engine, name="tensorrt-rtx"))
    monkeypatch.setattr(publishing, "open_export", lambda path: plans)
    with pytest.raises(PublishError, match=r"mode in_process runs ONNX files .* engine is tensorrt-rtx"):
        publish(exported.path, tmp_path, options=ServingOptions(mode="in_process"))


def test_no_space_publishes_nothing(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(exported.path, tmp_path)
    before = tree(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publishing, "vendor", full)
    with pytest.raises(PublishError, match="No space left on device; version 2 was not published"):
        publish(exported.path, tmp_path)
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_named(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(PublishError, match="file: .*File exists.*expected a folder to publish into"):
        publish(exported.path, tmp_path / "file")
    (tmp_path / "repository" / ".publish.lock").mkdir(parents=True)
    with pytest.raises(PublishError, match="repository: .*; expected a repository that can be written"):
        publish(exported.path, tmp_path / "repository")


def test_a_default_k_beyond_what_the_snapshot_allows(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="option k is 51, expected at most 50: the max_k of"):
        publish(exported.path, tmp_path, options=ServingOptions(k=51))
    assert versions(tmp_path) == []
    assert publish(exported.path, tmp_path, options=ServingOptions(k=50)) == 1


def test_one_publisher_at_a_time(exported: Exported, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(PublishError, match="another publish or rollback is at work there"):
        publish(exported.path, tmp_path)
    assert publish(exported.path, tmp_path) == 1


def test_foreign_models_are_left_alone(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "other" / "1").mkdir(parents=True)
    (tmp_path / "other" / "config.pbtxt").write_text("name: 'other'")
    publish(exported.path, tmp_path)
    recover(tmp_path)
    assert names(tmp_path / "other") == ["1", "config.pbtxt"]


class FakeServer:
    """Records loads; serves the newest complete version that lies in the repository when loaded, and runs
    its ONNX files. ``shift``: what every network adds to what it should answer."""

    def __init__(self, repository: Path, fails: str = "", unready: str = "", shift: float = 0.0) -> None:
        self.repository, self.fails, self.unready, self.shift = repository, fails, unready, shift
        self.loads: list[str] = []
        self.ran: list[str] = []

    def load(self, model: str) -> None:
        self.loads.append(model)
        if model == self.fails:
            raise RuntimeError("out of memory")

    def ready(self, model: str, version: int | None = None) -> bool:
        return model != self.unready and (self.repository / model / str(version)).is_dir()

    def states(self, model: str) -> dict[int, str]:
        return {}

    def calls_of(self, version: int) -> dict[str, int]:
        return {}

    def infer(self, model: str, version: int, inputs: dict, outputs: list) -> list:
        self.ran.append(model)
        session = onnxruntime.InferenceSession(self.repository / model / str(version) / "model.onnx")
        return [value + self.shift for value in session.run(outputs, dict(inputs))]


ORDER = [
    "hsnn_user_tower",
    "hsnn_item_tower",
    "hsnn_scorer_l1",
    "hsnn_scorer_l2",
    "hsnn_scorer_l3",
    "hsnn_index",
    "hsnn_retrieve",
]


def test_promoting_loads_the_orchestrator_last(exported: Exported, tmp_path: Path) -> None:
    publish(exported.path, tmp_path)
    publish(exported.path, tmp_path)
    server = FakeServer(tmp_path)
    assert promote(tmp_path, server) == 2
    assert server.loads == ORDER
    assert server.ran == ["hsnn_user_tower", *ORDER[2:5]]


def test_networks_that_answer_otherwise_than_at_export_do_not_go_live(
    exported: Exported, tmp_path: Path
) -> None:
    publish(exported.path, tmp_path)
    for shift, text in ((0.05, "probabilities differ by up to"), (np.nan, "scores that are not finite")):
        server = FakeServer(tmp_path, shift=shift)
        with pytest.raises(PublishError, match="snapshot 1: its networks do not answer the smoke") as refusal:
            promote(tmp_path, server)
        assert text in str(refusal.value)
        assert "goes on with what it served" in str(refusal.value)
        assert server.loads == ORDER[:-1]


def test_code_that_was_edited_does_not_go_live(exported: Exported, tmp_path: Path) -> None:
    publish(exported.path, tmp_path)
    for model in ("hsnn_index", "hsnn_retrieve"):
        code = tmp_path / model / "1" / "model.py"
        published = code.read_text()
        code.write_text("# edited")
        server = FakeServer(tmp_path)
        with pytest.raises(PublishError, match=r"model\.py: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
            promote(tmp_path, server)
        assert "hsnn_retrieve" not in server.loads
        code.write_text(published)


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"fails": "hsnn_scorer_l2"}, "snapshot 1: the server did not load hsnn_scorer_l2: out of memory"),
        ({"unready": "hsnn_scorer_l2"}, "hsnn_scorer_l2: version 1 is not ready"),
    ],
)
def test_a_failed_load_stops_the_promotion(
    server: dict, message: str, exported: Exported, tmp_path: Path
) -> None:
    publish(exported.path, tmp_path)
    fake = FakeServer(tmp_path, **server)
    with pytest.raises(PublishError, match=message):
        promote(tmp_path, fake)
    assert fake.loads == ORDER[:4]
    with pytest.raises(PublishError, match="no complete snapshot there; publish one first"):
        promote(tmp_path / "nothing", fake)


def test_rolling_back_goes_the_other_way_and_keeps_the_files(exported: Exported, tmp_path: Path) -> None:
    for _ in range(2):
        publish(exported.path, tmp_path)
    server = FakeServer(tmp_path)
    assert rollback(tmp_path, server) == 1
    assert server.loads == ORDER[::-1]
    assert versions(tmp_path) == [1]
    for model in MODELS:
        assert names(tmp_path / model / ".retired") == ["2"]
    with pytest.raises(PublishError, match=r"complete snapshots \[1\], expected at least two"):
        rollback(tmp_path, server)
    assert publish(exported.path, tmp_path) == 3  # 2 is not used again
    assert rollback(tmp_path) == 1


def test_a_rollback_that_the_server_refuses_is_undone(exported: Exported, tmp_path: Path) -> None:
    for _ in range(2):
        publish(exported.path, tmp_path)
    with pytest.raises(PublishError, match="did not load hsnn_retrieve: out of memory; snapshot 2 stays"):
        rollback(tmp_path, FakeServer(tmp_path, fails="hsnn_retrieve"))
    assert versions(tmp_path) == [1, 2]
    with pytest.raises(PublishError, match="snapshot 1 serves, hsnn_scorer_l1 needs to be loaded again"):
        rollback(tmp_path, FakeServer(tmp_path, fails="hsnn_scorer_l1"))
    assert versions(tmp_path) == [1]
    assert publish(exported.path, tmp_path) == 3


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An export of few files, to be published many times."""
    return export_source(standin_source(layers=1), tmp_path_factory.mktemp("flat") / "export", progress=False)


@pytest.fixture
def _little_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(vendor, "code_files", few_code_files)


def killed_at_every_step(
    task: str, exported: Exported, snapshots: int, folder: Path
) -> tuple[Path, list[Path]]:
    """A repository of some snapshots, and its copies after a process died at each of its changes to the
    disk."""
    template, out = folder / "template", folder / "out"
    template.mkdir()
    for _ in range(snapshots):
        publish(exported.path, template)
    subprocess.run(
        [sys.executable, Path(__file__).parent / "kill.py", task, exported.path, template, out],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    copies = [out / str(step) for step in range(len(list(out.iterdir())))]
    return template, copies[:-1]


@pytest.mark.usefixtures("_little_to_write")
@pytest.mark.parametrize("earlier", [0, 1])
def test_a_publish_killed_at_any_step_leaves_what_was_served(
    earlier: int, flat: Exported, tmp_path: Path
) -> None:
    template, repositories = killed_at_every_step("publish", flat, earlier, tmp_path)
    before = tree(template)
    outcomes = []
    for repository in repositories:
        served = versions(repository)
        outcomes.append(len(served))
        after = tree(repository)
        assert {name: after.get(name) for name in before} == before
        # The next publish clears up, takes a number of its own and is whole.
        number = publish(flat.path, repository)
        assert number > max([0, *served])
        assert versions(repository) == [*served, number]
        kept = sorted(map(str, [*served, number]))
        for model in FLAT:
            assert names(repository / model) == [*kept, "config.pbtxt"]
        for version in versions(repository):
            Bundle.open(repository / "hsnn_retrieve" / str(version))
    # Nothing new up to the commit, everything from there.
    assert len(outcomes) > 60
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {earlier, earlier + 1}


@pytest.mark.usefixtures("_little_to_write")
def test_a_rollback_killed_at_any_step_serves_one_of_the_two(flat: Exported, tmp_path: Path) -> None:
    _, repositories = killed_at_every_step("rollback", flat, 2, tmp_path)
    outcomes = []
    for repository in repositories:
        outcomes.append(versions(repository))
        assert publish(flat.path, repository) == 3
        assert versions(repository) == [*outcomes[-1], 3]
    assert outcomes[0] == [1, 2]
    assert outcomes[-1] == [1]
    assert all(served in ([1], [1, 2]) for served in outcomes)
