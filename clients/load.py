"""An open-loop load generator: requests arrive as Poisson events at a rate, whatever the server does.

perf_analyzer measures latency at a given load, but it takes an error for a failed measurement, so it cannot say what
an overloaded server does with each request. This one keeps every request's fate. Requests are encoded and
serialised before the clock starts, and answers are not parsed: sending one costs about a tenth of a
millisecond, which matters where client and server share cores.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from hsnn_core.errors import RequestError, ServerError

from .encode import DTYPES, context_tensors
from .tls import Tls
from .wire import OUTPUTS, ServedModel

METHOD = "/inference.GRPCInferenceService/ModelInfer"
OK, REFUSED, EXPIRED, FAILED = range(4)
_PATIENCE = 5.0  # times the deadline (at least a second) that an answer is waited for, to see how late it is
_MESSAGE_BYTES = 64 << 20


@dataclass(frozen=True)
class Fates:
    """What became of n requests, in the order of their arrival.

    Attributes:
        seconds: how long requests were sent for.
        slip: (n,) float64, seconds between when a request was due and when it was sent.
        latency: (n,) float64, seconds from the sending, since when its deadline counts, to the answer, whatever it
            was.
        outcome: (n,) int8: OK; REFUSED (at once, for want of room or time); EXPIRED (the server gave it up when
            its time was over); FAILED (anything else, no answer included).
        deadline: seconds that each was allowed.
        failures: up to ten different messages of failed ones.
    """

    seconds: float
    slip: np.ndarray
    latency: np.ndarray
    outcome: np.ndarray
    deadline: float
    failures: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.outcome)

    @property
    def answered_in_time(self) -> int:
        return int(((self.outcome == OK) & self.in_time).sum())

    @property
    def answered_late(self) -> int:
        return int(((self.outcome == OK) & ~self.in_time).sum())

    @property
    def refused_in_time(self) -> int:
        """Refused, and told so before the deadline."""
        return int(((self.outcome == REFUSED) & self.in_time).sum())

    @property
    def in_time(self) -> np.ndarray:
        """(n,) bool."""
        early: np.ndarray = self.latency <= self.deadline
        return early

    def milliseconds(self, q: float) -> float:
        """Percentile ``q`` of the milliseconds from sending to answer, of answered requests alone: refusals are quick,
        and would make a server look faster the more of them there are. nan without an answer."""
        answered = self.latency[self.outcome == OK]
        return float(1000 * np.percentile(answered, q)) if len(answered) else float("nan")

    def counts(self) -> dict[str, int]:
        """Requests by fate: answered, refused, expired, failed."""
        names = ("answered", "refused", "expired", "failed")
        return dict(zip(names, np.bincount(self.outcome, minlength=len(names)).tolist()))


def serialise(
    model: ServedModel,
    requests: Iterable[Mapping[str, np.ndarray]],
    k: int | None = None,
    deadline: float | None = None,
    widths: Sequence[int] | None = None,
    about: Sequence[Mapping[str, Any]] = (),
) -> list[bytes]:
    """One ready message per request, each the wire tensors (B, ...) of its users, see `encode.UserEncoder`.
    ``k``, ``widths``: as in `RetrievalClient.retrieve`; ``deadline``: seconds that the server is told, None: no
    deadline; ``about``: what requests say of themselves, in turn: dicts with some of ``context``, ``exclude_items`` and
    ``exclude`` as `RetrievalClient.retrieve` takes them. Raises FeatureError and RequestError for wrong values.
    """
    datatypes = {numpy: wire for wire, numpy in DTYPES.items()}
    messages = []
    for number, tensors in enumerate(requests):
        if about:
            users = len(next(iter(tensors.values())))
            tensors = {**tensors, **context_tensors(model.schema, users, **about[number % len(about)])}
        message = service_pb2.ModelInferRequest(model_name=model.name)
        for tensor, values in tensors.items():
            message.inputs.add(name=tensor, datatype=datatypes[values.dtype.type], shape=values.shape)
            message.raw_input_contents.append(np.ascontiguousarray(values).tobytes())
        for output in OUTPUTS:
            message.outputs.add(name=output)
        message.parameters["schema_hash"].string_param = model.schema.hash
        if k is not None:
            message.parameters["k"].int64_param = k
        if widths is not None:
            message.parameters["widths"].string_param = ",".join(map(str, widths))
        if deadline is not None:
            message.parameters["timeout"].int64_param = int(deadline * 1e6)
        messages.append(message.SerializeToString())
    return messages


def each_user(tensors: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """A request (1, ...) for each of the users of wire tensors (R, ...)."""
    for row in range(len(next(iter(tensors.values())))):
        yield {name: values[row : row + 1] for name, values in tensors.items()}


def poisson_load(
    url: str,
    messages: Sequence[bytes],
    rate: float,
    seconds: float,
    deadline: float,
    seed: int = 1,
    stop: Callable[[], bool] = lambda: False,
    answered: Callable[[int, bytes], None] = lambda which, answer: None,
    tls: Tls | None = None,
) -> Fates:
    """Send messages in turn, in a random order, for ``seconds``, or until ``stop`` says so, as ``rate`` Poisson
    arrivals a second, and wait for the last answer. ``answered`` is given every answer with the place of its message in
    ``messages``; ``tls``: None for plain text.

    ``rate`` * ``seconds`` requests are sent, at least one, so the rate is exact; ``seed`` decides when, and the order
    of the messages. Raises RequestError for a rate, a time or a deadline that is not above 0, and ServerError when
    nobody listens at ``url``.
    """
    for name, value in (("rate", rate), ("seconds", seconds), ("deadline", deadline)):
        if not value > 0:
            raise RequestError(f"{name}: got {value!r}, expected a number > 0")
    if not messages:
        raise RequestError("messages: got none, expected at least one request to send")
    rng = np.random.default_rng(seed)
    load = _Load(url, messages, arrivals(rng, rate, seconds), rng, deadline, answered, tls)
    return asyncio.run(load.run(seconds, stop))


def arrivals(rng: np.random.Generator, rate: float, seconds: float) -> np.ndarray:
    """(n,) float64: the times of n = ``rate`` * ``seconds`` Poisson arrivals (at least one) within ``seconds``."""
    # Given how many there are, gaps between Poisson arrivals are exponential ones scaled to fill the time.
    gaps = rng.exponential(size=max(1, round(rate * seconds)) + 1)
    times: np.ndarray = gaps.cumsum()[:-1] * (seconds / gaps.sum())
    return times


def _channel(url: str, tls: Tls | None) -> grpc.aio.Channel:
    options: list[tuple[str, Any]] = [("grpc.max_receive_message_length", _MESSAGE_BYTES)]
    if tls is None:
        return grpc.aio.insecure_channel(url, options=options)
    return grpc.aio.secure_channel(url, tls.credentials(), options=options + tls.options())


class _Load:
    def __init__(
        self,
        url: str,
        messages: Sequence[bytes],
        due: np.ndarray,
        rng: np.random.Generator,
        deadline: float,
        answered: Callable[[int, bytes], None],
        tls: Tls | None,
    ) -> None:
        self._tls = tls
        self._url, self._messages, self._due, self._deadline = url, messages, due, deadline
        self._order = rng.permutation(len(messages))
        self._answered = answered
        self._slip, self._latency = np.zeros(len(due)), np.zeros(len(due))
        self._outcome = np.full(len(due), FAILED, np.int8)
        self._failures: dict[str, None] = {}

    async def run(self, seconds: float, stop: Callable[[], bool]) -> Fates:
        async with _channel(self._url, self._tls) as channel:
            try:
                await asyncio.wait_for(channel.channel_ready(), 5.0)
            except TimeoutError:
                raise ServerError(
                    f"nobody answers at {self._url}; is it the gRPC address of a Triton, and does it speak TLS?"
                ) from None
            call = channel.unary_unary(METHOD)
            tasks = set()
            began = time.perf_counter()
            sent = 0
            for number, due in enumerate(self._due):
                # Yield even when late, or the answers of those under way would be seen late.
                await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
                if stop():
                    seconds = time.perf_counter() - began
                    break
                sent += 1
                task = asyncio.create_task(self._send(call, number, began + due))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            if tasks:
                await asyncio.wait(tasks)
        slip, latency, outcome = (kept[:sent] for kept in (self._slip, self._latency, self._outcome))
        return Fates(seconds, slip, latency, outcome, self._deadline, tuple(self._failures))

    async def _send(self, call: grpc.aio.UnaryUnaryMultiCallable, number: int, due: float) -> None:
        patience = max(1.0, _PATIENCE * self._deadline)
        which = int(self._order[number % len(self._order)])
        sent = time.perf_counter()
        self._slip[number] = sent - due
        try:
            answer = await call(self._messages[which], timeout=patience)
            outcome = OK
            self._answered(which, answer)
        except grpc.aio.AioRpcError as error:
            outcome = self._meaning(error)
        self._latency[number] = time.perf_counter() - sent
        self._outcome[number] = outcome

    def _meaning(self, error: grpc.aio.AioRpcError) -> int:
        """The orchestrator starts its messages with the class of its error."""
        kind = (error.details() or "").partition(":")[0]
        if kind in ("QueueFull", "DeadlineUnmeetable"):
            return REFUSED
        if kind == "DeadlineExceeded":
            return EXPIRED
        if len(self._failures) < 10:
            self._failures[f"{error.code().name}: {error.details()}"] = None
        return FAILED
