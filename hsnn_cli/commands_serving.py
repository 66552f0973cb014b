"""hsnn export | publish | serve | health | query: from a trained run to answers over gRPC."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from hsnn_core.errors import FeatureError, RequestError
from hsnn_server.probe import add_arguments, run

from .connection import add_tls, tls_of
from .tables import table

FORMAT = argparse.RawDescriptionHelpFormatter


def add_commands(commands: Any) -> None:
    """Register export, publish, serve, health and query."""
    export = commands.add_parser(
        "export", help="turn a trained run into serving graphs and an index", formatter_class=FORMAT,
        description="Export towers and scorers (ONNX, or TensorRT engines), build the index over the corpus, and "
        "refuse to go on unless torch, ONNX Runtime and the search over both agree.",
        epilog="examples:\n  hsnn export runs/ads\n  hsnn export runs/ads --engine tensorrt        needs the "
        "tensorrt package\n  hsnn export runs/ads --engine tensorrt-rtx --target SM80 --target SM89   without a GPU",
    )  # fmt: skip
    export.add_argument("run", type=Path, help="run directory")
    export.add_argument(
        "--engine", default="onnxruntime", help="onnxruntime (default), tensorrt-rtx or tensorrt"
    )
    export.add_argument("--target", action="append", default=[], metavar="SM", dest="targets",
                        help="compute capability to build for, TensorRT only; may be repeated")  # fmt: skip
    export.add_argument("--embeddings", choices=("float32", "float16"), default="float32",
                        help="of nodes and items; float16 takes half the memory (default: %(default)s)")  # fmt: skip
    export.add_argument("--contains-log", type=Path, default=None, metavar="FILE", help="item log whose updates so far "
                        "are in the run's item table already: servers need not replay them")  # fmt: skip
    export.set_defaults(run_command=run_export)

    publish = commands.add_parser(
        "publish", help="publish an exported run as the next version of a model repository", formatter_class=FORMAT,
        description="Stage, verify and rename a snapshot into a Triton model repository. All its models get one "
        "version; the orchestrator comes last, and that rename is the commit.",
        epilog="examples:\n  hsnn publish runs/ads --repository repo\n"
        "  hsnn publish runs/ads --repository repo --mode in_process    towers run inside the orchestrator",
    )  # fmt: skip
    publish.add_argument("run", type=Path, help="run directory")
    publish.add_argument("--repository", type=Path, required=True, help="model repository; made when missing")
    publish.add_argument("--mode", choices=("bls", "in_process"), default=None,
                         help="how networks are called (default: the repository's, else bls)")  # fmt: skip
    publish.add_argument("--workers", type=int, metavar="N", help="requests that run at once; in process on a CPU as "
                         "many as there are cores (default: the repository's, else 4)")  # fmt: skip
    publish.add_argument("--queue", type=int, metavar="N",
                         help="requests that may wait (default: the repository's, else 64)")  # fmt: skip
    publish.add_argument("--item-log", metavar="FILE", help="where the server writes item updates, on a local disk; "
                         "relative to the repository (default: the repository's, else .items/log.db)")  # fmt: skip
    publish.add_argument("--sign-key", type=Path, metavar="FILE",
                         help="PEM of an Ed25519 private key; signs all files of the snapshot")  # fmt: skip
    publish.set_defaults(run_command=run_publish)

    serve = commands.add_parser(
        "serve", help="serve a repository with the local Triton, until Ctrl-C", formatter_class=FORMAT,
        description="Start the Triton server of the nvidia-pytriton wheel on loopback and load the newest snapshot. A "
        "model whose process\ndies is loaded again, a server that ends or hangs is started again on the same ports; a "
        "line is printed for each.\nAfter six attempts in a row that did not hold, the command ends with 1.",
        epilog="examples:\n  hsnn serve --repository repo\n  hsnn serve --repository repo --grpc-port 8001\n\n"
        "For GPUs and production serve the same repository with an NGC Triton; see README.",
    )  # fmt: skip
    serve.add_argument("--repository", type=Path, help="model repository")
    serve.add_argument(
        "--stop", type=Path, metavar="STATE", help="stop the server that hsnn demo --keep left running"
    )
    serve.add_argument("--grpc-port", type=int, default=8001, help="0 picks a free one (default: 8001)")
    serve.add_argument("--http-port", type=int, default=8000, help="0 picks a free one (default: 8000)")
    serve.add_argument("--metrics-port", type=int, default=8002, help="0 picks a free one (default: 8002)")
    serve.add_argument(
        "--log", type=Path, default=None, help="server log file (default: gone with the server)"
    )
    serve.add_argument("--trace-endpoint", metavar="URL", help="collector to send traces to, OTLP over HTTP, like "
                       "http://127.0.0.1:4318/v1/traces (default: no tracing)")  # fmt: skip
    serve.add_argument("--trace-rate", type=int, default=1000, metavar="N", help="of the requests without a trace "
                       "context trace every N-th; those with one are traced (default: %(default)s)")  # fmt: skip
    tls = serve.add_argument_group(
        "TLS", "at the gRPC address; Triton has none at HTTP and metrics, which stay on loopback"
    )
    tls.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="PEM of the server's certificate, with its chain"
    )
    tls.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM of its key")
    tls.add_argument("--client-ca", type=Path, metavar="FILE", help="PEM of the authorities that must have signed "
                     "every client's certificate (mutual TLS)")  # fmt: skip
    serve.add_argument("--verify-key", type=Path, metavar="FILE", help="PEM of Ed25519 public keys: serve the newest "
                       "snapshot only if one of them signed it")  # fmt: skip
    serve.set_defaults(run_command=run_serve)

    health = commands.add_parser(
        "health", help="does a server answer? its smoke request, for probes", formatter_class=FORMAT,
        description="Ask a server the smoke request of the snapshot it serves, over HTTP, and look at what comes back. "
        "Prints one line;\nexits with 0 when it is healthy, 1 when not. The serving image has the same as "
        "hsnn_server/probe.py.",
        epilog="examples:\n  hsnn health --repository repo\n  hsnn health --repository repo --ready    "
        "for what sends it requests: busy is well, wrong answers are not\n  hsnn health --repository repo --live     "
        "for what restarts it: neither is dead",
    )  # fmt: skip
    add_arguments(health)
    health.set_defaults(run_command=run_health)

    query = commands.add_parser(
        "query", help="ask a server for the top k of a user", formatter_class=FORMAT,
        description="Send one request over gRPC and print the results as a table.",
        epilog='examples:\n  hsnn query --user \'{"history": [3, 17], "country": "IT"}\'\n'
        "  hsnn query --url 127.0.0.1:8001 --user @user.json --k 20 --widths 16,128\n"
        "  hsnn query --context '{\"country\": \"IT\"}' --exclude 3,17 --rank-by bid     who asks, where, for what\n"
        "  hsnn query --schema                          which features a user and which attributes an item has",
    )  # fmt: skip
    query.add_argument(
        "--url", default="127.0.0.1:8001", help="host:port of Triton's gRPC (default: %(default)s)"
    )
    query.add_argument(
        "--user", default="{}", help="features as JSON, or @FILE; missing ones take their defaults"
    )
    query.add_argument("--context", default="{}", help="the request's values of eligibility attributes as JSON, "
                       "or @FILE; without them only items that are open to all come back")  # fmt: skip
    query.add_argument(
        "--exclude", default="", metavar="IDS", help="items that must not come back, like 3,17"
    )
    query.add_argument("--exclude-by", default="{}", metavar="JSON",
                       help='keys of items that must not come back, like \'{"advertiser": [5]}\'')  # fmt: skip
    query.add_argument("--rank-by", choices=("probability", "bid"), default=None,
                       help="bid: the probabilities times the item's bid (default: probability)")  # fmt: skip
    query.add_argument("--tasks", default=None, help="tasks whose probabilities are multiplied to rank by, like "
                       "click,conversion (default: the schema's ranks)")  # fmt: skip
    query.add_argument("--k", type=int, default=10, help="items to return (default: %(default)s)")
    query.add_argument("--widths", default=None, help="nodes kept after each layer but the last, like 16,128")
    query.add_argument(
        "--timeout", type=float, default=5.0, help="deadline in seconds (default: %(default)s)"
    )
    query.add_argument("--json", action="store_true", help="print JSON instead of a table")
    query.add_argument("--schema", action="store_true", help="print the served schema and stop")
    add_tls(query)
    query.set_defaults(run_command=run_query)


def run_export(options: argparse.Namespace) -> None:
    """hsnn export."""
    from export.export_run import export_run
    from hsnn_train.checkpoint import load_run

    if not load_run(options.run).finished:
        print(f"note: {options.run} has not reached its last step; this exports the model of its checkpoint")
    exported = export_run(
        options.run,
        options.engine,
        targets=options.targets,
        contains_log=options.contains_log,
        embeddings=options.embeddings,
    )
    print(exported.report.table())
    print(f"exported: {options.run / 'export'}")


def run_publish(options: argparse.Namespace) -> None:
    """hsnn publish."""
    from export.publish import publish

    serving = serving_options(options, options.repository)
    version = publish(options.run, options.repository, options=serving, sign_key=options.sign_key)
    print(f"published: version {version} in {options.repository}")
    print(f"serve it with: hsnn serve --repository {options.repository}")


def serving_options(options: argparse.Namespace, repository: Path) -> Any:
    """The repository's `ServingOptions` with what was given on the command line."""
    from dataclasses import replace

    from export.publish import current_options

    given = {name: getattr(options, name) for name in ("mode", "workers", "queue", "item_log")}
    return replace(
        current_options(repository), **{name: value for name, value in given.items() if value is not None}
    )


