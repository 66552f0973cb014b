"""The report of the external comparison: JSON, Markdown and a plot, each written atomically."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from hsnn_core.files import write_bytes
from hsnn_train.checkpoint import write_json

from .figures import TIE_RULE
from .report import DASH, change, markdown, mean_std
from .spaces import METHODS

COLUMNS = ("recall@10", "ndcg@10", "recall@20", "ndcg@20", "recall@50", "recall@100", "recall@500")


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write baselines-<data>.json, .md and .png into the folder (made when missing); returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"baselines-{report['data']}"
    paths = [folder / f"{stem}.{ending}" for ending in ("json", "md", "png")]
    write_json(paths[0], report)
    write_bytes(paths[1], render(report).encode())
    write_bytes(paths[2], plot(report))
    return paths


def render(report: Mapping[str, Any]) -> str:
    """The Markdown page of a report."""
    seeds = ", ".join(map(str, report["seeds"]))
    parts = [
        f"# External baselines, on {report['data']}",
        f"`{report['command']}`",
        f"Seeds {seeds}; {report['requests']:,} test requests, {report['candidates']} of {report['items']:,} items "
        f"are candidates; commit {report['commit']}; {report['machine']}; {report['date']}.",
    ]
    if report["simulated"]:
        parts.append("**The data are simulated, and so are the figures.**")
    parts += [
        f"![{_label(_main(report), report)}](baselines-{report['data']}.png)",
        "## Ranking",
        _ranking(report),
        "## Search",
        _search(report),
        "## Parameters",
        _params(report),
        "## Notes",
        "\n".join(f"- {note}" for note in _notes(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def plot(report: Mapping[str, Any]) -> bytes:
    """PNG: the main figure per method, with its deviation over seeds; published figures in another colour."""
    name = _main(report)
    bars = [
        (row["label"], row["figures"][name], "#4472a8") for row in report["rows"] if name in row["figures"]
    ]
    bars += [
        (f"{p['model']} (published)", {"mean": p["figures"][name], "std": None}, "#b0b0b0")
        for p in report["published"]
        if name in p["figures"]
    ]
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.36 * max(len(bars), 1)))
    for place, (_, value, colour) in enumerate(bars):
        axis.barh(place, value["mean"], xerr=value["std"], color=colour, capsize=3)
    axis.set_yticks(range(len(bars)), [label for label, _, _ in bars])
    axis.invert_yaxis()
    simulated = " (simulated data)" if report["simulated"] else ""
    axis.set(xlabel=_label(name, report), title=f"{report['data']}: full-corpus ranking{simulated}")
    axis.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)
    return drawn.getvalue()


def _main(report: Mapping[str, Any]) -> str:
    """The figure that others printed for this data, else Recall@100."""
    printed: list[str] = [name for p in report["published"] for name in p["figures"]]
    return printed[0] if printed else "recall@100"


def _label(name: str, report: Mapping[str, Any]) -> str:
    """Recall@10 is called HR@10 where every request has one relevant item: they are the same."""
    kind, _, depth = name.partition("@")
    if kind == "ndcg":
        return f"NDCG@{depth}"
    return f"{'HR' if report['single'] else 'Recall'}@{depth}"


def _ranking(report: Mapping[str, Any]) -> str:
    header = ["method", *(_label(name, report) for name in COLUMNS)]
    header += [f"{_label('recall@100', report)} vs two-tower"]
    lines = [
        [
            row["label"],
            *(mean_std(row["figures"], name) for name in COLUMNS),
            change(row["against_two_tower"]),
        ]
        for row in report["rows"]
    ]
    for printed in report["published"]:
        shown = [f"{printed['figures'][n]:.4f}" if n in printed["figures"] else DASH for n in COLUMNS]
        lines.append([f"{printed['model']} (as printed: {printed['source']})", *shown, DASH])
    return markdown(header, lines)


def _search(report: Mapping[str, Any]) -> str:
    """What approximate search keeps of its exhaustive twin, and at what cost."""
    rows = [row for row in report["rows"] if "scored_share" in row["figures"]]
    if not rows:
        return "No method of this report searches."
    header = ["method", "share of the exhaustive top 100 found", "items scored", "µs per request", "settings"]
    lines = []
    for row in rows:
        times = row["figures"].get("microseconds")
        settings = sorted({_said(value) for value in row["settings"].values()})
        lines.append(
            [
                row["label"],
                mean_std(row["figures"], "search_recall@100"),
                f"{row['figures']['scored_share']['mean']:.1%}",
                DASH if times is None else f"{times['mean']:,.0f}",
                "; ".join(settings) or DASH,
            ]
        )
    return markdown(header, lines)


def _how_chosen(row: Mapping[str, Any]) -> str:
    method = METHODS[row["id"]]
    if not method.knobs:
        return "nothing to tune"
    if row["tuned"]:
        return "tuned"
    return "not tuned: as in the recipe" if method.ours else "not tuned: the space's start"


def _params(report: Mapping[str, Any]) -> str:
    lines = [
        [
            row["label"],
            _said(row["params"]) or DASH,
            _how_chosen(row),
        ]
        for row in report["rows"]
        if not row["id"].startswith("two_tower_")
    ]
    return markdown(["method", "parameters", ""], lines)


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
    )


def _notes(report: Mapping[str, Any]) -> Sequence[str]:
    notes = [TIE_RULE] if len(report["seeds"]) > 1 else ["One seed: no difference is called one, nor a tie."]
    notes += [
        "All methods learn from the train split alone and answer, seed by seed, the same requests with the same "
        "candidates; rows of that seed in Table 1 answer them too where their number is the same. The request's "
        "history (for leave-one-out it holds the validation item) is folded into item-KNN and ALS, whose items count "
        "decay^age; BPR has no fold-in and uses the user's trained factor. Popularity, lists and item-KNN have no "
        "randomness: their deviation is that of the requests.",
        "What is called tuned was chosen on validation requests, with the same budget of trials and minutes for every "
        f"method (tuned-{report['data']}.json).",
        "Faiss answers requests one by one on one thread (median, without making the filter); its settings are the "
        "fastest that find at least 95% of the exhaustive top 100 on validation requests. µs per request of the other "
        "rows are those of our search over the torch model, in small batches: not comparable with Faiss.",
        "Published figures stand as printed; nothing of them was run here.",
    ]
    ids = {row["id"] for row in report["rows"]}
    if "two_tower" in ids and "two_tower_ivf" not in ids:
        notes.append("Several tasks rank, so no inner product ranks as a search does: Faiss has no rows.")
    if "lists" in ids:
        notes.append(
            "Neighbour lists are those that HSNN's interactions may go via, ranked without any network (1/√place, "
            "decay^age) over the whole history, with a length, damping and decay of their own."
        )
    if "recent" in ids:
        notes.append(
            "Recent popularity learns from more than train: it counts the positives of every split strictly before the "
            "request."
        )
    notes += [f"Data: {note}" for note in report["data_notes"]]
    notes += [f"**Missing: {gap['id']}, seed {gap['seed']}**: {gap['reason']}" for gap in report["missing"]]
    return notes
