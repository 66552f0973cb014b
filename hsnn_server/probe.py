"""Does a server answer? The smoke request of the snapshot that it serves, over HTTP, and a look at what comes back.

Standard library only: the serving image runs this file as it is, `python probe.py --url ... --repository ...`. One
user's request is asked, so a probe costs as much as any request.

A server that refuses because it is busy (QueueFull, DeadlineUnmeetable, DeadlineExceeded) is alive. Who restarts what
fails must not restart that one, or an overload would take away what is left. So there are two more questions:

    --ready   may it get requests?       healthy or busy; not one that answers wrongly
    --live    would a restart only harm? that, and wrong answers: the same files would be loaded

`--live` also asks the writer of item updates, whose process nobody else brings back in a container. And where it is
told a file to remember in, a server that has been busy for five minutes and answered nobody in them hangs: it is dead.
"""

from __future__ import annotations

import argparse
import ast
import http.client
import json
import math
import re
import socket
import sqlite3
import struct
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MODEL, WRITER = "hsnn_retrieve", "hsnn_index"
HEALTHY, BUSY, WRONG, DEAD = "healthy", "busy", "wrong", "dead"
TIMEOUT = 2.0  # seconds; Triton takes one to say that a stub is dead
HANGING = 300.0  # seconds of refusals without an answer to anybody; an overload answers as many as it can
# Of a probability. TensorRT multiplies float32 in TF32, which has 10 bits of mantissa.
TOLERANCE = 5e-3
_REFUSALS = ("QueueFull", "DeadlineUnmeetable", "DeadlineExceeded")
_DEAD_STUB = re.compile(r"Stub process .* is not healthy")
_ATTEMPTS = 2  # a rollout may change the served version between the two calls of a probe
_WIRE = {"<f4": ("FP32", "f"), "<i8": ("INT64", "q"), "<i4": ("INT32", "i"), "<f8": ("FP64", "d")}
_FORMATS = dict(_WIRE.values())


@dataclass(frozen=True)
class Verdict:
    """What one probe found: ``state`` HEALTHY; BUSY (it refused, clearly and in time); WRONG (it answered, but not as
    its snapshot does); DEAD (anything else, no answer included). ``reason``: one line; ``seconds``: what it took;
    ``answered``: of a busy server, the requests that its version has answered so far, None where that is not known."""

    state: str
    reason: str
    seconds: float
    answered: int | None = None

    @property
    def alive(self) -> bool:
        """Whether restarting could only do harm."""
        return self.state != DEAD

    @property
    def ready(self) -> bool:
        """Whether it should get requests."""
        return self.state in (HEALTHY, BUSY)

    def __str__(self) -> str:
        return f"{self.state}: {self.reason} ({1000 * self.seconds:.0f} ms)"


class _Unanswered(Exception):
    """The verdict, as an exception: (state, reason)."""


@dataclass(frozen=True)
class _Array:
    """An array of a .npy file, not decoded: its type's name in NumPy, shape, and bytes in C order."""

    kind: str
    shape: tuple[int, ...]
    data: bytes

    def first(self) -> tuple[float, ...]:
        """The values of its first row."""
        code = _WIRE[self.kind][1]
        count = math.prod(self.shape[1:])
        return struct.unpack_from(f"<{count}{code}", self.data)


@dataclass(frozen=True)
class Standstill:
    """That a server is busy and answers nobody: ``since`` when, on a clock of seconds that only goes forward, and how
    many requests it had ``answered`` then."""

    since: float
    answered: float

    @classmethod
    def after(cls, before: Standstill | None, verdict: Verdict, now: float) -> Standstill | None:
        """What is known after ``verdict`` where ``before`` was; None: it has answered, or was never counted."""
        if verdict.state in (HEALTHY, WRONG):
            return None
        if verdict.answered is None or (
            before and before.answered == verdict.answered and before.since <= now
        ):
            return before
        return cls(now, verdict.answered)

    def hangs(self, verdict: Verdict, now: float, patience: float = HANGING) -> bool:
        """Whether it has lasted until ``verdict``, and too long to be an overload."""
        return verdict.answered == self.answered and now - self.since >= patience

    def reason(self, now: float, verdict: Verdict) -> str:
        """What to say of it then."""
        return f"it has refused for {now - self.since:.0f} s and answered nobody in them; {verdict.reason}"


