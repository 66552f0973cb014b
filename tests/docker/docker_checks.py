"""What can be said of Dockerfiles and compose files without an engine. Every check returns its complaints."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"""(?<![\w-])([A-Za-z][\w.-]*)(?:\[\w+])?==([^\s"';]+)""")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, continuation lines joined."""

    keyword: str
    text: str

    @property
    def words(self) -> list[str]:
        """Its arguments: the JSON form's strings, or the words without flags such as --from."""
        if self.text.startswith("["):
            return list(json.loads(self.text))
        return [word for word in self.text.split() if not word.startswith("--")]

    def flag(self, name: str) -> str | None:
        found = re.match(rf"(?:--\S+\s+)*?--{name}=(\S+)", self.text)
        return found[1] if found else None


@dataclass(frozen=True)
class Stage:
    """A build stage: what it starts from and its own instructions."""

    name: str
    base: str
    instructions: tuple[Instruction, ...]


class Dockerfile:
    """The stages of a Dockerfile, in order; the last is the one built by default."""

    def __init__(self, text: str) -> None:
        self.text = text
        lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
        parts = [Instruction(*line.split(maxsplit=1)) for line in joined]
        starts = [i for i, part in enumerate(parts) if part.keyword == "FROM"]
        self.arguments = dict(part.text.split("=", 1) for part in parts[: starts[0]])
        self.stages = []
        for start, end in zip(starts, [*starts[1:], len(parts)]):
            base, *alias = parts[start].words
            base = re.sub(r"\$\{(\w+)}", lambda m: self.arguments[m[1]], base)
            self.stages.append(Stage(alias[-1] if alias else str(start), base, tuple(parts[start + 1 : end])))

    @property
    def images(self) -> list[str]:
        """The images from elsewhere, the defaults of ARGs before the first stage filled in."""
        own = {stage.name for stage in self.stages} | {"scratch"}
        return [stage.base for stage in self.stages if stage.base not in own]

    def all(self, keyword: str) -> list[Instruction]:
        return [part for stage in self.stages for part in stage.instructions if part.keyword == keyword]

    def last(self, keyword: str) -> Instruction | None:
        """The instruction that holds for the image built by default, inherited from earlier stages or not."""
        by_name = {stage.name: stage for stage in self.stages}
        stage: Stage | None = self.stages[-1]
        while stage is not None:
            for part in reversed(stage.instructions):
                if part.keyword == keyword:
                    return part
            stage = by_name.get(stage.base)
        return None

    def pins(self) -> dict[str, str]:
        """Packages pinned with ==, ARG defaults filled in; those whose ARG has no default are left out."""
        defaults = dict(part.text.split("=", 1) for part in self.all("ARG") if "=" in part.text)
        text = re.sub(r"\$\{(\w+)}", lambda m: defaults.get(m[1], m[0]), self.text)
        return {name.lower(): version for name, version in PIN.findall(text) if "$" not in version}


def git_files(root: Path) -> set[str]:
    """Paths that git tracks under ``root``."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    return set(listing.stdout.split("\0")) - {""}


def ignored(path: str, patterns: Sequence[str]) -> bool:
    """Whether .dockerignore ``patterns`` keep ``path`` from the builder: the last pattern that matches it, or
    a folder it lies in, decides."""
    parts = path.strip("/").split("/")
    parents = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    result = False
    for pattern in patterns:
        body = pattern.removeprefix("!").strip("/")
        anywhere = body.removeprefix("**/") if body.startswith("**/") else None
        for parent in parents:
            name = parent.rsplit("/", 1)[-1]
            # Docker's * does not cross a slash.
            same_depth = parent.count("/") == body.count("/") and fnmatch.fnmatchcase(parent, body)
            if same_depth or (anywhere is not None and fnmatch.fnmatchcase(name, anywhere)):
                result = not pattern.startswith("!")
                break
    return result


def copy_complaints(
    dockerfile: Dockerfile, root: Path, tracked: set[str], ignore: Sequence[str]
) -> list[str]:
    """Sources of COPY and ADD that are not there, not in git, or kept from the builder by .dockerignore."""
    complaints = []
    for part in (*dockerfile.all("COPY"), *dockerfile.all("ADD")):
        if (origin := part.flag("from")) is not None:
            if origin not in {stage.name for stage in dockerfile.stages}:
                complaints.append(f"--from={origin}: no such stage")
            continue
        for source in part.words[:-1]:
            path = source.rstrip("/")
            if not (root / path).exists():
                complaints.append(f"{source}: not in the project")
            elif path not in tracked and not any(file.startswith(path + "/") for file in tracked):
                complaints.append(f"{source}: not tracked by git")
            elif ignored(path, ignore):
                complaints.append(f"{source}: kept from the builder by .dockerignore")
    return complaints


def merged(base: Any, over: Any) -> Any:
    """Compose's merge of an override file, for what these files use: mappings by key, all else replaced."""
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        keys = [*base, *(key for key in over if key not in base)]
        return {
            k: merged(base[k], over[k]) if k in base and k in over else over.get(k, base.get(k)) for k in keys
        }
    return over


def env_file(text: str) -> dict[str, str]:
    """NAME=VALUE lines."""
    return dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))


def compose_complaints(compose: Mapping[str, Any], folder: Path, images: Mapping[str, str]) -> list[str]:
    """References of a compose file in ``folder`` that lead nowhere, and doors left open. ``images``: those from
    elsewhere, by the name of their variable."""
    complaints = []
    services = compose["services"]
    built = {service["image"] for service in services.values() if "build" in service and "image" in service}
    for name, service in services.items():
        build = service.get("build", {})
        if "image" not in service and not build:
            complaints.append(f"{name}: neither image nor build")
        elif not build and service["image"] not in {*built, *(f"${{{variable}}}" for variable in images)}:
            complaints.append(f"{name}: image {service['image']}: neither built here nor in docker/.env")
        if build:
            file = folder / build["context"] / build["dockerfile"]
            if not file.is_file():
                complaints.append(f"{name}: {build['dockerfile']}: no such Dockerfile")
            elif (target := build.get("target")) and target not in {
                s.name for s in Dockerfile(file.read_text()).stages
            }:
                complaints.append(f"{name}: {build['dockerfile']} has no stage {target}")
        references = {
            "depends on service": (service.get("depends_on", {}), services),
            "secret": (service.get("secrets", []), compose.get("secrets", {})),
            "volume": (
                [v.split(":")[0] for v in service.get("volumes", []) if not v.startswith("./")],
                compose.get("volumes", {}),
            ),
            "folder": (
                [v.split(":")[0] for v in service.get("volumes", []) if v.startswith("./")],
                [f"./{path.relative_to(folder)}" for path in folder.glob("**/")],
            ),
        }
        for kind, (used, declared) in references.items():
            complaints += [
                f"{name}: {kind} {one}, which is not {'there' if kind == 'folder' else 'declared'}"
                for one in used
                if one not in declared
            ]
        for port in service.get("ports", []):
            if not port.startswith("127.0.0.1:"):
                complaints.append(f"{name}: port {port} is open beyond this machine")
        if service.get("privileged") or "no-new-privileges:true" not in service.get("security_opt", []):
            complaints.append(f"{name}: may gain privileges")
        if not service.get("read_only"):
            complaints.append(f"{name}: its root file system is writable")
    return complaints


def seconds(text: str) -> int:
    """A compose duration such as 90s, 2m or 1m30s."""
    return sum(int(n) * {"h": 3600, "m": 60, "s": 1}[unit] for n, unit in re.findall(r"(\d+)([hms])", text))
