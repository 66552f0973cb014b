"""Exhaustive top K of requests over a large corpus, found once, kept in files: one takes seconds per million items."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from export.exported import Exported
from export.open_items import open_items
from hsnn_core.bundle import Bundle
from hsnn_core.features import Encoded
from hsnn_core.manifest import MANIFEST

from .oracle import best_items
from .orchestrator import BareLoop, Wire


class KeptTops:
    """The best K of the items that a request without context may get, by the scores of ``loop``'s networks.

    ``folder``: made when missing; a file per request, whose name says of what it was made: bundle, networks, K, the
    items that may be got, the user.
    """

    def __init__(self, folder: Path, exported: Exported, bundle: Bundle, loop: BareLoop) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._bundle, self._loop = folder, bundle, loop
        self._allowed = open_items(bundle)
        made_of = [(bundle.path / MANIFEST).read_bytes(), str(loop.k).encode()]
        made_of += [graph.sha256.encode() for graph in exported.graphs]
        if self._allowed is not None:
            made_of.append(np.packbits(self._allowed).tobytes())
        self._made_of = hashlib.sha256(b"\n".join(made_of)).digest()

    def of(self, requests: Sequence[Wire], progress: bool) -> list[np.ndarray]:
        """Item ids (K,) int64 by request, best first; fewer where it may get fewer."""
        what = f"exhaustive, {self._bundle.index.items:,} items"
        bar = tqdm(requests, desc=what, unit="request", disable=not progress)
        return [self._top(self._loop.encode(wire)) for wire in bar]

    def shares(self, requests: Sequence[Wire], progress: bool) -> list[float]:
        """By request the share of its top K that the loop's search finds."""
        shares = []
        for top, wire in zip(self.of(requests, progress), requests):
            found = self._loop.search(wire)
            shares.append(float(np.isin(top, found.item_ids[0, : found.valid[0]]).mean()))
        return shares

    def _top(self, user: Encoded) -> np.ndarray:
        key = hashlib.sha256(self._made_of + user.dense.tobytes() + user.ids.tobytes()).hexdigest()
        path = self._folder / f"{key}.npy"
        if not path.exists():
            index, rank = self._bundle.index, self._bundle.schema.rank
            aside = self._folder / f".{key}.npy"
            np.save(aside, best_items(index, self._loop.scorer, user, self._loop.k, rank, self._allowed))
            aside.rename(path)
        top: np.ndarray = np.load(path, allow_pickle=False)
        return top
