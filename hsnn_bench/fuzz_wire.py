"""Malformed requests to a real server, good ones between them, and what became of each.

A finding is whatever must not be: an answer to what had to be refused, an answer that is none, an internal error, a
call that does not end, a process that does, or a good request that got other items than before.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from clients.encode import DTYPES
from clients.load import METHOD, each_user, serialise
from clients.wire import OUTPUTS, ServedModel
from hsnn_core.errors import ServerError
from hsnn_server.state import Urls
from hsnn_server.triton import TritonServer

from .fuzz_http_requests import HttpRequests
from .fuzz_requests import GrpcRequests, Malformed

DEADLINE = 10.0  # seconds that any call may take
_WAITS = 0.3  # seconds that a server may wait for the rest of a request which says it is longer
_UNDER_WAY = 24
_ROUND = 480  # malformed requests between two looks at the server's processes
_GOOD = 1 / 16  # of the requests of a round
_HTTP = 1 / 4  # of the malformed ones
_K = 10
_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.RESOURCE_EXHAUSTED,
}  # fmt: skip


# What Triton 2.51 itself does, before or after any of our code: not as it should be, and not ours to change.
_TRITONS = (
    (
        "internal error",
        "INTERNAL: Unable to parse request",
        "gRPC's own answer to bytes that are no message: INTERNAL",
    ),
    (
        "internal error",
        "failed to parse the request JSON buffer",
        "HTTP 500, not 400, for a body that is no JSON",
    ),
    (
        "internal error",
        '500: {"error":"Unable to parse',
        "HTTP 500, not 400, for JSON values of another type",
    ),
    ("internal error", "attempt to ", "HTTP 500, not 400, for JSON values of another type"),
    ("internal error", "was not found in the JSON", "HTTP 500, not 400, for JSON that lacks a member"),
    ("internal error", "Unsupported compression type", "HTTP 501 for a compression it does not know"),
    (
        "accepted: contents too many",
        "",
        "gRPC: raw contents behind those of the last input are not looked at",
    ),
    (
        "accepted: dimension",
        "",
        "the number of users in one tensor counts modulo 2^32, and 0 is as many as in the others",
    ),
    ("accepted: version", "", "a version that begins with a number is that number: 1.5 is 1"),
)


@dataclass
class Tally:
    """What was sent and found. ``sent``: changed requests by what was changed; ``refused``, ``answered``: of them;
    ``harmless``: of the answered those whose change left a good request; ``good``: requests between them that got their
    own answer; ``left_out``: not sent, as Triton 2.51 would have ended;
    ``findings``: (why, what, detail) -> how often; ``tritons``: what is Triton's own, how often."""

    sent: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    answered: int = 0
    harmless: int = 0
    good: int = 0
    seconds: float = 0.0
    restarts: int = 0
    left_out: int = 0
    tritons: Counter[str] = field(default_factory=Counter)
    findings: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str, str], str] = field(default_factory=dict)

    @property
    def malformed(self) -> int:
        """Those that were sent and were not good requests all the same."""
        return self.refused + self.answered - self.harmless

    def find(self, why: str, what: str, detail: str, body: bytes) -> None:
        """Count a finding; numbers and quoted texts in its detail are left out, the first one's request is kept."""
        for kind, text, meaning in _TRITONS:
            if kind in (why, f"{why}: {what}") and text in detail:
                self.tritons[meaning] += 1
                return
        plain = re.sub(r"0x[0-9a-f]+|-?\d+(\.\d+)?", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", detail))[:160]
        self.findings[why, what, plain] += 1
        self.examples.setdefault((why, what, plain), f"{detail[:300]} | {body[:2000].hex()}")


@dataclass(frozen=True)
class Elsewhere:
    """A server that runs already, at ``urls``, and whose processes are not ours to watch or to start."""

    urls: Urls


class Target:
    """A served snapshot under test: its good requests, one user each, and the items that each must get. ``load``: load
    the snapshot into a server that was started anew."""

    def __init__(
        self, server: TritonServer | Elsewhere, model: ServedModel, wire: Mapping[str, np.ndarray],
        context: Mapping[str, np.ndarray], items: frozenset[int], load: Callable[[], object],
    ) -> None:  # fmt: skip
        self.server, self.model, self.items, self.load = server, model, items, load
        datatypes = {numpy: name for name, numpy in DTYPES.items()}
        self.requests = [dict(tensors) | dict(context) for tensors in each_user(wire)]
        self.datatypes = {name: datatypes[values.dtype.type] for name, values in self.requests[0].items()}
        self.good = serialise(model, self.requests, k=_K)
        self.expected: list[list[int]] = []

    async def learn(self) -> None:
        """What every good request gets before anything malformed was sent. ServerError when users cannot be told
        apart by it."""
        async with grpc.aio.insecure_channel(self.server.urls.grpc) as channel:
            call = channel.unary_unary(METHOD)
            self.expected = [items_of(await call(message, timeout=DEADLINE)) for message in self.good]
        if len(set(map(tuple, self.expected))) < len(self.expected) / 2:
            raise ServerError("the users of this run get the same items, so a wrong row could not be seen")


def items_of(answer: bytes) -> list[int]:
    """The items of an answer to one user, none where other outputs were asked for; ValueError for what is no answer."""
    reply = service_pb2.ModelInferResponse.FromString(answer)
    raw = {tensor.name: data for tensor, data in zip(reply.outputs, reply.raw_output_contents)}
    if not raw or not set(raw) <= {*OUTPUTS, "stage_us"}:
        raise ValueError(f"an answer with {sorted(raw)}")
    if not {"item_ids", "valid"} <= set(raw):
        return []
    ids, valid = np.frombuffer(raw["item_ids"], np.int64), np.frombuffer(raw["valid"], np.int32)
    if len(valid) != 1:
        return ids.tolist()
    return ids[: valid[0]].tolist()


class Fuzzer:
    """Sends malformed requests to a target, in rounds."""

    def __init__(self, target: Target, seed: int) -> None:
        self._target, self._rng = target, np.random.default_rng(seed)
        schema = target.model.schema
        self._grpc = GrpcRequests(schema, target.good, self._rng)
        self._http = HttpRequests(target.model.name, target.requests, target.datatypes, self._rng)
        self.tally = Tally()

    def run(self, requests: int, progress: Callable[[int], object] = lambda count: None) -> Tally:
        """Send changed ones until this many were malformed. A server of our own is started anew when it is not what it
        was; with another one it ends when a round's last request, a good one, fails."""
        asyncio.run(self._target.learn())
        began, server = time.monotonic(), self._target.server
        while (left := requests - self.tally.malformed) > 0:
            before = set(server.pids) if isinstance(server, TritonServer) else set()
            well = asyncio.run(self._round(min(left, _ROUND)))
            progress(left - (requests - self.tally.malformed))
            if isinstance(server, TritonServer):
                self._look(server, before)
            elif not well:
                break
        self.tally.seconds += time.monotonic() - began
        return self.tally

    async def _round(self, count: int) -> bool:
        """Send this many; whether a good request after them was answered as before."""
        free = asyncio.Semaphore(_UNDER_WAY)
        async with grpc.aio.insecure_channel(self._target.server.urls.grpc) as channel:

            async def one(work: Any) -> None:
                async with free:
                    await work

            works: list[Any] = []
            for _ in range(count):
                malformed = self._draw()
                self.tally.sent[malformed.what] += 1
                works.append(self._send(channel, malformed))
                if self._rng.random() < _GOOD:
                    works.append(self._check(channel, int(self._rng.integers(len(self._target.good)))))
            # And one after all of them: the round's smoke request.
            await asyncio.gather(*(one(work) for work in works))
            return await self._check(channel, 0)

    def _draw(self) -> Malformed:
        requests = self._http if self._rng.random() < _HTTP else self._grpc
        while (malformed := requests.draw()).kills:
            self.tally.left_out += 1
        return malformed

    def _look(self, server: TritonServer, before: set[int]) -> None:
        gone = before - set(server.pids)
        if gone:
            self.tally.find("crash", "the server", f"{len(gone)} processes ended", server.log_tail().encode())
            server.stop()
            server.start()
            self._target.load()
            self.tally.restarts += 1

    async def _check(self, channel: grpc.aio.Channel, user: int) -> bool:
        """Whether a good request got the items of its own user."""
        message, expected = self._target.good[user], self._target.expected[user]
        try:
            got = items_of(await channel.unary_unary(METHOD)(message, timeout=DEADLINE))
        except (grpc.aio.AioRpcError, ValueError) as error:
            self.tally.find("good request failed", "a good request", _text(error), message)
            return False
        if got != expected:
            others = "another user's" if got in self._target.expected else "unknown"
            self.tally.find("wrong answer", "a good request", f"{others} items", message)
            return False
        self.tally.good += 1
        return True

    async def _send(self, channel: grpc.aio.Channel, malformed: Malformed) -> None:
        if not malformed.method:
            await self._send_http(malformed)
            return
        try:
            answer = await channel.unary_unary(malformed.method)(malformed.body, timeout=DEADLINE)
        except grpc.aio.AioRpcError as error:
            self._judge_error(malformed, error)
            return
        self.tally.answered += 1
        if malformed.refused:
            self.tally.find("accepted", malformed.what, "answered", malformed.body)
            return
        self.tally.harmless += 1
        if malformed.method == METHOD:
            self._judge_items(malformed, lambda: items_of(answer))

    def _judge_error(self, malformed: Malformed, error: grpc.aio.AioRpcError) -> None:
        self.tally.refused += 1
        code, text = error.code(), error.details() or ""
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            self.tally.find("hang", malformed.what, "no answer", malformed.body)
        elif code not in _CODES or "Traceback" in text:
            self.tally.find("internal error", malformed.what, _text(error), malformed.body)

    def _judge_items(self, malformed: Malformed, items: Callable[[], Sequence[int]]) -> None:
        try:
            strange = set(items()) - self._target.items
        except (ValueError, KeyError, TypeError) as error:
            self.tally.find("no answer", malformed.what, repr(error), malformed.body)
            return
        if strange:
            self.tally.find(
                "wrong answer", malformed.what, "items that are not in the corpus", malformed.body
            )

    async def _send_http(self, malformed: Malformed) -> None:
        try:
            async with asyncio.timeout(_WAITS if malformed.short else DEADLINE):
                status, body = await _over_http(self._target.server.urls.http, malformed.body)
        except TimeoutError:
            self.tally.refused += 1
            if not malformed.short:
                self.tally.find("hang", malformed.what, "no answer", malformed.body)
            return
        except (OSError, ValueError) as error:
            self.tally.refused += 1
            if not malformed.short:
                self.tally.find("no answer", malformed.what, repr(error), malformed.body)
            return
        if status >= 500:
            text = body.decode(errors="replace")
            self.tally.find("internal error", malformed.what, f"{status}: {text}", malformed.body)
        elif status == 200:
            self.tally.answered += 1
            if malformed.refused:
                self.tally.find(
                    "accepted", malformed.what, body[:80].decode(errors="replace"), malformed.body
                )
                return
            self.tally.harmless += 1
            if not malformed.short:
                self._judge_items(malformed, lambda: _json_items(body))
            return
        self.tally.refused += 1


async def _over_http(url: str, request: bytes) -> tuple[int, bytes]:
    """Status and body of one request on a connection of its own."""
    host, _, port = url.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = re.search(r"^content-length: *(\d+)", head, re.IGNORECASE | re.MULTILINE)
        body = await reader.readexactly(int(length.group(1))) if length else b""
        return int(head.split()[1]), body
    except asyncio.IncompleteReadError as error:
        raise ValueError(f"the connection ended after {len(error.partial)} bytes") from None
    finally:
        writer.close()


def _json_items(body: bytes) -> list[int]:
    # Binary outputs, where a change asked for them, follow the JSON.
    reply, _ = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    outputs = {output["name"]: output for output in reply["outputs"]}
    if not {"item_ids", "valid"} <= set(outputs) or "data" not in outputs["valid"]:
        return []  # only some outputs were asked for, or in another form
    items: list[int] = outputs["item_ids"].get("data", [])
    return items[: outputs["valid"]["data"][0]] if len(outputs["valid"]["data"]) == 1 else items


def _text(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return repr(error)
