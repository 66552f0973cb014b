"""docker/prometheus and docker/grafana: checked by Prometheus's own tools, and every query asked of a real Prometheus
that scrapes a real Triton under load."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from collector import Collector, collecting
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from index_repository import write_index
from opentelemetry.sdk.trace import TracerProvider
from tiny_snapshot import LAYERS, item_ids, tiny_users, write_configs, write_snapshot

from clients.aio import AsyncRetrievalClient
from clients.items import ItemClient
from clients.retrieval import RetrievalClient
from clients.tracing import Trace
from hsnn_bench.dashboard import FILE, draw, panels
from hsnn_bench.prometheus import CONFIGURATION, Prometheus, find
from hsnn_cli.main import main
from hsnn_core.errors import HsnnError, ServerError
from hsnn_server.processes import wait_until
from hsnn_server.tracing import Tracing
from hsnn_server.triton import TritonServer

ROOT = Path(__file__).parents[2]
ALERTS = CONFIGURATION.parent / "alerts.yml"
VERSION = 7
NAMES = [
    "HsnnDown", "HsnnNotAnswering", "HsnnErrors", "HsnnSlow", "HsnnRefusing", "HsnnNearCapacity",
    "HsnnEmptyResults", "HsnnItemLogBehind", "HsnnUpdatesFailed", "HsnnUpdatesUnanswered", "HsnnCompactionDue",
    "HsnnSnapshotOld", "HsnnBlsFailures",
]  # fmt: skip
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
METRIC = re.compile(r"\b((?:hsnn|nv)_\w+?)(?:_bucket|_sum|_count)?\b(?=[{\[)]| >| <| /)")


@pytest.fixture(scope="session")
def promtool() -> Path:
    try:
        return find("promtool")
    except ServerError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ],
    ids=" ".join,
)
def test_promtool_is_content(promtool: Path, arguments: list[str]) -> None:
    ran = subprocess.run([promtool, *arguments], cwd=ALERTS.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "SUCCESS" in ran.stdout


def test_every_alert_says_what_to_do_and_fires_in_a_test() -> None:
    assert [rule["alert"] for rule in RULES] == NAMES
    for rule in RULES:
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["labels"] in ({"severity": "page"}, {"severity": "ticket"})
    scenarios = yaml.safe_load((ALERTS.parent / "alerts_test.yml").read_text())["tests"]
    fired = re.findall(r'alertname="(\w+)"', json.dumps(scenarios).replace("\\", ""))
    assert set(fired) - {"firing"} == set(NAMES)


def test_every_alert_has_its_section_in_the_runbook() -> None:
    guide = (ROOT / "docs" / "operations.md").read_text()
    headings = re.findall(r"^#+ (Hsnn\w+)\s*$", guide, re.MULTILINE)
    assert sorted(headings) == sorted(NAMES)


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads(FILE.read_text())
    assert dashboard["uid"] == "hsnn"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    cells = [
        (x, y)
        for panel in panels("1m")
        for x in range(panel.place[0], panel.place[0] + panel.place[2])
        for y in range(panel.place[1], panel.place[1] + panel.place[3])
    ]
    assert len(cells) == len(set(cells)), "no panel lies on another"
    assert max(x for x, _ in cells) < 24
    for panel in dashboard["panels"]:
        assert [target["datasource"]["uid"] for target in panel["targets"]] == ["${datasource}"] * len(
            panel["targets"]
        )


def as_grafana_reads_it(dashboard: dict[str, Any]) -> dict[str, Any]:
    """Through Grafana's own types: a field that they do not know is lost."""
    read: dict[str, Any] = json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))
    return read


