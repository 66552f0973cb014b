"""The items that can be found, as they change: the snapshot's own, brought up to the item log while it serves."""

from __future__ import annotations

import traceback
from pathlib import Path
from threading import Event, Thread

import numpy as np
import triton_python_backend_utils as pb_utils

from hsnn_core.bundle import Bundle
from hsnn_core.errors import HsnnError
from hsnn_core.item_log import LogReader
from hsnn_core.live_attributes import GrowingAttributes
from hsnn_core.live_index import LiveState
from hsnn_core.log_following import LogFollower
from hsnn_core.manifest import ITEM_TOWER
from hsnn_core.onnx_runner import OnnxItemTower

# Between two looks at the log, each of some microseconds.
PERIOD_SECONDS = 0.005
# After the log could not be read.
PAUSE_SECONDS = 1.0
# After something that should not happen; the follower begins again from the snapshot.
LONG_PAUSE_SECONDS = 30.0
# That an unload waits for the last look at the log.
PATIENCE_SECONDS = 3.0


class FixedItems:
    """The items of a snapshot that cannot change: it was exported by an earlier release, or its hierarchy came with the
    data."""

    def __init__(self, bundle: Bundle) -> None:
        self.behind = 0
        corpus = bundle.corpus
        attributes = None
        if corpus.attributes is not None:
            attributes = GrowingAttributes(corpus.index, corpus.attributes).state
        self.state = LiveState.of(corpus, attributes, bundle.log.position)

    def close(self) -> None:
        """Nothing runs."""


class ItemFollower:
    """The items of a snapshot and of all updates in the log, which a thread follows.

    The constructor returns when everything that the log holds by then can be found: a version that takes over from
    another one knows every update that was acknowledged. Raises HsnnError when the log is not the snapshot's.
    """

    def __init__(self, bundle: Bundle, log: Path, version: int) -> None:
        self._name = f"hsnn_retrieve version {version}"
        self._reader = LogReader(log, bundle.schema.hash)
        self._follower = LogFollower(bundle, self._reader, _LazyItemTower(bundle.path / ITEM_TOWER))
        count = self._follower.catch_up()
        self._report_unusable()
        if count:
            pb_utils.Logger.log_info(
                f"{self._name}: {count} item updates applied, up to {self._follower.log}"
            )
        self.behind = 0
        self._closing = Event()
        self._thread = Thread(target=self._follow, name="hsnn-items", daemon=True)
        self._thread.start()

    @property
    def state(self) -> LiveState:
        """The items of this moment."""
        return self._follower.state

    def close(self) -> None:
        """Stop following. A thread that hangs in its last look is left to itself, with the log that it has open."""
        self._closing.set()
        self._thread.join(PATIENCE_SECONDS)
        if not self._thread.is_alive():
            self._reader.close()

    def _follow(self) -> None:
        pause = PERIOD_SECONDS
        while not self._closing.wait(pause):
            try:
                self.behind = self._follower.behind()
                while self.behind and self._follower.follow() and not self._closing.is_set():
                    self.behind = self._follower.behind()
                pause = PERIOD_SECONDS
            except HsnnError as error:
                self._stay(str(error))
                pause = PAUSE_SECONDS
            except Exception as error:  # the thread must not end: nobody else would follow the log
                self._stay("".join(traceback.format_exception(error)))
                pause = LONG_PAUSE_SECONDS
            self._report_unusable()

    def _stay(self, why: str) -> None:
        self.behind = -1
        pb_utils.Logger.log_error(
            f"{self._name}: item updates are not followed for now, the items stay as they are: {why}"
        )

    def _report_unusable(self) -> None:
        while self._follower.unusable:
            item, why = self._follower.unusable.pop()
            pb_utils.Logger.log_error(f"{self._name}: the update of item {item} cannot be used: {why}")


class _LazyItemTower:
    """Opened when the first item changes: many servers never see one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tower: OnnxItemTower | None = None

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._tower is None:
            self._tower = OnnxItemTower(self._path)
        return self._tower(inputs)


def items_of(bundle: Bundle, log: Path, version: int) -> ItemFollower | FixedItems:
    """The items that a version serves, and whether they follow the log."""
    learnt = bundle.index.layers == 1 or bool(bundle.codebooks)
    if bundle.records is not None and learnt:
        return ItemFollower(bundle, log, version)
    pb_utils.Logger.log_warn(
        f"hsnn_retrieve version {version}: its items cannot change: "
        + (
            "the hierarchy came with the data"
            if bundle.records is not None
            else "it was exported without records"
        )
    )
    return FixedItems(bundle)
