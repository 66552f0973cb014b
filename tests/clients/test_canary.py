"""Which requests the canary gets, and that nobody notices when it does not answer; sync and asyncio alike."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from clients.canary import AsyncSplit, Canary, Split, Switch
from clients.comparison import Comparison
from clients.wire import Hit, Results
from hsnn_core.errors import DeadlineExceeded, HsnnError, Overloaded, RequestError, ServerError


def served(share: float = 0.0, shadow: bool = False) -> Any:
    return SimpleNamespace(canary_share=share, canary_shadow=shadow)


class Model:
    """Answers as one version, or fails; counts who asked."""

    def __init__(self, version: str, error: HsnnError | None = None) -> None:
        self.version, self.error = version, error
        self.lefts: list[float] = []

    def __call__(self, left: float) -> Results:
        self.lefts.append(left)
        if self.error is not None:
            raise self.error
        return Results([[Hit(1, {"click": 0.1}, 0.1)]], self.version, None)

    async def later(self, left: float) -> Results:
        return self(left)


class CanaryClient:
    def __init__(self, model: Any) -> None:
        self.model, self.looks, self.closed = model, 0, False

    def refresh(self) -> Any:
        self.looks += 1
        if isinstance(self.model, HsnnError):
            raise self.model
        return self.model

    def close(self) -> None:
        self.closed = True


class AsyncCanaryClient(CanaryClient):
    async def refresh(self) -> Any:  # type: ignore[override]
        return super().refresh()

    async def close(self) -> None:  # type: ignore[override]
        super().close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


class Sync:
    """A split client, called in one way for both kinds."""

    def __init__(self, canary: Canary, model: Any) -> None:
        self.client = CanaryClient(model)
        self.split: Any = Split(canary, self.client)

    def ask(self, stable: Model, canary: Model, timeout: float = 1.0) -> Results:
        return self.split.answer(stable, canary, timeout)

    def settle(self) -> None:
        until(lambda: self.split._background._work_queue.empty())
        time.sleep(0.05)

    def close(self) -> None:
        self.split.close()


class Async(Sync):
    def __init__(self, canary: Canary, model: Any) -> None:
        self.client = AsyncCanaryClient(model)
        self.loop = asyncio.new_event_loop()
        self.split = AsyncSplit(canary, self.client)

    def ask(self, stable: Model, canary: Model, timeout: float = 1.0) -> Results:
        return self.loop.run_until_complete(self.split.answer(stable.later, canary.later, timeout))

    def settle(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(0.05))

    def close(self) -> None:
        self.loop.run_until_complete(self.split.close())
        self.loop.close()


@pytest.fixture(params=[Sync, Async])
def split(request: pytest.FixtureRequest) -> Any:
    made = []

    def make(canary: Canary, model: Any) -> Any:
        made.append(request.param(canary, model))
        made[-1].ask(Model("1"), Model("2"))  # looks
        made[-1].settle()
        return made[-1]

    yield make
    for one in made:
        one.close()
        assert one.client.closed


def test_no_canary_no_difference(split: Any) -> None:
    stable, canary = Model("1"), Model("2")
    client = split(Canary(share=1.0), ServerError("no such model"))
    assert [client.ask(stable, canary).version for _ in range(5)] == ["1"] * 5
    assert (canary.lefts, stable.lefts) == ([], [1.0] * 5)
    assert client.client.looks == 1


def test_all_and_none_and_what_the_operator_set(split: Any) -> None:
    for canary, model, version in (
        (Canary(share=1.0), served(), "2"),
        (Canary(share=0.0), served(1.0), "1"),
        (Canary(), served(1.0), "2"),
        (Canary(), served(), "1"),
    ):
        assert split(canary, model).ask(Model("1"), Model("2")).version == version


@pytest.mark.parametrize(
    "error", [ServerError("gone"), DeadlineExceeded("late"), Overloaded("full"), RequestError("odd")]
)
def test_the_stable_model_answers_for_a_canary_that_does_not(split: Any, error: HsnnError) -> None:
    client = split(Canary(share=1.0), served())
    stable, canary = Model("1"), Model("2", error)
    assert client.ask(stable, canary).version == "1"
    assert canary.lefts == [0.5]  # what is left is for the stable model
    assert 0.5 < stable.lefts[0] <= 1.0
    assert client.split.switch.fell_back == 1
    client.ask(stable, canary)
    # One that is gone is not asked again until the next look; one that only refused is.
    assert len(canary.lefts) == (1 if type(error) is ServerError else 2)


def test_a_copy_is_compared_and_never_answers(split: Any) -> None:
    client = split(Canary(), served(1.0, shadow=True))
    client.split.switch.comparison = Comparison()  # the look may have been quick enough for the first request
    stable, canary = Model("1"), Model("2")
    for _ in range(3):
        assert client.ask(stable, canary).version == "1"
        client.settle()
    client.ask(stable, Model("2", ServerError("gone")))
    client.settle()
    figures = client.split.switch.comparison.figures()
    assert (figures.requests, figures.failed, figures.overlap) == (4, 1, 1.0)
    assert canary.lefts == [1.0] * 3


def test_the_share_is_kept_and_looks_are_spaced() -> None:
    now = 0.0
    switch = Switch(Canary(share=0.2, look_every=5.0), clock=lambda: now)
    assert [switch.look_due(), switch.look_due()] == [True, False]
    switch.found(served())
    assert 300 < sum(switch.chosen() for _ in range(2000)) < 500
    now = 5.0
    assert switch.look_due()
    switch.found(None)
    assert not any(switch.chosen() for _ in range(100))


def test_copies_under_way_are_bounded() -> None:
    switch = Switch(Canary(share=1.0, shadow=True))
    begun = [switch.begin_copy() for _ in range(10)]
    assert begun == [True] * 8 + [False] * 2
    assert switch.comparison.figures().skipped == 2
    switch.end_copy()
    assert switch.begin_copy()


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(RequestError, match="share: got 5, expected a number from 0 to 1"):
        Canary(share=5)
