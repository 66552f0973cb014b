"""Some minutes of a server for the picture of the dashboard: light load, more, too much, light; items change."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import date
from pathlib import Path

import numpy as np

from clients.items import ItemClient
from clients.load import poisson_load, serialise
from clients.retrieval import RetrievalClient, ServedModel
from export.exported import open_export
from export.pbtxt import ServingOptions
from export.publish import publish
from export.rollout import promote
from hsnn_cli.provenance import commit, machine
from hsnn_core.bundle import Bundle
from hsnn_core.schema_eligibility import EXCLUDED_ITEMS
from hsnn_server.triton import TritonServer

from .dashboard import draw, panels
from .prometheus import Prometheus

# Shares of the capacity, each for as long as the others; the third is more than the server can bear.
PHASES = (0.3, 0.6, 1.6, 0.3)
DEADLINE = 0.5  # seconds
_WORKERS = 2
_RATE_INTERVAL = "15s"
_ROUNDS = 40


def picture(run: Path, path: Path, seconds: float, command: str) -> None:
    """Serve the export of ``run`` with its networks as Triton models, load it for ``seconds`` and draw the dashboard to
    ``path``. Raises PublishError without an export, ServerError without Prometheus or when a server fails."""
    bundle = Bundle.open(open_export(run).bundle)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hsnn-bench-")))
        publish(run, work, options=ServingOptions(mode="bls", workers=_WORKERS, queue=16))
        server = stack.enter_context(TritonServer(work))
        promote(work, server.admin)
        prometheus = stack.enter_context(Prometheus([server.urls.metrics]))
        client = stack.enter_context(RetrievalClient(server.urls.grpc, timeout=60))
        items = stack.enter_context(ItemClient(server.urls.grpc))
        ids = bundle.index.ids(np.arange(bundle.index.items))
        messages = _messages(client.connect(), bundle.smoke().users, ids)
        began = time.perf_counter()
        for _ in range(_ROUNDS):
            client.retrieve([{}])
        capacity = _ROUNDS / (time.perf_counter() - began)
        start = time.time()
        for number, share in enumerate(PHASES):
            poisson_load(
                server.urls.grpc, messages, share * capacity, seconds / len(PHASES), DEADLINE, seed=number
            )
            items.delete(ids[number::100].tolist())
        end = time.time()
        draw(
            lambda expression: prometheus.query_range(expression, start, end, 1.0),
            panels(_RATE_INTERVAL),
            path,
            f"{command}, {commit()}, {date.today().isoformat()}, {machine()}; drawn by matplotlib from the dashboard's "
            "queries, not by Grafana",
        )


def _messages(model: ServedModel, users: Mapping[str, np.ndarray], ids: np.ndarray) -> list[bytes]:
    """Of ten requests seven are plain, two exclude items, one of them all, and one is malformed."""
    rng = np.random.default_rng(0)
    rows = len(next(iter(users.values())))

    def user(number: int) -> dict[str, np.ndarray]:
        return {name: values[number % rows : number % rows + 1] for name, values in users.items()}

    def without(number: int, share: float) -> dict[str, np.ndarray]:
        excluded = ids[rng.random(len(ids)) < share]
        return user(number) | {EXCLUDED_ITEMS.name: excluded[None]}

    good = [user(number) for number in range(35)]
    good += [without(number, share) for number, share in enumerate((0.2, 0.5, 0.7, 0.9, 0.99, 1, 1, 1, 1, 1))]
    messages = serialise(model, good, deadline=DEADLINE)
    messages += serialise(model, [user(number) for number in range(5)], k=10**6, deadline=DEADLINE)
    return [messages[place] for place in rng.permutation(len(messages))]
