"""A real Prometheus that scrapes servers of this machine, for the tests of docker/prometheus and docker/grafana and for
the picture of the dashboard.

`make prometheus` unpacks Debian's package beside the virtual environment's own packages.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from hsnn_core.errors import ServerError
from hsnn_server.processes import HOST, free_ports, launch, wait_until

INSTALLED = Path(sys.prefix) / "prometheus" / "usr" / "bin"  # where `make prometheus` puts both
HOW = (
    "make prometheus gets Debian's package, where apt-get and dpkg-deb are; or install one and put it in PATH"
)
CONFIGURATION = Path(__file__).parents[1] / "docker" / "prometheus" / "prometheus.yml"
_START_SECONDS = 20.0
_STOP_SECONDS = 10.0


def find(name: str = "prometheus") -> Path:
    """The program (``prometheus`` or ``promtool``) in PATH, else where `make prometheus` puts it. ServerError says how
    to get it."""
    found = Path(shutil.which(name) or INSTALLED / name)
    if not found.is_file():
        raise ServerError(f"{name}: {found} is not there; {HOW}")
    return found


@dataclass(frozen=True)
class Series:
    """One series of an answer: its labels, unix times and values, of an instant query one of each."""

    labels: Mapping[str, str]
    times: Sequence[float]
    values: Sequence[float]


class Prometheus:
    """Prometheus on loopback with the shipped configuration, but other targets and a shorter interval.

    >>> with Prometheus([server.urls.metrics]) as prometheus:
    ...     prometheus.query("sum(rate(hsnn_requests_total[10s]))")

    ``targets``: host:port of Triton's metrics. ``interval``: seconds between scrapes and between evaluations of the
    alerts. Data go with it.
    """

    def __init__(self, targets: Sequence[str], interval: float = 1.0) -> None:
        self._targets, self._interval = list(targets), interval
        self._exit = ExitStack()
        self.url = ""

    def __enter__(self) -> Prometheus:
        binary = find()
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hsnn-prometheus-")))
            (folder / "prometheus.yml").write_text(yaml.safe_dump(self._configuration()))
            (port,) = free_ports(1)
            log = folder / "log"
            process = launch(
                [str(binary), f"--config.file={folder / 'prometheus.yml'}",
                 f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={HOST}:{port}"],
                {}, folder, log,
            )  # fmt: skip
            stack.callback(process.stop, _STOP_SECONDS)
            self.url = f"http://{HOST}:{port}"
            wait_until(lambda: _ready(self.url) or not process.alive(), _START_SECONDS)
            if not process.alive() or not _ready(self.url):
                tail = "\n".join(log.read_text().splitlines()[-5:])
                raise ServerError(f"{binary} did not start; the last lines of its log:\n{tail}")
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def query(self, expression: str) -> list[Series]:
        """The expression now. ServerError with Prometheus's own words when it is wrong."""
        return [
            Series(one["metric"], [one["value"][0]], [float(one["value"][1])])
            for one in _vector(self._ask("query", query=expression))
        ]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        """The expression between two unix times, every ``step`` seconds."""
        answer = self._ask("query_range", query=expression, start=start, end=end, step=step)
        return [
            Series(
                one["metric"], [at for at, _ in one["values"]], [float(value) for _, value in one["values"]]
            )
            for one in answer["result"]
        ]

    def rules(self) -> list[dict[str, Any]]:
        """The alert rules: ``name``, ``health`` ("ok" once evaluated without an error), ``lastError``, ``state``."""
        return [rule for group in self._ask("rules")["groups"] for rule in group["rules"]]

    def wait_for(self, expression: str, seconds: float) -> None:
        """Until the expression gives something; ServerError when it doesn't in that time."""
        until = time.monotonic() + seconds
        while not self.query(expression):
            if time.monotonic() > until:
                raise ServerError(f"Prometheus had nothing for {expression} in {seconds:g} s")
            time.sleep(0.1)

    def _configuration(self) -> dict[str, Any]:
        shipped = yaml.safe_load(CONFIGURATION.read_text())
        period = f"{round(self._interval * 1000)}ms"
        jobs = [job for job in shipped["scrape_configs"] if job["job_name"] == "hsnn"]
        return shipped | {
            "global": {"scrape_interval": period, "scrape_timeout": period, "evaluation_interval": period},
            "rule_files": [str(CONFIGURATION.parent / name) for name in shipped["rule_files"]],
            "scrape_configs": [job | {"static_configs": [{"targets": self._targets}]} for job in jobs],
        }

    def _ask(self, what: str, **arguments: Any) -> Any:
        address = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(address, timeout=20) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            said = json.load(error).get("error", error.reason)
            raise ServerError(f"Prometheus refused {arguments.get('query', what)}: {said}") from error


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=5):
            return True
    except OSError:
        return False


def _vector(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An instant answer's series; a scalar is one without labels."""
    result = answer["result"]
    return [{"metric": {}, "value": result}] if answer["resultType"] == "scalar" else list(result)
