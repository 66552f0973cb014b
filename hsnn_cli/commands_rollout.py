"""hsnn rollout: a new snapshot into service step by step, and out of it again, on a running Triton."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsnn_core.errors import PublishError, RequestError

from .connection import add_tls, admin_key, tls_of
from .tables import table

if TYPE_CHECKING:
    from clients.admin import RepositoryAdmin
    from clients.comparison import Figures, Thresholds
    from clients.tls import Tls
    from clients.watch import Users

FORMAT = argparse.RawDescriptionHelpFormatter
EXAMPLES = {  # {}: which server
    "publish": ("publish runs/ads {}", "publish runs/ads {} --sign-key sign.key --promote"),
    "status": ("status {}", "status {} --json"),
    "canary": ("canary {} --share 0.05 --watch 300 --max-score-shift 0.2", "canary {} --stop"),
    "promote": ("promote {} --watch 60", "promote {} --verify-key sign.pub"),
    "rollback": ("rollback {}", "rollback {} --to 7 --verify-key sign.pub"),
    "retire": ("retire {} --keep 3",),
}


def add_commands(commands: Any) -> None:
    """Register rollout and its steps."""
    rollout = commands.add_parser(
        "rollout", help="publish, canary, promote and roll back snapshots on a running Triton", formatter_class=FORMAT,
        description="A snapshot goes into service in steps: publish (staged, verified, its networks loaded and asked "
        "the smoke request), canary (its orchestrator beside the one that serves), promote. No request fails in any of "
        "them. What is where says `status`, out of the repository and the server.",
        epilog="examples:\n"
        "  hsnn rollout publish runs/ads --repository repo --url host:8001 --key-file key\n"
        "  hsnn rollout canary --repository repo --url host:8001 --key-file key --share 0.05 --watch 300\n"
        "  hsnn rollout promote --repository repo --url host:8001 --key-file key\n"
        "  hsnn rollout status --server runs/demo/server.json         the server that hsnn demo --keep left",
    )  # fmt: skip
    steps = rollout.add_subparsers(dest="step", required=True, metavar="STEP")

    publish = _step(steps, "publish", run_publish, "publish an exported run as the candidate and check it")
    publish.add_argument("run", type=Path, help="run directory, exported")
    publish.add_argument("--mode", choices=("bls", "in_process"), help="as for hsnn publish")
    publish.add_argument("--workers", type=int, metavar="N", help="as for hsnn publish")
    publish.add_argument("--queue", type=int, metavar="N", help="as for hsnn publish")
    publish.add_argument("--item-log", metavar="FILE", help="as for hsnn publish")
    publish.add_argument("--sign-key", type=Path, metavar="FILE", help="as for hsnn publish")
    publish.add_argument("--promote", action="store_true", help="and promote it")

    status = _step(steps, "status", run_status, "every snapshot, on disk and in the server")
    status.add_argument("--json", action="store_true", help="print JSON instead of a table")

    canary = _step(
        steps, "canary", run_canary, "run the candidate beside the snapshot that serves, and watch it"
    )
    canary.add_argument("--share", type=float, default=0.0, metavar="S", help="of the requests of clients that follow "
                        "the operator, 0 to 1 (default: none)")  # fmt: skip
    canary.add_argument("--shadow", action="store_true", help="the share is copied to the canary, not moved")
    canary.add_argument("--promote", action="store_true", help="promote it when the watch ends well")
    canary.add_argument("--stop", action="store_true", help="end the canary; the candidate stays on disk")
    _verified(canary)
    _watching(canary, 60.0)

    promote = _step(
        steps, "promote", run_promote, "make the candidate serve; without one, the newest snapshot"
    )
    _verified(promote)
    _watching(promote, 0.0)

    rollback = _step(
        steps, "rollback", run_rollback, "take the candidate back, or else the snapshot that serves"
    )
    rollback.add_argument(
        "--to", type=int, metavar="VERSION", help="take back all that is newer than this snapshot"
    )
    _verified(rollback)

    retire = _step(steps, "retire", run_retire, "remove the snapshots that nothing needs from disk")
    retire.add_argument("--keep", type=int, default=2, metavar="N",
                        help="newest snapshots that stay (default: %(default)s)")  # fmt: skip


def _step(steps: Any, name: str, run: Any, what: str) -> Any:
    server = "--repository repo --url host:8001 --key-file key"
    step = steps.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + ".", formatter_class=FORMAT,
        epilog="examples:\n" + "".join(f"  hsnn rollout {line.format(server)}\n" for line in EXAMPLES[name]),
    )  # fmt: skip
    step.add_argument(
        "--repository", type=Path, metavar="DIR", help="model repository that the server serves"
    )
    step.add_argument("--url", metavar="HOST:PORT", help="Triton's gRPC")
    step.add_argument("--key-file", type=Path, metavar="FILE", help="file with the server's admin key")
    step.add_argument("--server", type=Path, metavar="STATE",
                      help="instead of these three: the state file of a server that hsnn demo --keep left")  # fmt: skip
    add_tls(step)
    step.set_defaults(run_command=run)
    return step


def _verified(step: Any) -> None:
    step.add_argument("--verify-key", type=Path, metavar="FILE",
                      help="PEM of Ed25519 public keys: only a snapshot that one of them signed is loaded")  # fmt: skip


def _check_signature(options: argparse.Namespace, repository: Path, version: int | None) -> None:
    from export.signing import check_signature

    if options.verify_key is not None and version is not None:
        check_signature(repository, version, options.verify_key)


def _watching(step: Any, seconds: float) -> None:
    watching = step.add_argument_group(
        "watching", "the same requests go to both snapshots; a broken threshold takes the new one back"
    )
    watching.add_argument("--watch", type=float, default=seconds, metavar="SECONDS",
                          help="how long, 0 for not at all (default: %(default)g)")  # fmt: skip
    watching.add_argument("--requests", default="smoke", metavar="FILE", help="users to ask for, one JSON object a "
                          "line (default: those of the smoke request)")  # fmt: skip
    watching.add_argument("--rate", type=float, default=10.0, metavar="R",
                          help="requests a second to each (default: %(default)g)")  # fmt: skip
    watching.add_argument("--k", type=int, help="items per request (default: the snapshot's)")
    watching.add_argument(
        "--metrics-url", metavar="HOST:PORT", help="Triton's metrics, for its own count of errors"
    )
    watching.add_argument("--max-error-rate", type=float, default=0.01, metavar="X",
                          help="failed requests over all (default: %(default)g)")  # fmt: skip
    watching.add_argument("--max-latency-ratio", type=float, default=2.0, metavar="X",
                          help="median latency over the other's (default: %(default)g)")  # fmt: skip
    watching.add_argument("--max-score-shift", type=float, metavar="X",
                          help="how far a decile of the probabilities moved, over their mean")  # fmt: skip
    watching.add_argument("--min-overlap", type=float, metavar="X",
                          help="share of the other's top k that it returns (default: any)")  # fmt: skip


@dataclass(frozen=True)
class _Server:
    repository: Path
    url: str
    metrics: str | None
    admin: RepositoryAdmin
    tls: Tls | None


@contextmanager
def _connected(options: argparse.Namespace) -> Iterator[_Server]:
    from clients.admin import RepositoryAdmin
    from hsnn_server.state import ServerState
    from hsnn_server.tls import own_tls

    metrics = getattr(options, "metrics_url", None)
    if options.server is not None:
        state = ServerState.read(options.server)
        repository, url, key_file, tls = (
            state.repository,
            state.urls.grpc,
            state.key_file,
            own_tls(state.directory),
        )
        metrics = metrics or state.urls.metrics
    elif options.repository is None or options.url is None:
        raise RequestError(
            f"hsnn rollout {options.step}: got neither --server nor --repository with --url; name the repository and "
            "the server that serves it"
        )
    else:
        repository, url, key_file, tls = options.repository, options.url, options.key_file, tls_of(options)
    with RepositoryAdmin(url, admin_key(key_file), tls=tls) as admin:
        yield _Server(repository, url, metrics, admin, tls)


def run_publish(options: argparse.Namespace) -> None:
    """hsnn rollout publish."""
    from export.candidate import promote_candidate, publish_candidate

    from .commands_serving import serving_options

    with _connected(options) as server:
        version = publish_candidate(
            options.run, server.repository, server.admin, serving_options(options, server.repository),
            options.sign_key,
        )  # fmt: skip
        print(f"published: candidate {version}; its networks answer the smoke request as at their export")
        if options.promote:
            promote_candidate(server.repository, server.admin)
            print(f"promoted: snapshot {version} serves")


def run_status(options: argparse.Namespace) -> None:
    """hsnn rollout status."""
    from export.status import status

    with _connected(options) as server:
        rows = status(server.repository, server.admin)
        if options.json:
            print(json.dumps([asdict(row) for row in rows]))
            return
        title = f"{server.repository}, and the server at {server.url}"
    cells = [
        [r.version, r.disk, r.orchestrator or "–", r.canary or "–", r.networks, _age(r.created), r.log_position]
        for r in rows
    ]  # fmt: skip
    print(table(["version", "on disk", "serves", "canary", "networks", "age", "log"], cells, title))


def run_canary(options: argparse.Namespace) -> None:
    """hsnn rollout canary."""
    from clients.canary import MODEL as CANARY_MODEL
    from clients.retrieval import RetrievalClient
    from clients.watch import Live
    from export.candidate import promote_candidate, start_canary, stop_canary
    from export.repository import candidate

    with _connected(options) as server:
        if options.stop:
            stop_canary(server.repository, server.admin)
            print("the canary has ended; the candidate stays")
            return
        thresholds = _thresholds(options)
        _check_signature(options, server.repository, candidate(server.repository))
        version = start_canary(server.repository, server.admin, options.share, options.shadow)
        print(f"candidate {version} runs as {CANARY_MODEL}, {options.share:.1%} of the requests of clients that follow"
              f"{', as copies' if options.shadow else ''}")  # fmt: skip
        if options.watch:
            requests = _requests(options.requests, server.repository, version)
            with (
                RetrievalClient(server.url, tls=server.tls) as stable,
                RetrievalClient(server.url, model=CANARY_MODEL, tls=server.tls) as canary,
            ):
                for client in (stable, canary):
                    client.connect()
                broken = _watch(
                    options, server, version, CANARY_MODEL, thresholds, len(requests),
                    Live(stable, requests, options.k), Live(canary, requests, options.k),
                )  # fmt: skip
            if broken is not None:
                stop_canary(server.repository, server.admin, version)
                raise PublishError(
                    f"candidate {version}: {broken}; the canary has ended, the candidate stays on disk "
                    "(hsnn rollout rollback withdraws it)"
                )
        if options.promote:
            promote_candidate(server.repository, server.admin)
            print(f"promoted: snapshot {version} serves")


def run_promote(options: argparse.Namespace) -> None:
    """hsnn rollout promote."""
    from clients.retrieval import RetrievalClient
    from clients.watch import Live
    from clients.wire import MODEL
    from export.candidate import promote_candidate
    from export.repository import candidate, versions
    from export.rollout import promote, rollback

    with _connected(options) as server, RetrievalClient(server.url, tls=server.tls) as client:
        repository, admin = server.repository, server.admin
        waiting = candidate(repository)
        _check_signature(options, repository, waiting or max(versions(repository), default=None))
        thresholds = _thresholds(options)
        serving = admin.versions(MODEL)
        if options.watch and serving:
            target = waiting or versions(repository)[-1]
            requests = _requests(options.requests, repository, target)
            client.connect()
            live = Live(client, requests, options.k)
            # The snapshot that serves now will not be there to be asked again.
            before = [live(number) for number in range(len(requests)) for _ in range(2)][1::2]
        version = promote(repository, admin) if waiting is None else promote_candidate(repository, admin)
        print(f"promoted: snapshot {version} serves")
        if not (options.watch and serving):
            return
        broken = _watch(options, server, version, MODEL, thresholds, len(requests), before.__getitem__, live)
        if broken is not None:
            previous = rollback(repository, admin, version)
            raise PublishError(f"snapshot {version}: {broken}; it is rolled back, snapshot {previous} serves")


def run_rollback(options: argparse.Namespace) -> None:
    """hsnn rollout rollback."""
    from export.candidate import roll_back
    from export.repository import candidate, snapshots, versions

    with _connected(options) as server:
        repository = server.repository
        complete = versions(repository)
        stays = candidate(repository) is not None or any(found.rolled_back for found in snapshots(repository))
        earlier = complete[-1:] if stays else complete[-2:-1]
        _check_signature(options, repository, options.to or next(iter(earlier), None))
        print(roll_back(server.repository, server.admin, options.to))


def run_retire(options: argparse.Namespace) -> None:
    """hsnn rollout retire."""
    from export.retire import retire

    with _connected(options) as server:
        removed = retire(server.repository, server.admin, options.keep)
        print(f"removed: {', '.join(map(str, removed)) if removed else 'nothing'}")


def _watch(
    options: argparse.Namespace,
    server: _Server,
    version: int,
    model: str,
    thresholds: Thresholds,
    requests: int,
    stable: Any,
    canary: Any,
) -> str | None:
    """Watch a version for as long as the options say and print what was found; return the threshold that was
    broken."""
    from clients.metrics import requests_of, scrape
    from clients.watch import watch

    figures, broken = watch(
        stable, canary, requests, seconds=options.watch, rate=options.rate, thresholds=thresholds,
        count=lambda: requests_of(scrape(server.metrics), version),
        runs=lambda: server.admin.ready(model, version),
        say=lambda found: print(_line(found), flush=True),
    )  # fmt: skip
    print(report(figures, version))
    return broken


def _thresholds(options: argparse.Namespace) -> Thresholds:
    from clients.comparison import Thresholds

    return Thresholds(
        options.max_error_rate, options.max_latency_ratio, options.max_score_shift, options.min_overlap
    )


def _requests(source: str, repository: Path, version: int) -> list[Users]:
    """The smoke request's users, or those of a file of JSON lines, one request each."""
    from clients.encode import WireUsers
    from clients.load import each_user
    from export.repository import orchestrator_directory
    from hsnn_core.bundle import Bundle

    if source == "smoke":
        smoke = Bundle.open(orchestrator_directory(repository, version), verify=False).smoke()
        return [WireUsers(user) for user in each_user(smoke.users)]
    users: list[Users] = []
    try:
        for number, line in enumerate(Path(source).read_text().splitlines(), start=1):
            if line.strip():
                user = json.loads(line)
                if not isinstance(user, dict):
                    raise ValueError(f"line {number}: got {type(user).__name__}")
                users.append([user])
    except (OSError, ValueError) as error:
        raise RequestError(
            f"--requests {source}: {error}; expected a user's features as JSON in each line"
        ) from error
    if not users:
        raise RequestError(
            f"--requests {source}: no users there; expected a user's features as JSON in each line"
        )
    return users


def _line(found: Figures) -> str:
    ratio, shift, overlap = (
        _text(value) for value in (found.latency_ratio, found.score_shift, found.overlap)
    )
    counts = f"{found.requests} requests, {found.failed} failed"
    return f"{counts}; latency x {ratio}, overlap {overlap}, score shift {shift}"


def report(found: Figures, version: int) -> str:
    """What a watch found, as a table."""
    stable, canary = found.stable_ms or (None, None), found.canary_ms or (None, None)
    rows: list[list[Any]] = [
        ["requests", None, found.requests],
        ["failed", None, found.failed],
        ["requests in the server, everybody's", None, found.server_requests],
        ["errors in the server, everybody's", None, found.server_errors],
        ["latency p50, ms", stable[0], canary[0]],
        ["latency p99, ms", stable[1], canary[1]],
        ["median latency over the other's", None, found.latency_ratio],
        ["share of the other's top k", None, found.overlap],
        ["score shift", None, found.score_shift],
    ]
    return table(["", "other", f"snapshot {version}"], rows)


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _age(created: str | None) -> str:
    if created is None:
        return "–"
    minutes = (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds() / 60
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 1440:.0f} d"
