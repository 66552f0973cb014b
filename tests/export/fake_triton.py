"""A Triton that holds versions as the real one does, lives on when the process that talks to it dies, and notes what
would have failed a request."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnxruntime

from export import pbtxt
from export.pbtxt import INDEX, ORCHESTRATOR
from export.repository import CANARY
from hsnn_core.errors import ServerError

NOT_NETWORKS = (ORCHESTRATOR, CANARY)


class FakeTriton:
    """Model control over a repository.

    A load holds the newest versions that config.pbtxt asks for. A replaced orchestrator is UNLOADING, its last requests
    under way, until somebody looks at its state again. `violations`: networks that were taken from an orchestrator
    that answered requests, orchestrators that began without theirs, moments without any. `fails`: models that do not
    load; `shift`: what every network adds to its answers; `step`: called after every change. `stuck`: (model, version)
    that never ends unloading; `still_calling`: whether it goes on calling its networks.
    """

    def __init__(
        self,
        repository: Path,
        file: Path | None = None,
        fails: tuple[str, ...] = (),
        shift: float = 0.0,
        step: Callable[[], None] = lambda: None,
    ) -> None:
        self.repository, self.file, self.fails, self.shift, self.step = repository, file, fails, shift, step
        self.held: dict[str, dict[int, str]] = {}
        self.violations: list[str] = []
        self.calls: list[str] = []
        self.stuck: set[tuple[str, int]] = set()
        self.still_calling = False
        self.counted = 0
        if file is not None and file.exists():
            known = json.loads(file.read_text())
            self.held = {m: {int(v): s for v, s in states.items()} for m, states in known["held"].items()}
            self.violations = known["violations"]

    def load(self, model: str) -> None:
        self.calls.append(f"load {model}")
        if model in self.fails:
            raise RuntimeError("out of memory")
        config = self.repository / model / "config.pbtxt"
        keep = pbtxt.parse(config.read_text(), model).version_policy.latest.num_versions
        present = sorted(int(path.name) for path in config.parent.iterdir() if path.name.isdecimal())
        if not present:
            raise RuntimeError("at least one version must be available")
        before, after = self.held.get(model, {}), present[-keep:]
        states = {version: self._left(model, version, state) for version, state in before.items()}
        self._change(model, states | dict.fromkeys(after, "READY"))

    def unload(self, model: str) -> None:
        self.calls.append(f"unload {model}")
        states = {
            version: "UNLOADING"
            if (model, version) in self.stuck and state != "UNAVAILABLE"
            else "UNAVAILABLE"
            for version, state in self.held[model].items()
        }
        self._change(model, states)
        if "UNLOADING" in states.values():
            raise ServerError(f"{model} is still unloading after 120 s")

    def ready(self, model: str, version: int | None = None) -> bool:
        return self.held.get(model, {}).get(version or 0) == "READY"

    def states(self, model: str) -> dict[int, str]:
        states = dict(self.held.get(model, {}))
        self.held[model] = {
            v: "UNAVAILABLE" if s == "UNLOADING" and (model, v) not in self.stuck else s
            for v, s in states.items()
        }
        return states

    def calls_of(self, version: int) -> dict[str, int]:
        self.counted += 1  # whatever serves, and the writer of items, are called all the time
        busy = {ORCHESTRATOR: self.counted, INDEX: self.counted}
        networks = {m: 7 for m in self.held if m not in NOT_NETWORKS and self.ready(m, version)}
        return networks | busy | ({"hsnn_user_tower": self.counted} if self.still_calling else {})

    def infer(self, model: str, version: int, inputs: dict, outputs: list) -> list:
        assert self.ready(model, version), f"{model} version {version} is not loaded"
        session = onnxruntime.InferenceSession(self.repository / model / str(version) / "model.onnx")
        return [value + self.shift for value in session.run(outputs, dict(inputs))]

    def serving(self, model: str = ORCHESTRATOR) -> list[int]:
        return sorted(version for version, state in self.held.get(model, {}).items() if state == "READY")

    def _left(self, model: str, version: int, state: str) -> str:
        if state == "READY" and model in NOT_NETWORKS:
            return "UNLOADING"
        return state if (model, version) in self.stuck else "UNAVAILABLE"

    def _change(self, model: str, states: dict[int, str]) -> None:
        had_service = bool(self.serving())
        self.held[model] = states
        for orchestrator in NOT_NETWORKS:
            for version, state in self.held.get(orchestrator, {}).items():
                lacking = [
                    network
                    for network in self.held
                    if network not in NOT_NETWORKS and not self.ready(network, version)
                ]
                passed_over = (orchestrator, version) in self.stuck and not self.still_calling
                if state != "UNAVAILABLE" and lacking and not passed_over:
                    self.violations.append(f"{orchestrator} {version} is {state} without {lacking}")
        if had_service and not self.serving():
            self.violations.append("nothing serves")
        if self.file is not None:
            self.file.write_text(json.dumps({"held": self.held, "violations": self.violations}))
        self.step()
