"""The serving image's entrypoint: with a stand-in for tritonserver, and with the real one of the wheel."""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
from docker_checks import ROOT

from hsnn_core.errors import ServerError
from hsnn_server.binaries import environment, find_wheel, lay_out
from hsnn_server.probe import add_arguments as add_probe_arguments
from hsnn_server.processes import free_ports, remove_regions, wait_until
from hsnn_server.tracing import ENDPOINT, Tracing
from hsnn_server.triton import RESTRICTED

ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"
KEY = "0123456789abcdef"
# Records its arguments, and ends with 7 when it is told to stop.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$(dirname "$0")/arguments.tmp"
mv "$(dirname "$0")/arguments.tmp" "$(dirname "$0")/arguments"
trap 'exit 7' TERM
{then}
"""
FOREVER = "while :; do sleep 0.02; done"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a key, a repository of two models and room for a tritonserver."""
    (tmp_path / "key").write_text(KEY + "\n")
    (tmp_path / "bin").mkdir()
    for model in ("hsnn_retrieve", "hsnn_user_tower"):
        (tmp_path / "models" / model).mkdir(parents=True)
        (tmp_path / "models" / model / "config.pbtxt").touch()
    return tmp_path


def start(place: Path, *options: str, then: str | None = FOREVER) -> subprocess.Popen[str]:
    """The entrypoint over ``place``, with a stand-in that does ``then`` unless that is None."""
    if then is not None:
        script = place / "bin" / "tritonserver"
        script.write_text(STAND_IN.format(then=then))
        script.chmod(0o755)
    command = [str(ENTRYPOINT), f"--repository={place / 'models'}", f"--key-file={place / 'key'}", *options]
    return subprocess.Popen(
        command,
        env={"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "HOSTNAME": place.name},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def arguments(place: Path) -> list[str]:
    """What the stand-in was started with."""
    recorded = place / "bin" / "arguments"
    assert wait_until(recorded.exists, 5.0)
    return recorded.read_text().splitlines()


def refused(place: Path, *options: str) -> str:
    with start(place, *options, then="exit 0") as process:
        _, said = process.communicate(timeout=10)
    assert process.returncode == 1
    assert not (place / "bin" / "arguments").exists()
    return said


def test_the_script_parses_and_is_executable_in_git() -> None:
    subprocess.run(["bash", "-n", str(ENTRYPOINT)], check=True)
    staged = ["git", "ls-files", "--stage", "docker/entrypoint.sh"]
    listed = subprocess.run(staged, cwd=ROOT, capture_output=True, text=True, check=True)
    assert listed.stdout.startswith("100755 ")


def test_models_control_and_restrictions_are_explicit(place: Path) -> None:
    with start(place, "--", "--log-verbose=1", then="exit 0") as process:
        process.communicate(timeout=10)
    given = arguments(place)
    assert process.returncode == 0
    assert [a for a in given if a.startswith("--load-model")] == [
        "--load-model=hsnn_retrieve",
        "--load-model=hsnn_user_tower",
    ]
    assert {
        f"--model-repository={place / 'models'}",
        "--model-control-mode=explicit",
        "--disable-auto-complete-config",
        "--strict-readiness=false",
        f"--grpc-restricted-protocol={RESTRICTED}:admin-key={KEY}",
        f"--http-restricted-api={RESTRICTED}:admin-key={KEY}",
    } <= set(given)
    assert given[-1] == "--log-verbose=1"


def test_a_restart_does_not_start_a_canary(place: Path) -> None:
    (place / "models" / "hsnn_canary").mkdir()
    (place / "models" / "hsnn_canary" / "config.pbtxt").touch()
    with start(place, then="exit 0") as process:
        process.communicate(timeout=10)
    loaded = [argument for argument in arguments(place) if argument.startswith("--load-model=")]
    assert loaded == ["--load-model=hsnn_retrieve", "--load-model=hsnn_user_tower"]


def test_the_server_gets_the_signal_only_after_the_drain(place: Path) -> None:
    with start(place, "--drain-seconds=1") as process:
        arguments(place)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)  # impatience changes nothing
        _, said = process.communicate(timeout=10)
    assert time.monotonic() - began >= 1.0
    assert process.returncode == 7
    assert "stopping in 1 s" in said


def test_requests_in_flight_are_answered_before_the_server_ends(place: Path) -> None:
    stand_in(place, "python3", f'echo "$*" >> {place}/asked; [[ $1 != *drain.py || ! -e {place}/hangs ]]')
    with start(place, "--http-port=8123", "--drain-seconds=0", "--probe-failures=0") as process:
        arguments(place)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    assert process.returncode == 0  # nothing was in flight any more, so it was killed, in order
    path, *asked = (place / "asked").read_text().split()
    assert path.endswith("/drain.py")
    options = dict(zip(asked[::2], asked[1::2]))
    assert options.keys() == {"--url", "--key-file", "--timeout"}
    assert options["--url"] == "http://127.0.0.1:8123"
    assert "--http-port=8123" in arguments(place)
    (place / "bin" / "arguments").unlink()
    (place / "hangs").touch()
    with start(place, "--drain-seconds=0", "--probe-failures=0") as process:
        arguments(place)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    assert process.returncode == 7  # told to end, and waited for


def test_a_server_that_ends_by_itself_ends_the_container_with_its_status(place: Path) -> None:
    with start(place, then="exit 3") as process:
        process.communicate(timeout=10)
    assert process.returncode == 3


def stand_in(place: Path, name: str, script: str) -> None:
    (place / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
    (place / "bin" / name).chmod(0o755)


def test_a_server_that_answers_no_more_is_killed_so_that_the_container_ends(place: Path) -> None:
    stand_in(place, "sleep", "exec /bin/sleep 0.05")
    stand_in(
        place,
        "python3",
        f'echo "$*" > {place}/asked; [[ -e {place}/healthy ]] || {{ echo dead: no answer; exit 1; }}',
    )
    with start(place, "--probe-failures=2") as process:
        arguments(place)
        assert wait_until((place / "asked").exists, 5.0)
        time.sleep(0.3)
        assert process.poll() is None  # it has not answered yet: it loads
        (place / "healthy").touch()
        time.sleep(0.3)
        (place / "healthy").unlink()
        _, said = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGKILL
    assert "probe 2 of 2 failed: dead: no answer" in said
    assert "ending the server, it does not answer" in said
    path, *asked = (place / "asked").read_text().split()
    probe = argparse.ArgumentParser(exit_on_error=False)
    add_probe_arguments(probe)
    options = probe.parse_args(asked)
    assert options.live  # one that is busy must not be restarted
    assert options.busy_since is not None
    assert options.repository == place / "models"
    assert path.endswith("/probe.py")


def test_probes_can_be_left_to_whoever_runs_the_container(place: Path) -> None:
    stand_in(place, "sleep", "exec /bin/sleep 0.05")
    stand_in(place, "python3", f'echo "$*" >> {place}/asked')
    with start(place, "--probe-failures=0", "--drain-seconds=0") as process:
        arguments(place)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    assert "probe.py" not in (place / "asked").read_text()


def test_connections_end_by_age_within_a_drain(place: Path) -> None:
    with start(place, "--drain-seconds=20", then="exit 0") as process:
        process.communicate(timeout=10)
    (age,) = [a for a in arguments(place) if a.startswith("--grpc-max-connection-age=")]
    assert 10_000 < float(age.partition("=")[2]) * 1.1 < 20_000  # gRPC varies it by a tenth


def test_certificates_are_checked_and_handed_over(place: Path) -> None:
    for name in ("cert", "tls", "ca"):
        (place / name).touch()
    tls = [f"--tls-cert={place / 'cert'}", f"--tls-key={place / 'tls'}", f"--client-ca={place / 'ca'}"]
    with start(place, *tls, then="exit 0") as process:
        process.communicate(timeout=10)
    assert {
        "--grpc-use-ssl=true", f"--grpc-server-cert={place / 'cert'}", f"--grpc-server-key={place / 'tls'}",
        "--grpc-use-ssl-mutual=true", f"--grpc-root-cert={place / 'ca'}",
    } <= set(arguments(place))  # fmt: skip
    # HTTP has no TLS: it would let in who has no certificate. Prometheus needs the metrics.
    assert {"--http-address=127.0.0.1", "--metrics-address=0.0.0.0"} <= set(arguments(place))
    (place / "bin" / "arguments").unlink()
    with start(place, *tls[:2], then="exit 0") as process:
        process.communicate(timeout=10)
    assert not [argument for argument in arguments(place) if "address" in argument]
    (place / "bin" / "arguments").unlink()
    assert "give both or neither" in refused(place, tls[0])
    assert "--client-ca: needs --tls-cert" in refused(place, tls[2])
    (place / "tls").unlink()
    assert "tls: no such file, or not readable" in refused(place, *tls[:2])


def test_traces_are_asked_for_as_hsnn_serve_asks_for_them(place: Path) -> None:
    tracing = Tracing("http://collector:4318/v1/traces", 50)
    told = f'echo "${ENDPOINT}" > {place}/env; exit 0'
    with start(place, f"--trace-endpoint={tracing.endpoint}", "--trace-rate=50", then=told) as process:
        process.communicate(timeout=10)
    assert [a for a in arguments(place) if a.startswith("--trace")] == tracing.arguments()
    assert (place / "env").read_text().strip() == tracing.endpoint
    (place / "bin" / "arguments").unlink()
    with start(place, then=told) as process:
        process.communicate(timeout=10)
    assert not [a for a in arguments(place) if a.startswith("--trace")]
    assert (place / "env").read_text() == "\n"
    (place / "bin" / "arguments").unlink()
    assert "got 'collector:4318', expected a collector's address" in refused(
        place, "--trace-endpoint=collector:4318"
    )
    assert "--trace-rate: got '0', expected a whole number above 0" in refused(place, "--trace-rate=0")


def test_shared_memory_that_a_killed_server_left_is_removed(place: Path) -> None:
    left = Path("/dev/shm") / f"hsnn-{place.name}-1"
    others = Path("/dev/shm") / f"hsnn-other-{secrets.token_hex(4)}"
    left.touch()
    others.touch()
    try:
        with start(place, then="exit 0") as process:
            process.communicate(timeout=10)
        assert not left.exists()
        assert others.exists()
        assert f"--backend-config=python,shm-region-prefix-name=hsnn-{place.name}-" in arguments(place)
    finally:
        others.unlink()


def test_a_missing_or_weak_key_is_refused(place: Path) -> None:
    (place / "key").write_text("short")
    assert re.search(r"key: expected an admin key of at least 16 letters.*openssl rand", refused(place))
    (place / "key").write_text("long enough, but not one word")
    assert "expected an admin key" in refused(place)
    (place / "key").unlink()
    assert "key: no such file, or not readable by user" in refused(place)


def test_an_empty_repository_and_wrong_options_are_refused(place: Path) -> None:
    (place / "models" / "hsnn_retrieve" / "config.pbtxt").unlink()
    assert "no hsnn_retrieve there; publish first: hsnn publish" in refused(place)
    assert "--drain-seconds: got '5s', expected a whole number" in refused(place, "--drain-seconds=5s")
    assert "--probe-failures: got '', expected a whole number" in refused(place, "--probe-failures=")
    assert "--log-verbose=1: unknown option" in refused(place, "--log-verbose=1")


CONFIG = """
name: "hsnn_retrieve" backend: "python" max_batch_size: 1
input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""
MODEL = """
class TritonPythonModel:
    def execute(self, requests):
        return []
"""


@pytest.mark.triton
def test_the_real_triton_takes_the_arguments_is_healthy_and_restricted(place: Path) -> None:
    try:
        wheel = find_wheel()
    except ServerError as error:
        pytest.skip(str(error))
    models = place / "models"
    (models / "hsnn_user_tower" / "config.pbtxt").unlink()
    (models / "hsnn_retrieve" / "config.pbtxt").write_text(CONFIG)
    (models / "hsnn_retrieve" / "1").mkdir()
    (models / "hsnn_retrieve" / "1" / "model.py").write_text(MODEL)
    variables = environment(wheel, 1)
    wrapper = place / "bin" / "tritonserver"
    wrapper.write_text(
        f'#!/bin/sh\nexport LD_LIBRARY_PATH="{variables["LD_LIBRARY_PATH"]}" PATH="{variables["PATH"]}"\n'
        f'exec "{wheel.server}" "$@"\n'
    )
    wrapper.chmod(0o755)
    ports = dict(zip(("http", "grpc", "metrics"), free_ports(3)))
    prefix = f"hsnn-{place.name}-"
    process = start(
        place,
        "--drain-seconds=1",
        f"--http-port={ports['http']}",
        "--",
        f"--backend-directory={lay_out(wheel, place / 'backends')}",
        *(f"--{name}-port={port}" for name, port in ports.items() if name != "http"),
        *(f"--{name}-address=127.0.0.1" for name in ports),
        f"--log-file={place / 'triton.log'}",
        then=None,
    )
    try:
        ready = f"http://127.0.0.1:{ports['http']}/v2/models/hsnn_retrieve/ready"
        assert wait_until(lambda: process.poll() is not None or answers(ready), 30.0), "not ready in time"
        assert process.poll() is None, (place / "triton.log").read_text()[-3000:]
        index = f"http://127.0.0.1:{ports['http']}/v2/repository/index"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(index, method="POST"))
        with urllib.request.urlopen(
            urllib.request.Request(index, method="POST", headers={"admin-key": KEY})
        ) as answer:
            assert b"hsnn_retrieve" in answer.read()
        drained = subprocess.run(
            [sys.executable, ROOT / "docker" / "drain.py", "--url", f"http://127.0.0.1:{ports['http']}", "--key-file",
             place / "key"], capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert drained.returncode == 0, drained.stderr
        assert not answers(ready)
        assert "successfully unloaded 'hsnn_retrieve'" in (place / "triton.log").read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)
        remove_regions(prefix)


def answers(url: str) -> bool:
    """Whether the address answers with success."""
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.triton
def test_every_flag_is_one_of_the_real_tritonserver(place: Path) -> None:
    try:
        wheel = find_wheel()
    except ServerError as error:
        pytest.skip(str(error))
    (place / "file").touch()
    files = [f"--{name}={place / 'file'}" for name in ("tls-cert", "tls-key", "client-ca")]
    with start(place, *files, "--trace-endpoint=http://collector:4318/v1/traces", then="exit 0") as process:
        process.communicate(timeout=10)
    shown = subprocess.run(
        [str(wheel.server), "--help"], env=environment(wheel, 1), capture_output=True, text=True, check=False
    )
    known = set(re.findall(r"^  (--[\w-]+)", shown.stdout + shown.stderr, re.MULTILINE))
    given = {argument.partition("=")[0] for argument in arguments(place)}
    assert len(known) > 50
    assert given <= known


class _Triton(BaseHTTPRequestHandler):
    """Has one model, which is gone at the second look after it was told to unload."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def do_POST(self) -> None:
        self.asked.append((self.path, self.headers["admin-key"]))
        unloaded = [path for path, _ in self.asked].count("/v2/repository/index") > 2
        state = "UNAVAILABLE" if unloaded else "UNLOADING"
        body = json.dumps([{"name": "hsnn_retrieve", "version": "3", "state": state}]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def test_the_drain_waits_for_the_models_and_gives_no_proxy_the_key(tmp_path: Path) -> None:
    (key := tmp_path / "key").write_text(KEY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Triton)
    Thread(target=server.serve_forever, daemon=True).start()
    command = [sys.executable, ROOT / "docker" / "drain.py", "--url", f"http://127.0.0.1:{server.server_port}",
               "--key-file", key]  # fmt: skip
    proxies = {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    done = subprocess.run(command, env=os.environ | proxies, capture_output=True, text=True, timeout=60)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    index = "/v2/repository/index"
    assert [path for path, _ in _Triton.asked] == [
        index, "/v2/repository/models/hsnn_retrieve/unload", index, index,
    ]  # fmt: skip
    assert {sent for _, sent in _Triton.asked} == {KEY}