def run_serve(options: argparse.Namespace) -> None:
    """hsnn serve."""
    from export.repository import versions
    from export.rollout import promote
    from export.signing import check_signature
    from export.supervised import models, supervisor
    from hsnn_server.tracing import Tracing
    from hsnn_server.triton import TritonServer

    if options.stop is not None:
        TritonServer.attach(options.stop).stop()
        print("stopped")
        return
    if options.repository is None:
        raise RequestError("hsnn serve: --repository is missing; name the model repository to serve")

    def admit() -> None:
        if options.verify_key is not None and (published := versions(options.repository)):
            check_signature(options.repository, published[-1], options.verify_key)

    admit()
    with TritonServer(
        options.repository,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        log_file=options.log,
        preload=partial(models, options.repository),
        tracing=None
        if options.trace_endpoint is None
        else Tracing(options.trace_endpoint, options.trace_rate),
        tls=_server_tls(options),
    ) as server:
        version = promote(options.repository, server.admin)
        urls = server.urls
        print(f"serving version {version}: gRPC {urls.grpc}  HTTP {urls.http}  metrics {urls.metrics}")
        print(f"roll out to it with: hsnn rollout STEP --repository {options.repository} --url {urls.grpc} "
              f"--key-file {server.key_file}")  # fmt: skip
        print(f"ask it with: hsnn query --url {urls.grpc} --user '{{}}'   (Ctrl-C stops)", flush=True)
        with suppress(KeyboardInterrupt):
            supervisor(server, options.repository, say=partial(print, flush=True), admit=admit).run()


