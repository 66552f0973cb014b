"""The smoke request: a snapshot's networks answer it as they did at export, or the snapshot does not go live.

It is asked of the networks as the server holds them (of exactly this version), through the same search that
the orchestrator runs. So what the gates of the export could not see is found before a user does: an engine
that computes something else on this machine, a file that was changed or mixed up after it was published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from export.engines import DEFAULT_ENGINE
from export.vendor import verify_code
from hsnn_core.bundle import Bundle, Smoke
from hsnn_core.errors import PublishError
from hsnn_core.onnx_runner import SCORER_OUTPUTS
from hsnn_core.search import SearchResult, search

# Of a probability. TensorRT multiplies float32 in TF32, which has 10 bits of mantissa.
TOLERANCE, ENGINE_TOLERANCE = 1e-4, 5e-3
# Of the expected items: one node that ties at a beam's edge takes its items with it.
LEAST_SHARE = 0.9


class Networks(Protocol):
    """The models of a running server."""

    def infer(
        self, model: str, version: int, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]
    ) -> list[np.ndarray]:
        """The named outputs of one call of a model's version; raises with the server's message."""
        ...


class ServedRunner:
    """A `hsnn_core.scorer.Runner` over the networks of one version in a running server.

    `models`: those of a manifest."""

    def __init__(self, networks: Networks, models: Mapping[str, Any], version: int) -> None:
        self._networks, self._models, self._version = networks, models, version
        self._user_outputs = [f"user_l{layer}" for layer in range(1, len(models["scorers"]) + 1)]

    def user_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """user_dense (B, Du) f32, user_ids (B, Su) i32 -> "user_l1".."user_lN": (B, U_l) f32."""
        name = self._models["user_tower"]
        values = self._networks.infer(name, self._version, inputs, self._user_outputs)
        return dict(zip(self._user_outputs, values))

    def score(self, layer: int, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Layer `layer` (from 1) on user (B, U_l), item (B, C, E_l), ... -> monn, logits (B, C, T) f32."""
        name = self._models["scorers"][layer - 1]
        monn, logits = self._networks.infer(name, self._version, inputs, SCORER_OUTPUTS)
        return monn, logits


def replay(directory: Path, version: int, networks: Networks) -> None:
    """Ask the served networks of `version` for the smoke request of the orchestrator's version `directory`,
    whose files must be those that were published.

    Raises PublishError saying how the answer differs from the one at export, FormatError naming a file that
    changed; what the networks raise goes through."""
    verify_code(directory)
    bundle = Bundle.open(directory)
    manifest, smoke = bundle.manifest, bundle.smoke()
    if "index" in manifest["models"]:
        verify_code(directory.parents[1] / manifest["models"]["index"] / directory.name)
    scorer = bundle.scorer(ServedRunner(networks, manifest["models"], version))
    users = bundle.transform.encode_users(smoke.users)
    found = search(bundle.index, scorer, users, manifest["widths"], manifest["k"], bundle.schema.rank)
    tolerance = TOLERANCE if manifest["engine"] == DEFAULT_ENGINE else ENGINE_TOLERANCE
    check_answer(found, smoke, tolerance)


def check_answer(found: SearchResult, smoke: Smoke, tolerance: float) -> None:
    """PublishError unless `found` has the items of the smoke request with their probabilities.

    Few may be missing (LEAST_SHARE): where scores tie within rounding, either node may be kept."""
    expected = same = 0
    worst = 0.0
    for user, (wanted, probabilities) in enumerate(zip(smoke.item_ids, smoke.probabilities)):
        # Rows beyond the items there are hold 0, which no sigmoid of a real score does.
        places = {int(item): row for row, item in enumerate(wanted) if probabilities[row].any()}
        expected += len(places)
        for row in range(found.valid[user]):
            place = places.get(int(found.item_ids[user, row]))
            if place is not None:
                same += 1
                gap = np.abs(found.probabilities[user, row] - probabilities[place]).max()
                worst = max(worst, float(gap))
    if worst > tolerance or same < LEAST_SHARE * expected:
        raise PublishError(
            f"{same} of the {expected} expected items were found, expected at least {LEAST_SHARE:.0%}; their "
            f"probabilities differ by up to {worst:.1e}, allowed are {tolerance:g}"
        )
