"""hsnn items upsert | delete | stats | compact | forget | follow-kafka: the live corpus of a running server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .connection import add_tls

FORMAT = argparse.RawDescriptionHelpFormatter
SEQUENCES = """sequence numbers: of two updates of one item the one with the higher number wins, in whatever order they
come, and one that comes twice is stale the second time. Without a number an update gets this machine's clock, in
microseconds; the server refuses a clock that is minutes off."""


def add_commands(commands: Any) -> None:
    """Register items and its sub-commands."""
    items = commands.add_parser(
        "items", help="insert, change and delete items of a running server", formatter_class=FORMAT,
        description="Change the corpus that a server searches. A command that returns 0 means: all of it is on the "
        "server's\ndisk, and survives crashes and rollouts.\n\n" + SEQUENCES,
        epilog="examples:\n  hsnn items upsert new.parquet\n  hsnn items delete --ids 17 23\n  hsnn items stats\n"
        "  hsnn items follow-kafka --brokers kafka:9092 --topic items --group hsnn-1",
    )  # fmt: skip
    kinds = items.add_subparsers(dest="items_command", required=True, metavar="COMMAND")

    upsert = kinds.add_parser(
        "upsert", help="insert items, or replace what is known of them", formatter_class=FORMAT,
        description="Insert the items of a table, or replace all that is known of them. A bad row is refused with its "
        "reason, the others\nare applied; the command then ends with 1.\n\n"
        "A table (Parquet, CSV with | between the values of a list, or JSON lines) has the columns of the item table "
        "that the\nserver's schema names; if it has them, also `sequence` and `deleted`. A JSON line may instead be an "
        'update itself:\n  {"id": 17, "sequence": 9, "features": {"category": [4], "price": 2.5}, "eligibility": '
        '{"country": ["IT"]}, "bid": 0.7}\n  {"id": 17, "sequence": 10, "deleted": true}\n\n' + SEQUENCES,
        epilog="examples:\n  hsnn items upsert items.parquet\n  hsnn items upsert items.csv --url 10.0.0.7:8001\n"
        "  stock-feed | hsnn items upsert -                      JSON lines on standard input\n"
        "  hsnn items upsert - --format csv < items.csv",
    )  # fmt: skip
    upsert.add_argument("file", help="table of items, - for standard input")
    upsert.add_argument("--format", choices=("parquet", "csv", "jsonl"), default=None,
                        help="default: by the file's ending; jsonl on standard input")  # fmt: skip
    _add_connection(upsert)
    upsert.set_defaults(run_command=run_upsert)

    delete = kinds.add_parser(
        "delete", help="delete items at once", formatter_class=FORMAT,
        description="Delete items: no search that begins after the server has followed returns them.\n\n" + SEQUENCES,
        epilog="examples:\n  hsnn items delete --ids 17 23 42\n"
        "  hsnn items delete gone.txt                            one id per line\n"
        "  cut -d, -f1 gone.csv | hsnn items delete -\n  hsnn items delete --ids 17 --sequence 12",
    )  # fmt: skip
    delete.add_argument("file", nargs="?", help="one id per line, - for standard input")
    delete.add_argument("--ids", nargs="+", default=[], metavar="ID", help="the ids themselves")
    delete.add_argument(
        "--sequence", type=int, help="sequence number of all these deletes (default: the clock)"
    )
    _add_connection(delete)
    delete.set_defaults(run_command=run_delete)

    stats = kinds.add_parser(
        "stats", help="what the server's item log holds", formatter_class=FORMAT,
        description="Items whose newest update is an upsert (live) or a delete, and the log's positions.",
        epilog="examples:\n  hsnn items stats\n  hsnn items stats --json | jq .position",
    )  # fmt: skip
    _add_connection(stats, batches=False)
    stats.add_argument("--json", action="store_true", help="print JSON instead of a table")
    stats.set_defaults(run_command=run_stats)

    follow = kinds.add_parser(
        "follow-kafka", help="apply the updates of a Kafka topic, until Ctrl-C", formatter_class=FORMAT,
        description="Apply the updates of a topic as they come: one JSON object per message, as in `hsnn items "
        "upsert --help`,\neach with a sequence number. At least once: offsets are committed when the updates are on "
        "the server's disk, and\nwhat comes twice is stale. While the server is away or its disk full, it waits. Bad "
        "messages are reported and skipped.\n\nEvery server keeps a log of its own, so each needs its own follower "
        "with its own --group; the topic is the source\nthat they share. Key messages by item id. Needs: pip install "
        "'hsnn-triton[kafka]'",
        epilog="examples:\n  hsnn items follow-kafka --brokers kafka:9092 --topic items --group hsnn-1\n"
        "  hsnn items follow-kafka --brokers kafka:9093 --topic items --group hsnn-1 --dead-letters bad.jsonl \\\n"
        "      --option security.protocol=SSL --option ssl.ca.location=ca.pem",
    )  # fmt: skip
    follow.add_argument("--brokers", required=True, metavar="HOST:PORT[,...]", help="bootstrap servers")
    follow.add_argument("--topic", required=True)
    follow.add_argument("--group", required=True, help="consumer group, one per server")
    follow.add_argument("--dead-letters", metavar="FILE",
                        help="append bad messages to this file, as JSON lines (default: standard error)")  # fmt: skip
    follow.add_argument("--ready-file", type=Path, metavar="FILE", help="made when all that the topic held is on the "
                        "server's disk, removed at the start: for a readiness probe")  # fmt: skip
    follow.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", dest="options",
                        help="a setting of librdkafka; may be repeated")  # fmt: skip
    _add_connection(follow)
    follow.set_defaults(run_command=run_follow_kafka)

    compact = kinds.add_parser(
        "compact", help="fold the item log into an export, for the next snapshot", formatter_class=FORMAT,
        description="Write an export of a run's networks over the items that are live by the log of a repository. A "
        "server that serves it\nholds fewer changes in memory and starts sooner. It runs beside servers; publish it as "
        "any export.",
        epilog="examples:\n  hsnn items compact runs/ads --repository repo --to runs/ads-compacted\n"
        "  hsnn publish runs/ads-compacted --repository repo\n"
        "  hsnn items compact runs/ads --repository repo --to runs/compacted --every 60 --least 10000 --url host:8001 "
        "--key-file key",
    )  # fmt: skip
    compact.add_argument("run", type=Path, help="run that was published, or an earlier compaction of it")
    compact.add_argument(
        "--repository", type=Path, required=True, help="repository whose item log is folded in"
    )
    compact.add_argument("--to", type=Path, required=True, metavar="DIR",
                         help="folder of the new export; with --every that of all of them")  # fmt: skip
    compact.add_argument("--every", type=float, default=None, metavar="MINUTES",
                         help="go on until Ctrl-C: compact, publish and promote when enough has changed")  # fmt: skip
    compact.add_argument("--least", type=int, default=1000, metavar="N",
                         help="updates that are enough, with --every (default: %(default)s)")  # fmt: skip
    compact.add_argument("--url", metavar="HOST:PORT", help="Triton's gRPC, with --every")
    compact.add_argument("--key-file", type=Path, metavar="FILE", help="file with the server's admin key")
    compact.add_argument("--sign-key", type=Path, metavar="FILE", help="as for hsnn publish, with --every")
    add_tls(compact)
    compact.set_defaults(run_command=run_compact)

    forget = kinds.add_parser(
        "forget", help="drop updates that every kept snapshot contains", formatter_class=FORMAT,
        description="Drop the content of the log's updates that all snapshots of a repository contain, since "
        "compactions folded them in.\nFrom then on an export must contain them to be published: a compaction does, a "
        "training run whose item table has them\nsays so by hsnn export --contains-log. Ids and sequence numbers are "
        "kept, so that late old updates stay stale.",
        epilog="examples:\n  hsnn items forget --repository repo",
    )  # fmt: skip
    forget.add_argument("--repository", type=Path, required=True, help="repository whose item log it is")
    forget.set_defaults(run_command=run_forget)


def _add_connection(parser: Any, batches: bool = True) -> None:
    parser.add_argument(
        "--url", default="127.0.0.1:8001", help="host:port of Triton's gRPC (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=30.0, help="seconds a call may take (default: %(default)s)"
    )
    add_tls(parser)
    if batches:
        parser.add_argument(
            "--batch", type=int, default=1000, help="updates per call, up to 10000 (default: %(default)s)"
        )


def run_upsert(options: argparse.Namespace) -> None:
    """hsnn items upsert."""
    from .item_commands import upsert

    upsert(options)


def run_delete(options: argparse.Namespace) -> None:
    """hsnn items delete."""
    from .item_commands import delete

    delete(options)


def run_stats(options: argparse.Namespace) -> None:
    """hsnn items stats."""
    from .item_commands import stats

    stats(options)


def run_follow_kafka(options: argparse.Namespace) -> None:
    """hsnn items follow-kafka."""
    from .item_commands import follow_kafka

    follow_kafka(options)


def run_compact(options: argparse.Namespace) -> None:
    """hsnn items compact."""
    from export.compaction import compact
    from export.forgetting import log_of

    if options.every is not None:
        from .item_commands import keep_compact

        keep_compact(options)
        return
    log = log_of(options.repository)
    bundle = compact(options.run, log, options.to).verify()
    print(f"{bundle.index.items:,} items, with the updates up to position {bundle.log.position} of {log}")
    print(f"publish it with: hsnn publish {options.to} --repository {options.repository}")


def run_forget(options: argparse.Namespace) -> None:
    """hsnn items forget."""
    from export.forgetting import forget, log_of

    position, count = forget(options.repository)
    print(f"all snapshots contain the updates up to position {position} of {log_of(options.repository)}")
    print(f"forgotten: the content of {count} of them")
