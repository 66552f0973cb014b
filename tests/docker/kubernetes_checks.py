"""What can be said of Kubernetes objects without a cluster."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from docker_checks import ROOT

KUBERNETES = ROOT / "docker" / "kubernetes"
# Of the operators that these belong to; a plain cluster does not know them.
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ServingRuntime", "InferenceService"}
# Made by the operator of the cluster, as the comments say: secrets, and the volume that training writes.
GIVEN = {"hsnn-admin", "hsnn-tls", "hsnn-runs"}

Object = dict[str, Any]


def rendered(kubectl: str, folder: Path) -> list[Object]:
    """The objects of a kustomization."""
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [value for value in yaml.safe_load_all(done.stdout) if value]


def pod_of(value: Object) -> Object | None:
    """The pod that an object makes: its spec, and its labels as ``labels``."""
    if value["kind"] == "ServingRuntime":
        return {**value["spec"], "labels": {}}
    template = value.get("spec", {}).get("template")
    if template is None:
        return None
    return {**template["spec"], "labels": template.get("metadata", {}).get("labels", {})}


def containers(objects: Sequence[Object]) -> Iterator[tuple[Object, Object, Object]]:
    """(object, pod, container) of all that run."""
    for value in objects:
        pod = pod_of(value)
        for container in [] if pod is None else pod["containers"]:
            yield value, pod or {}, container


def named(value: Object) -> str:
    return f"{value['kind']}/{value['metadata']['name']}"


def lock_complaints(objects: Sequence[Object]) -> list[str]:
    """Containers that may do more than they must (the restricted pod security standard, and a read-only root), or whose
    use of the node has no bound."""
    complaints = []
    for value, pod, container in containers(objects):
        name = f"{named(value)} {container['name']}"
        security = {**pod.get("securityContext", {}), **container.get("securityContext", {})}
        wanted = {
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        complaints += [
            f"{name}: {key} is not {want}" for key, want in wanted.items() if security.get(key) != want
        ]
        if not isinstance(security.get("runAsUser"), int) or security["runAsUser"] == 0:
            complaints.append(f"{name}: runs as an unknown user")
        resources = container.get("resources", {})
        if not {"cpu", "memory"} <= set(resources.get("requests", {})) or "memory" not in resources.get(
            "limits", {}
        ):
            complaints.append(f"{name}: requests of cpu and memory, and a limit of memory, are not all there")
        complaints += [
            f"{name}: volume {v['name']} is the node's" for v in pod.get("volumes", []) if "hostPath" in v
        ]
        if value["kind"] != "ServingRuntime" and pod.get("automountServiceAccountToken") is not False:
            complaints.append(f"{name}: has a token of the cluster")
    return complaints


def selects(selector: Object, labels: Object) -> bool:
    """Whether a label selector matches, for what these files use."""
    if any(labels.get(key) != want for key, want in selector.get("matchLabels", {}).items()):
        return False
    return all(
        labels.get(e["key"]) in e["values"] if e["operator"] == "In" else e["key"] in labels
        for e in selector.get("matchExpressions", [])
    )


def reference_complaints(objects: Sequence[Object]) -> list[str]:
    """Names that lead nowhere: volumes, claims, secrets, services, scale targets, ports, selectors."""
    complaints = []
    names = {
        kind: {v["metadata"]["name"] for v in objects if v["kind"] == kind}
        for kind in {v["kind"] for v in objects}
    }
    pods = [pod for value in objects if (pod := pod_of(value)) is not None]
    for value in objects:
        spec, name = value.get("spec", {}), named(value)
        pod = pod_of(value)
        if pod is not None:
            volumes = {v["name"]: v for v in [*pod.get("volumes", [])]}
            claimed = {c["metadata"]["name"] for c in spec.get("volumeClaimTemplates", [])}
            for container in pod["containers"]:
                used = {mount["name"] for mount in container.get("volumeMounts", [])}
                complaints += [f"{name}: no volume {v}" for v in sorted(used - set(volumes) - claimed)]
            for volume in volumes.values():
                for key, field, kind in (
                    ("persistentVolumeClaim", "claimName", "PersistentVolumeClaim"),
                    ("secret", "secretName", "Secret"),
                    ("configMap", "name", "ConfigMap"),
                ):
                    if key in volume and volume[key][field] not in names.get(kind, set()) | GIVEN:
                        complaints.append(f"{name}: no {kind} {volume[key][field]}")
        if value["kind"] == "StatefulSet" and spec["serviceName"] not in names.get("Service", set()):
            complaints.append(f"{name}: no Service {spec['serviceName']}")
        if value["kind"] == "HorizontalPodAutoscaler":
            target = spec["scaleTargetRef"]
            if target["name"] not in names.get(target["kind"], set()):
                complaints.append(f"{name}: no {target['kind']} {target['name']}")
        selector = {
            "Service": lambda s: {"matchLabels": s["selector"]},
            "PodDisruptionBudget": lambda s: s["selector"],
            "NetworkPolicy": lambda s: s["podSelector"],
            "StatefulSet": lambda s: s["selector"],
            "Deployment": lambda s: s["selector"],
        }.get(value["kind"])
        if selector is None:
            continue
        chosen = [p for p in pods if selects(selector(spec), p["labels"])]
        if len(chosen) != 1:
            complaints.append(f"{name}: selects the pods of {len(chosen)} objects, expected 1")
        ports = {port["name"] for p in chosen for c in p["containers"] for port in c.get("ports", [])}
        asked = (
            {port["targetPort"] for port in spec.get("ports", [])} if value["kind"] == "Service" else set()
        )
        rules = spec.get("ingress", []) if value["kind"] == "NetworkPolicy" else []
        asked |= {port["port"] for rule in rules for port in rule["ports"] if isinstance(port["port"], str)}
        complaints += [f"{name}: no port {port}" for port in sorted(asked - ports)]
    return complaints


def quantity(text: str | int) -> float:
    """Bytes, or cores, of a Kubernetes quantity."""
    found = re.fullmatch(r"([\d.]+)(m|Ki|Mi|Gi)?", str(text))
    assert found is not None, text
    return float(found[1]) * {None: 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[found[2]]