def run_health(options: argparse.Namespace) -> int:
    """hsnn health; returns the exit status."""
    return run(options)


def _server_tls(options: argparse.Namespace) -> Any:
    from hsnn_server.tls import ServerTls

    certificate, key = options.tls_cert, options.tls_key
    if (certificate is None) != (key is None) or (options.client_ca is not None and certificate is None):
        raise RequestError(
            "hsnn serve: TLS needs both --tls-cert and --tls-key; --client-ca is for mutual TLS beside them"
        )
    return None if certificate is None else ServerTls(certificate, key, options.client_ca)


def json_object(text: str, option: str = "--user", of: str = "features") -> dict[str, Any]:
    """An argument as a dict. Raises FeatureError for text that is no JSON object, or @FILE with one."""
    try:
        value = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    except (OSError, ValueError) as error:
        raise FeatureError(f"{option}: {error}; expected a JSON object of {of}, or @FILE") from error
    if not isinstance(value, dict):
        raise FeatureError(f"{option}: got {type(value).__name__}, expected a JSON object of {of}")
    return value


def item_keys_of(text: str) -> list[int | str]:
    """The --exclude argument: numbers as they are, other texts as string keys."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [int(part) if part.removeprefix("-").isdecimal() else part for part in parts]


def widths_of(text: str | None) -> list[int] | None:
    """The --widths argument. Raises RequestError for anything but whole numbers."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError as error:
        raise RequestError(f"--widths: got {text!r}, expected whole numbers like 16,128") from error


def run_query(options: argparse.Namespace) -> None:
    """hsnn query."""
    from clients.retrieval import RetrievalClient

    with RetrievalClient(options.url, timeout=options.timeout, tls=tls_of(options)) as client:
        if options.schema:
            print(client.connect().schema.to_json())
            return
        results = client.retrieve(
            [json_object(options.user)],
            k=options.k,
            widths=widths_of(options.widths),
            timings=True,
            context=json_object(options.context, "--context", "attributes"),
            exclude_items=item_keys_of(options.exclude),
            exclude=json_object(options.exclude_by, "--exclude-by", "attributes"),
            rank_by=options.rank_by,
            tasks=None if options.tasks is None else [task.strip() for task in options.tasks.split(",")],
        )
    hits = results[0]
    if options.json:
        print(
            json.dumps([{"item_id": h.item_id, "scores": h.scores, "rank_score": h.rank_score} for h in hits])
        )
        return
    tasks = list(hits[0].scores) if hits else []
    rows = [[i, h.item_id, *(h.scores[t] for t in tasks), h.rank_score] for i, h in enumerate(hits, start=1)]
    print(table(["", "item", *(f"P({t})" for t in tasks), "rank score"], rows, f"version {results.version}"))
    if results.timings is not None:
        t = results.timings
        layers = "  ".join(f"layer {i}: {us / 1000:.2f}" for i, us in enumerate(t.layers, start=1))
        print(
            f"milliseconds in the server: user tower: {t.user_tower / 1000:.2f}  {layers}  total: {t.total / 1000:.2f}"
        )