def probe(
    url: str,
    repository: str | Path,
    timeout: float = TIMEOUT,
    *,
    writer: bool = False,
    metrics: str | None = None,
) -> Verdict:
    """Ask the server at ``url`` (http://host:port) that serves ``repository`` its smoke request once; never raises for
    what a server or a repository may be like. Takes at most ``timeout`` seconds; the server is told a tenth less.

    ``writer``: an item writer (hsnn_index) whose process has died makes a server DEAD that is not busy; one that is not
    loaded, refuses, or takes longer (a large batch) does not. ``metrics``: where a busy server counts its answers
    (http://host:port), for `Verdict.answered`."""
    began = time.monotonic()
    answered = None
    try:
        asked = _Probe(url, Path(repository), began + timeout, timeout)
        state, reason = asked.found()
        if state == BUSY and metrics is not None:
            answered = asked.answered(metrics)
        elif writer and state in (HEALTHY, WRONG) and (said := asked.dead_writer()):
            state, reason = DEAD, f"the process of {WRITER} has died: {said}"
    except _Unanswered as found:
        state, reason = found.args
    return Verdict(state, reason, time.monotonic() - began, answered)


class _Probe:
    def __init__(self, url: str, repository: Path, until: float, timeout: float) -> None:
        self._address = _address(url, 8000)
        self._url, self._repository, self._until, self._timeout = url, repository, until, timeout
        self._version = 0

    def found(self) -> tuple[str, str]:
        """State and reason."""
        try:
            return HEALTHY, self._run()
        except _Unanswered as found:
            state, reason = found.args
            return state, reason
        except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
            return WRONG, f"what answers at {self._url} is not the {MODEL} of {self._repository} ({error!r})"

    def dead_writer(self) -> str:
        """What Triton says of an item writer whose process has died, "" when it does not say that. A call of no update
        takes the log's lock and gives it back."""
        updates = {"name": "updates", "datatype": "BYTES", "shape": [0], "data": []}
        asked = json.dumps({"inputs": [updates], "outputs": [{"name": "position"}]}).encode()
        try:
            status, _, body = self._call("POST", f"/v2/models/{WRITER}/infer", asked)
        except _Unanswered:
            return ""
        said = _error(body)
        return said if status != 200 and _DEAD_STUB.search(said) else ""

    def answered(self, metrics: str) -> int | None:
        """How many requests the version has answered by the metrics at this address."""
        pattern = re.compile(
            rf'hsnn_requests_total{{(?=.*outcome="ok")(?=.*version="{self._version}").*}} (\S+)'
        )
        try:
            _, _, body = self._call("GET", "/metrics", address=_address(metrics, 8002))
            lines = [line for text in body.decode().splitlines() if (line := pattern.match(text))]
            return sum(int(float(line[1])) for line in lines) if lines else None
        except (_Unanswered, ValueError):
            return None

    def _run(self) -> str:
        for attempt in range(_ATTEMPTS):
            version = self._version = self._served()
            smoke = self._smoke(version)
            if smoke is None:
                continue
            status, headers, body = self._call(*self._request(smoke))
            if status != 200:
                self._refused(status, body)
            answer, tensors = _decoded(headers, body)
            if int(answer["model_version"]) == version or attempt == _ATTEMPTS - 1:
                return self._checked(version, tensors, smoke)
        raise _Unanswered(
            DEAD,
            f"version {version} of {MODEL} is served, but {self._directory(version)} has no smoke.npz; expected "
            "--repository to be the one that is served",
        )

    def _served(self) -> int:
        status, _, body = self._call("GET", f"/v2/models/{MODEL}")
        if status != 200:
            self._refused(status, body)
        versions = [int(version) for version in json.loads(body).get("versions", [])]
        if not versions:
            raise _Unanswered(DEAD, f"no version of {MODEL} is loaded")
        return max(versions)

    def _directory(self, version: int) -> Path:
        return self._repository / MODEL / str(version)

    def _smoke(self, version: int) -> dict[str, _Array] | None:
        """The arrays of the version's smoke.npz; None when it is gone (it was rolled back this moment)."""
        path = self._directory(version) / "smoke.npz"
        try:
            with zipfile.ZipFile(path) as archive:
                return {Path(name).stem: _array(archive.read(name)) for name in archive.namelist()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, struct.error, zipfile.BadZipFile) as error:
            raise _Unanswered(DEAD, f"{path}: not readable as the smoke request ({error!r})") from error

    def _request(self, smoke: Mapping[str, _Array]) -> tuple[str, str, bytes, dict[str, str]]:
        inputs, parts = [], []
        for name, array in smoke.items():
            if not name.startswith("user."):
                continue
            data = array.data[: len(array.data) // array.shape[0]]  # the first user's
            inputs.append({
                "name": name.removeprefix("user."), "shape": [1, *array.shape[1:]],
                "datatype": _WIRE[array.kind][0], "parameters": {"binary_data_size": len(data)},
            })  # fmt: skip
            parts.append(data)
        # Told less than it waits for: a connection that closes as the answer comes may keep the request in Triton.
        left = max(1, int(0.9e6 * (self._until - time.monotonic())))
        names = ("item_ids", "probabilities", "rank_score", "valid")
        outputs = [{"name": name, "parameters": {"binary_data": True}} for name in names]
        head = json.dumps({"inputs": inputs, "outputs": outputs, "parameters": {"timeout": left}}).encode()
        headers = {
            "Inference-Header-Content-Length": str(len(head)),
            "Content-Type": "application/octet-stream",
        }
        return "POST", f"/v2/models/{MODEL}/infer", head + b"".join(parts), headers

    def _call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        address: tuple[str, int] | None = None,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        left = self._until - time.monotonic()
        late = f"no answer within {self._timeout:g} s"
        if left <= 0:
            raise _Unanswered(DEAD, late)
        host, port = address or self._address
        connection = http.client.HTTPConnection(host, port, timeout=left)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        except TimeoutError as error:
            raise _Unanswered(DEAD, late) from error
        except (OSError, http.client.HTTPException, socket.gaierror) as error:
            raise _Unanswered(DEAD, f"nobody answers at {host}:{port} ({error})") from error
        finally:
            connection.close()

    def _refused(self, status: int, body: bytes) -> None:
        text = _error(body)
        if text.partition(":")[0] in _REFUSALS:
            raise _Unanswered(BUSY, f"it refused the smoke request: {text}")
        raise _Unanswered(DEAD, f"HTTP {status}: {text}")

    def _checked(self, version: int, answer: Mapping[str, _Array], smoke: Mapping[str, _Array]) -> str:
        tensors = {name: array.first() for name, array in answer.items()}
        count = int(tensors["valid"][0])
        tasks = answer["probabilities"].shape[-1]
        items = [int(item) for item in tensors["item_ids"][:count]]
        scores = tensors["rank_score"][:count]
        rows = _rows(tensors["probabilities"], tasks)[:count]
        sound = all(0 <= value <= 1 for row in rows for value in row) and all(map(math.isfinite, scores))
        if not sound or list(scores) != sorted(scores, reverse=True) or len(set(items)) != count:
            raise _Unanswered(
                WRONG,
                f"version {version} answers {count} items that are no ranking; expected different items, finite "
                "scores in descending order and probabilities from 0 to 1: see the server's log, roll back",
            )
        expected = dict(
            zip(map(int, smoke["item_ids"].first()), _rows(smoke["probabilities"].first(), tasks))
        )
        gaps = [
            max(abs(a - b) for a, b in zip(row, expected[item]))
            for item, row in zip(items, rows)
            if item in expected
        ]
        same = sum(gap <= TOLERANCE for gap in gaps)
        if 2 * same < len(gaps) and not _items_changed(self._repository, self._directory(version)):
            raise _Unanswered(
                WRONG,
                f"version {version} answers {same} of {len(gaps)} items with the probabilities of its snapshot (within "
                f"{TOLERANCE:g}), expected at least half of them, as no item has changed since: roll back",
            )
        return f"version {version} answers {count} items, {same} of them as at its export"


def _address(url: str, port: int) -> tuple[str, int]:
    """Host and port, ``port`` where it names none."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    try:
        if parts.scheme == "http" and parts.hostname:
            return parts.hostname, parts.port or port
    except ValueError:  # no number, or none of a port
        pass
    raise _Unanswered(DEAD, f"{url}: expected http://host:port, an endpoint of Triton's HTTP")


def _error(body: bytes) -> str:
    """What Triton says that failed, in one line."""
    try:
        text = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        text = body[:200].decode(errors="replace")
    return " ".join(text.split())


def _rows(values: Sequence[float], width: int) -> list[Sequence[float]]:
    return [values[start : start + width] for start in range(0, len(values), width)]


def _array(content: bytes) -> _Array:
    """A .npy file (format 1 to 3), as NumPy documents it."""
    if content[:6] != b"\x93NUMPY":
        raise ValueError("not a .npy file")
    wide = content[6] >= 2
    (length,) = struct.unpack_from("<I" if wide else "<H", content, 8)
    start = (12 if wide else 10) + length
    head = ast.literal_eval(content[12 if wide else 10 : start].decode())
    if head["fortran_order"] or head["descr"] not in _WIRE:
        raise ValueError(f"an array of {head['descr']}, expected one of {sorted(_WIRE)} in C order")
    return _Array(head["descr"], tuple(head["shape"]), content[start:])


def _decoded(headers: http.client.HTTPMessage, body: bytes) -> tuple[dict[str, Any], dict[str, _Array]]:
    """The JSON of an answer and its tensors; _Unanswered(WRONG) when they are not what was asked for."""
    kinds = {wire: kind for kind, (wire, _) in _WIRE.items()}
    try:
        at = int(headers["Inference-Header-Content-Length"])
        answer = json.loads(body[:at])
        tensors = {}
        for output in answer["outputs"]:
            size = output["parameters"]["binary_data_size"]
            array = _Array(kinds[output["datatype"]], tuple(output["shape"]), body[at : at + size])
            if len(array.data) != math.prod(array.shape) * struct.calcsize(_FORMATS[output["datatype"]]):
                raise ValueError(f"{output['name']}: {size} bytes do not fit {array.shape}")
            tensors[output["name"]] = array
            at += size
        return answer, {name: tensors[name] for name in ("item_ids", "probabilities", "rank_score", "valid")}
    except (ValueError, KeyError, TypeError) as error:
        raise _Unanswered(WRONG, f"the answer is not one of {MODEL} ({error!r})") from error


def _items_changed(repository: Path, directory: Path) -> bool:
    """Whether the item log has updates that the snapshot of ``directory`` does not contain; where that can't be read,
    it may."""
    try:
        text = (repository / MODEL / "config.pbtxt").read_text()
        found = re.search(r'key:\s*"item_log"\s*value\s*{\s*string_value:\s*"([^"]*)"', text)
        log = repository / (found.group(1) if found else ".items/log.db")
        if not log.exists():
            return False
        contained = json.loads((directory / "manifest.json").read_text()).get("log_position", 0)
        database = sqlite3.connect(f"{log.absolute().as_uri()}?mode=ro", uri=True, timeout=0.1)
        try:
            (position,) = database.execute("SELECT coalesce(max(position), 0) FROM items").fetchone()
        finally:
            database.close()
        return bool(position > contained)
    except (OSError, ValueError, sqlite3.Error):
        return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this file as a command, and of `hsnn health`."""
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="Triton's HTTP endpoint (default: %(default)s)"
    )
    parser.add_argument(
        "--repository", type=Path, required=True, metavar="DIR", help="the model repository it serves"
    )
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="SECONDS",
                        help="for the whole probe, the server is told (default: %(default)s)")  # fmt: skip
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--ready", action="store_true", help="for what sends it requests: a server that refuses as it "
                       "is busy is well, one that answers wrongly is not")  # fmt: skip
    modes.add_argument("--live", action="store_true", help="for what restarts it: a server that refuses as it is "
                       "busy, or answers wrongly, is alive; one whose item writer has died is not")  # fmt: skip
    parser.add_argument("--busy-since", type=Path, metavar="FILE", help="with --live, remembered from one probe to the "
                        f"next: busy for {HANGING:g} s without an answer to anybody is dead; remove it where the "
                        "server is started")  # fmt: skip
    parser.add_argument("--metrics-url", default="http://127.0.0.1:8002", metavar="URL",
                        help="Triton's metrics, which --busy-since needs (default: %(default)s)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Probe and print one line; 0: healthy (with --ready: or busy; with --live: alive), 1: not."""
    remembers = options.live and options.busy_since is not None
    verdict = probe(
        options.url,
        options.repository,
        options.timeout,
        writer=options.live,
        metrics=options.metrics_url if remembers else None,
    )
    if remembers:
        verdict = _remembered(verdict, options.busy_since, time.monotonic())
    print(verdict)
    good = verdict.alive if options.live else verdict.ready if options.ready else verdict.state == HEALTHY
    return 0 if good else 1


def _remembered(verdict: Verdict, path: Path, now: float) -> Verdict:
    """The verdict in the light of those before it; a file that cannot be read or written remembers nothing."""
    try:
        before = Standstill(*map(float, path.read_text().split()))
    except (OSError, ValueError, TypeError):
        before = None
    standstill = Standstill.after(before, verdict, now)
    try:
        if standstill is None:
            path.unlink(missing_ok=True)
        elif standstill != before:
            path.write_text(f"{standstill.since!r} {standstill.answered}")
    except OSError:
        pass
    if standstill is None or not standstill.hangs(verdict, now):
        return verdict
    return replace(verdict, state=DEAD, reason=standstill.reason(now, verdict))


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(
        prog="probe.py", description="Ask a server its smoke request; exit with 0 when it answers."
    )
    add_arguments(arguments)
    sys.exit(run(arguments.parse_args()))