def lost(given: Any, read: Any, where: str = "") -> list[str]:
    """What is in ``given`` and is not the same in ``read``, by its path."""
    if isinstance(given, dict):
        return [one for key in given for one in lost(given[key], read.get(key), f"{where}.{key}")]
    if isinstance(given, list) and len(given) == len(read or ()):
        return [
            one
            for i, (ours, theirs) in enumerate(zip(given, read))
            for one in lost(ours, theirs, f"{where}.{i}")
        ]
    return [] if given == read else [where]


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    register_default_plugins()
    dashboard = json.loads(FILE.read_text())
    assert lost(dashboard, as_grafana_reads_it(dashboard)) == []
    dashboard["panels"][7]["options"]["legend"]["palcement"] = "bottom"
    dashboard["refersh"] = "5s"
    assert lost(dashboard, as_grafana_reads_it(dashboard)) == [
        ".panels.7.options.legend.palcement",
        ".refersh",
    ]


def test_grafana_finds_what_it_is_given() -> None:
    grafana = FILE.parents[1]
    (provider,) = yaml.safe_load((grafana / "provisioning/dashboards/hsnn.yaml").read_text())["providers"]
    assert provider["options"]["path"].endswith(f"/{FILE.parent.name}")
    (source,) = yaml.safe_load((grafana / "provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    shipped = yaml.safe_load(CONFIGURATION.read_text())
    assert source["jsonData"]["timeInterval"] == shipped["global"]["scrape_interval"]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def server(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    snapshot = write_snapshot(tmp_path_factory.mktemp("repository"), VERSION)
    write_configs(snapshot.root, snapshot.schema, {"hsnn_retrieve": {"workers": "1", "queue": "2"}})
    write_index(snapshot.root, VERSION, snapshot.schema)
    networks = ["hsnn_user_tower", *(f"hsnn_scorer_l{layer}" for layer in range(1, LAYERS + 1))]
    with TritonServer(
        snapshot.root,
        models=[*networks, "hsnn_retrieve", "hsnn_index"],
        tracing=Tracing(collector.endpoint, rate=10**6),
        arguments=["--trace-config=opentelemetry,bsp_schedule_delay=100"],
    ) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(promtool: Path, server: TritonServer) -> Iterator[Prometheus]:
    """One that has scraped a server under load: answers, empty ones, filtered, wrong and refused requests."""
    with (
        Prometheus([server.urls.metrics], interval=0.25) as running,
        RetrievalClient(server.urls.grpc, timeout=20) as client,
        ItemClient(server.urls.grpc) as items,
        ThreadPoolExecutor(8) as pool,
    ):
        options: list[dict[str, Any]] = [
            {},
            {"exclude_items": item_ids()[:20]},
            {"exclude_items": item_ids()},
            {"k": 101},
        ]

        def ask(number: int) -> None:
            with suppress(HsnnError):
                client.retrieve(tiny_users(), **options[number % len(options)])

        running.wait_for("hsnn_workers", 20)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            list(pool.map(ask, range(64)))
            items.upsert([{"id": 1, "features": {"unknown": 1}}])
        yield running


@pytest.mark.triton
def test_top_shows_what_a_server_does(server: TritonServer, capsys: pytest.CaptureFixture[str]) -> None:
    with RetrievalClient(server.urls.grpc, timeout=20) as client, ThreadPoolExecutor(1) as pool:
        client.connect()
        looking = pool.submit(main, ["top", "--url", server.urls.metrics, "--url", "127.0.0.1:9", "--once"])
        while not looking.done():
            client.retrieve(tiny_users())
    assert looking.result() == 0
    shown = capsys.readouterr().out
    assert server.urls.metrics in shown
    header = next(line for line in shown.splitlines() if line.startswith("version  requests/s"))
    row = shown.splitlines()[shown.splitlines().index(header) + 2].split()
    assert row[0] == str(VERSION)
    assert float(row[1].replace(",", "")) > 0
    assert 0 < float(row[2]) <= float(row[3]), "p50 and p99"
    for text in (
        "nodes per user",
        "overload/s",
        "s old",
        "127.0.0.1:9 ",
        "does not answer: metrics at 127.0.0.1:9",
    ):
        assert text in shown, shown
    assert main(["top", "--url", "127.0.0.1:9", "--once", "--every", "0.5"]) == 1
    assert main(["top", "--every", "0.1"]) == 1
    said = capsys.readouterr().err
    assert "none of the servers answered; is --url the address" in said
    assert "--every: got 0.1, expected at least 0.5 seconds" in said


@pytest.mark.triton
@pytest.mark.parametrize("panel", panels("10s"), ids=lambda panel: panel.title)
def test_every_query_of_the_dashboard_gives_data(prometheus: Prometheus, panel: Any) -> None:
    for query in panel.queries:
        series = prometheus.query(query.expression)
        assert series, query.expression
        assert all(math.isfinite(one.values[0]) for one in series), (query.expression, series)
        assert all(query.name(one.labels).strip() for one in series) == bool(query.legend)


@pytest.mark.triton
def test_the_dashboards_figures_are_true(prometheus: Prometheus) -> None:
    by_title = {panel.title: panel.queries[0].expression for panel in panels("30s")}
    (empty,) = prometheus.query(by_title["Users without any item"])
    assert 0.1 < empty.values[0] < 0.6, "one request in three that was answered"
    refused = {
        one.labels["outcome"]: one.values[0] for one in prometheus.query(by_title["Refused, by reason"])
    }
    assert refused["overload"] > 0
    updates = {
        one.labels["outcome"]: one.values[0]
        for one in prometheus.query(by_title["Item updates a second, by outcome"])
    }
    assert updates["refused"] > 0 == updates["applied"] == updates["failed"]
    (age,) = prometheus.query(by_title["Snapshot age"])
    assert 0 < age.values[0] < 600
    (servers,) = prometheus.query("count(hsnn_workers)")
    assert servers.values == [1]


@pytest.mark.triton
def test_every_alert_is_evaluated_over_metrics_that_exist(prometheus: Prometheus) -> None:
    prometheus.wait_for('ALERTS{alertname="HsnnRefusing"}', 20)
    states = {rule["name"]: (rule["health"], rule.get("lastError")) for rule in prometheus.rules()}
    assert states == dict.fromkeys(NAMES, ("ok", None))
    for rule in RULES:
        prometheus.query(rule["expr"])
        metrics = METRIC.findall(rule["expr"])
        assert metrics or rule["alert"] == "HsnnDown"
        for metric in metrics:
            assert prometheus.query(f'{{__name__=~"{metric}(_bucket)?"}}'), (rule["alert"], metric)


@pytest.mark.triton
def test_a_wrong_query_is_refused_with_prometheus_words(prometheus: Prometheus) -> None:
    with pytest.raises(ServerError, match=r"Prometheus refused rate\(hsnn_items\): .*range vector"):
        prometheus.query("rate(hsnn_items)")


@pytest.mark.triton
def test_the_dashboard_is_drawn(prometheus: Prometheus, tmp_path: Path) -> None:
    end = time.time()
    shown = panels("5s")[:8]
    draw(lambda e: prometheus.query_range(e, end - 5, end, 0.5), shown, tmp_path / "d.png", "by matplotlib")
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


STAGES = ["hsnn.wait", "hsnn.prepare", "hsnn.user_tower", *(f"hsnn.layer.{n}" for n in range(1, LAYERS + 1))]


TRITONS = {"InferRequest", "hsnn_retrieve"}


@pytest.mark.triton
def test_a_trace_leads_from_the_client_through_triton_to_the_layers(
    server: TritonServer, collector: Collector
) -> None:
    tracer = TracerProvider().get_tracer("ad server")
    ours: list[Any] = []

    def send() -> str:
        with tracer.start_as_current_span("auction") as span:
            trace = Trace.current()
            assert trace is not None
            client.retrieve(tiny_users(), trace=trace)
        ours.append(span.get_span_context())
        return trace.trace_id

    with RetrievalClient(server.urls.grpc, timeout=20) as client:
        spans = collector.traced(send, TRITONS | {"hsnn.retrieve", *STAGES})
    assert spans["InferRequest"]["traceId"] == f"{ours[-1].trace_id:032x}"
    assert spans["InferRequest"]["parentSpanId"] == f"{ours[-1].span_id:016x}"
    assert spans["hsnn_retrieve"]["parentSpanId"] == spans["InferRequest"]["spanId"]
    assert spans["hsnn.retrieve"]["parentSpanId"] == spans["hsnn_retrieve"]["spanId"]
    assert {spans[name]["parentSpanId"] for name in STAGES} == {spans["hsnn.retrieve"]["spanId"]}
    whole, stages = spans["hsnn.retrieve"], [spans[name] for name in STAGES]
    moments = [int(span[at]) for span in stages for at in ("startTimeUnixNano", "endTimeUnixNano")]
    assert moments == sorted(moments), "one after the other"
    assert int(whole["startTimeUnixNano"]) == moments[0]
    assert moments[-1] <= int(whole["endTimeUnixNano"])
    assert whole["attributes"] == {"hsnn.outcome": "ok", "hsnn.users": "8"}
    assert (
        int(stages[-1]["attributes"]["hsnn.candidates"]) >= int(stages[-1]["attributes"]["hsnn.kept"]) == 80
    )
    assert spans["hsnn_retrieve"]["service"] == "triton"
    assert whole["service"] == "hsnn_retrieve"


@pytest.mark.triton
@pytest.mark.parametrize(
    ("options", "outcome", "why"),
    [
        ({"k": 101}, "invalid", "RequestError: k: got 101"),
        ({"after": 10**12, "timeout": 0.3}, "deadline", "DeadlineExceeded: the request took"),
    ],
)
def test_a_failed_requests_span_says_why_and_holds_no_features(
    server: TritonServer, collector: Collector, options: dict[str, Any], outcome: str, why: str
) -> None:
    async def ask(trace: Trace) -> None:
        async with AsyncRetrievalClient(server.urls.grpc, timeout=20) as client:
            with suppress(HsnnError):
                await client.retrieve([{"history": [-(2**62)]}], trace=trace, **options)

    def send() -> str:
        trace = Trace.new()
        asyncio.run(ask(trace))
        return trace.trace_id

    spans = collector.traced(send, TRITONS | {"hsnn.retrieve"})
    failed = spans["hsnn.retrieve"]
    assert failed["attributes"]["hsnn.outcome"] == outcome
    assert failed["status"]["code"] == 2
    assert failed["status"]["message"].startswith(why)
    assert "hsnn.layer.1" not in spans
    assert str(2**62) not in json.dumps(spans)


@pytest.mark.triton
def test_only_sampled_requests_are_traced_and_many_at_once(
    server: TritonServer, collector: Collector
) -> None:
    """Triton crashed when spans of the networks were asked for under load (see request_spans.py)."""
    unsampled = Trace(Trace.new().traceparent.removesuffix("01") + "00")
    sampled = [Trace.new() for _ in range(200)]
    with RetrievalClient(server.urls.grpc, timeout=20) as client, ThreadPoolExecutor(2) as pool:
        client.retrieve([{}], trace=unsampled)
        client.retrieve([{}])
        list(pool.map(lambda trace: client.retrieve([{}], trace=trace), sampled))

        def traced() -> set[str]:
            return {span["traceId"] for span in list(collector.spans)}

        wanted = {trace.trace_id for trace in sampled}
        assert wait_until(lambda: len(wanted & traced()) > 160, 10)
        assert unsampled.trace_id not in traced()


@pytest.mark.triton
def test_without_a_collector_requests_are_answered(server: TritonServer, collector: Collector) -> None:
    said = f"spans could not be sent to {collector.endpoint}: it answered 500"
    collector.status = 500
    with RetrievalClient(server.urls.grpc, timeout=20) as client:

        def ask_and_look() -> bool:
            assert len(client.retrieve([{}], trace=Trace.new())[0]) == 10
            return said in server.log_file.read_text()

        assert wait_until(ask_and_look, 10, interval=0.1)
    collector.status = 200
