"""Keeps a local server serving: loads again a model whose stub died, starts the server again when that is not enough.

What it looks at, and what it does about it:

    the server's process has ended                         start it again
    a version is ready by Triton's word, its stub is dead   load that version once more: 0.3 s, all else goes on
    a load would bring up another version than that one     start it again, with what is newest
    a stub died while its version was unloaded              start it again: Triton never ends that unload
    the probe found it dead several times in a row          start it again (it hangs, or was stopped)
    the probe was refused for want of room or time          nothing: it is busy, and busier still after a restart
    so for minutes, and nobody at all was answered          start it again: its workers hang
    it answers wrongly                                      nothing but saying so: the same files would be loaded

The first attempt comes at once; as long as none holds, the next ones wait longer, and do not try the smaller means.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hsnn_core.errors import HsnnError, ServerError

from .probe import DEAD, HANGING, HEALTHY, WRONG, Standstill, Verdict
from .stubs import Dead


class Supervised(Protocol):
    """What is needed of a `TritonServer`."""

    def alive(self) -> bool: ...

    def dead_models(self) -> list[Dead]: ...

    def revive(self, model: str, version: int) -> None: ...


@dataclass(frozen=True)
class Patience:
    """Seconds: ``look`` between looks at the processes, ``probe`` between probes; ``failures``: probes in a row that
    must fail; ``hanging``: busy for so long without an answer to anybody, its workers hang; ``unloading``: after which
    a version that unloads without a stub never ends; ``settled``: healthy for so long, an attempt has held;
    ``attempts``: that may fail in a row, after ``pause``, twice, four times ... seconds, at most ``longest``;
    ``revivals``: stubs brought back in one life of the server, which keeps the shared memory and the threads of those
    that died at work (4 MiB each, Triton 2.51)."""

    look: float = 0.2
    probe: float = 1.0
    failures: int = 3
    hanging: float = HANGING
    unloading: float = 10.0
    settled: float = 20.0
    attempts: int = 6
    pause: float = 1.0
    longest: float = 30.0
    revivals: int = 8

    def before(self, attempt: int) -> float:
        """Seconds to wait before attempt 1, 2, ..."""
        return 0.0 if attempt <= 1 else min(self.longest, self.pause * 2 ** (attempt - 2))


PATIENCE = Patience()


class Supervisor:
    """Watches a running ``server`` in the thread that calls `run`.

    ``start_again``: ends it, starts it and loads what was promoted last, whose version it returns; ``probe``: asks the
    server its smoke request, and a busy one how many it has answered (without that number, it is never taken to
    hang); ``say``: gets one line for everything that was done.
    """

    def __init__(
        self,
        server: Supervised,
        start_again: Callable[[], int],
        probe: Callable[[], Verdict],
        patience: Patience = PATIENCE,
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._server, self._restart, self._probe = server, start_again, probe
        self._patience, self._say, self._clock, self._sleep = patience, say, clock, sleep
        self._attempts = self._failures = self._revived = 0
        self._wrong = False
        self._standstill: Standstill | None = None
        self._healthy_since: float | None = None
        self._next_probe = clock()
        self._unloading: dict[Dead, float] = {}  # since when it has been seen so
        self._stopped: Callable[[], bool] = lambda: False

    def run(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Watch until ``stopped``; ServerError, with the last reason, when too many attempts in a row did not hold."""
        self._stopped = stopped
        while not stopped():
            self.step()
            self._sleep(self._patience.look)

    def step(self) -> None:
        """One look, and what follows from it."""
        if not self._server.alive():
            self._start_again("its process has ended")
            return
        found = self._dead_models()
        if dead := [one for one in found if not one.unloading]:
            self._revive(dead)
        elif stuck := self._never_unloaded(found):
            self._start_again(f"the stub of {stuck} died while it was unloaded, which Triton never ends")
        if dead or self._clock() >= self._next_probe:
            self._probe_it()

    def _dead_models(self) -> list[Dead]:
        try:
            return self._server.dead_models()
        except ServerError:  # it does not answer: the probes will tell
            return []

    def _never_unloaded(self, found: list[Dead]) -> str:
        """Versions that have been unloading without a stub for too long, named; "" when there is none."""
        now = self._clock()
        self._unloading = {one: self._unloading.get(one, now) for one in found if one.unloading}
        return _named(
            [one for one, since in self._unloading.items() if now - since >= self._patience.unloading]
        )

    def _probe_it(self) -> None:
        verdict = self._probe()
        now = self._clock()
        self._next_probe = now + self._patience.probe
        self._standstill = Standstill.after(self._standstill, verdict, now)
        if self._standstill is not None and self._standstill.hangs(verdict, now, self._patience.hanging):
            self._start_again(self._standstill.reason(now, verdict))
            return
        if verdict.state == DEAD:
            self._healthy_since = None
            self._failures += 1
            if self._failures >= self._patience.failures:
                self._start_again(f"{self._failures} probes in a row failed, the last with {verdict}")
            return
        self._failures = 0
        if (verdict.state == WRONG) != self._wrong:
            self._wrong = verdict.state == WRONG
            self._say(f"supervisor: {verdict}")
        if verdict.state == HEALTHY:
            self._healthy_since = self._healthy_since or now
            if now - self._healthy_since >= self._patience.settled:
                self._attempts = 0

    def _revive(self, dead: list[Dead]) -> None:
        what = f"the stub{'s' * (len(dead) > 1)} of {_named(dead)} {'have' if len(dead) > 1 else 'has'} died"
        if self._attempts:  # it was tried, and did not hold
            self._start_again(what)
            return
        if self._revived + len(dead) > self._patience.revivals:
            self._start_again(f"{what}, and {self._revived} stubs before")
            return
        began = self._clock()
        try:
            for one in dead:
                self._server.revive(one.model, one.version)
        except (HsnnError, OSError) as error:
            self._start_again(f"{what} and could not be loaded again: {first_line(error)}")
            return
        self._attempts = 1
        self._revived += len(dead)
        self._healthy_since = None
        self._say(f"supervisor: {what}; loaded again in {self._clock() - began:.1f} s")

    def _start_again(self, reason: str) -> None:
        """Until it comes up, too many attempts have failed, or nobody wants it any more."""
        while not self._stopped():
            self._attempts += 1
            if self._attempts > self._patience.attempts:
                raise ServerError(
                    f"the server was started {self._patience.attempts} times in a row and did not stay up; the last "
                    f"reason: {reason}. See its log, put right what is wrong, and start it again"
                )
            pause = self._patience.before(self._attempts)
            said = f", after {pause:g} s" if pause else ""
            self._say(f"supervisor: {reason}; starting the server again{said} (attempt {self._attempts})")
            if not self._pause(pause):
                return
            began = self._clock()
            self._unloading, self._standstill = {}, None
            self._failures, self._revived, self._healthy_since = 0, 0, None
            try:
                version = self._restart()
            except (HsnnError, OSError) as error:
                reason = first_line(error)
                continue
            self._next_probe = self._clock()
            self._say(
                f"supervisor: version {version} serves again, {self._clock() - began:.1f} s after the start"
            )
            return

    def _pause(self, seconds: float) -> bool:
        """Sleep; False when it was stopped meanwhile."""
        until = self._clock() + seconds
        while (left := until - self._clock()) > 0 and not self._stopped():
            self._sleep(min(left, self._patience.look))
        return not self._stopped()


def _named(dead: list[Dead]) -> str:
    return ", ".join(f"{one.model} version {one.version}" for one in dead)


def first_line(error: Exception) -> str:
    """An error without the server's log below it."""
    return str(error).partition("\n")[0]
