"""A table's report as Markdown. Everything it says stands in the report's JSON; see `hsnn_bench.tables.build`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .figures import TIE_RULE

DASH = "–"
SHARES = ("scored_share", "occupancy")
TITLES = {
    "table1": "Table 1: architectures, flat and under an index",
    "table2": "Table 2: how the index is learnt",
    "table3": "Table 3: what LTI consists of",
}


def render(report: dict[str, Any]) -> str:
    """The Markdown page of a report."""
    parts = [f"# {TITLES[report['table']]}, on {report['data']}", f"`{report['command']}`", _origin(report)]
    if report["simulated"]:
        parts.append("**The data are simulated, and so are the figures.**")
    parts.append(_plots(report))
    if report["table"] == "table1":
        parts += ["## Quality", _quality(report, report["rows"], "XS")]
        parts += ["## Retrieval", _retrieval(report), "## Cost", _cost(report)]
    else:
        for block in dict.fromkeys(row["block"] for row in report["rows"]):
            rows = [row for row in report["rows"] if row["block"] == block]
            parts += [f"## {_block_title(block)}", _quality(report, rows, rows[0]["label"])]
    parts += ["## Notes", "\n".join(f"- {note}" for note in _notes(report))]
    return "\n\n".join(part for part in parts if part) + "\n"


def percent(value: float | None, digits: int = 2) -> str:
    """+1.23%, with a true minus; a dash for None."""
    if value is None:
        return DASH
    return f"{value:+.{digits}f}%".replace("-", "−")


def change(value: dict[str, Any] | None) -> str:
    """A change with its interval: "−0.31% ± 0.12", "−0.31% ± 0.52, tie"; a dash for None."""
    if value is None:
        return DASH
    interval = "" if value["interval"] is None else f" ± {value['interval']:.2f}"
    return percent(value["percent"]) + interval + (", tie" if value["tie"] else "")


def mean_std(figures: dict[str, Any], name: str) -> str:
    """0.8495 ± 0.0012, a share as 25.0%; without ± for one seed, a dash for an unknown figure."""
    if name not in figures:
        return DASH
    figure = figures[name]
    if name in SHARES:
        return f"{figure['mean']:.1%}"
    return f"{figure['mean']:.4f}" + ("" if figure["std"] is None else f" ± {figure['std']:.4f}")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left, the others to the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def si(value: float | None) -> str:
    """1234567 as 1.23 M; a dash for None."""
    if value is None:
        return DASH
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _origin(report: dict[str, Any]) -> str:
    seeds = ", ".join(map(str, report["seeds"]))
    return (
        f"Seeds {seeds}; {report['requests']:,} evaluation requests per seed; commit {report['commit']}; "
        f"{report['machine']}, one thread per model; {report['date']}."
    )


def _plots(report: dict[str, Any]) -> str:
    return "\n\n".join(f"![{text}]({name})" for name, text in report["plots"].items())


def _block_title(block: str) -> str:
    return (
        "The paper's architecture: MoNN Small over Two Tower" if block == "ladder" else "The default recipe"
    )


def _name(row: dict[str, Any], seeds: Sequence[int]) -> str:
    done = len(row["seeds"])
    return row["label"] if done in (0, len(seeds)) else f"{row['label']} ({done} of {len(seeds)} seeds)"


def _quality(report: dict[str, Any], rows: Sequence[dict[str, Any]], reference: str) -> str:
    """NE with its change against the row named ``reference``, and the ranking figures."""
    tasks = report["tasks"]
    header = ["model", "NE change, paper"]
    header += [name for task in tasks for name in (f"NE {task}", f"change vs {reference}")]
    header += [label for _, label in report["columns"]]
    lines = []
    for row in rows:
        baseline = row["id"] == row["reference"] and row["paper"]["ne"] is not None
        line = [_name(row, report["seeds"]), "baseline" if baseline else percent(row["paper"]["ne"])]
        for task in tasks:
            line += [mean_std(row["figures"], f"ne.{task}"), change(row["ne_change"].get(task))]
        lines.append([*line, *(mean_std(row["figures"], name) for name, _ in report["columns"])])
    return markdown(header, lines)


def _retrieval(report: dict[str, Any]) -> str:
    """The pruned search beside XS, EBR and XL flat."""
    header = ["model", "recall vs XS, paper", "Recall@100 vs XS", "Recall@100 vs EBR", "gap closure",
              "search recall@100", "items scored"]  # fmt: skip
    lines = []
    for row in report["rows"]:
        closure = row["gap_closure"]
        lines.append(
            [
                _name(row, report["seeds"]),
                "baseline" if row["id"] == row["reference"] else percent(row["paper"]["recall"], 1),
                change(row["recall_vs_xs"]),
                change(row["recall_vs_ebr"]),
                DASH if closure is None else f"{closure:.2f}".replace("-", "−"),
                mean_std(row["figures"], "search_recall@100"),
                mean_std(row["figures"], "scored_share"),
            ]
        )
    return markdown(header, lines)


def _cost(report: dict[str, Any]) -> str:
    """Counted FLOPs, measured time, and the paper's columns."""
    header = ["model", "FLOPs, paper", "FLOPs of one inference", "FLOPs per pair", "FLOPs per request"]
    header += [
        "nodes scored per layer",
        "ms per request (10–90%)",
        "requests",
        "cost vs XS",
        "cost vs XS, paper",
    ]
    header += ["paper's formula", "cost vs XL", "Recall@100"]
    lines = []
    for row in report["rows"]:
        paper, flops, cost = row["paper"], row["flops"], row["cost"]
        times = counts = of_xs = of_xl = scored = DASH
        if cost is not None:
            times = f"{cost['median_ms']:.1f} ({cost['p10_ms']:.1f}–{cost['p90_ms']:.1f})"
            counts = str(cost["requests"])
            scored = " + ".join(f"{nodes:,.0f}" for nodes in cost["candidates"])
            of_xs = DASH if cost["of_xs"] is None else f"{cost['of_xs']:.2f}×"
            of_xl = DASH if cost["of_xl"] is None else f"{cost['of_xl']:.1%}"
        lines.append(
            [
                _name(row, report["seeds"]),
                DASH if paper["flops"] is None else f"{paper['flops']:,g}×",
                f"{si(flops['single'])} ({flops['single_ratio']:.3g}×)",
                f"{si(flops['pair'])} ({flops['pair_ratio']:.3g}×)",
                si(flops["request"]),
                scored,
                times,
                counts,
                of_xs,
                DASH if paper["cost"] is None else f"{paper['cost']:g}×",
                paper["theory"] or DASH,
                of_xl,
                mean_std(row["figures"], "recall@100"),
            ]
        )
    return markdown(header, lines)


def _notes(report: dict[str, Any]) -> list[str]:
    notes = (
        [TIE_RULE]
        if len(report["seeds"]) > 1
        else ["One seed: what is a difference and what is noise cannot be said."]
    )
    notes.append(
        "NE is of the item layer on held-out impressions. Recall and NDCG are over the whole corpus, through the "
        "pruned search. Search recall is against exhaustive scoring with the same model. Items scored: the share of a "
        "request's candidates that the item layer scores."
    )
    notes.append("“NE change, paper” is printed by the paper for its own data, relative to the first row.")
    if report["table"] != "table1":
        notes.append(
            "Codewords used: the share that has items, in the index layer where it is smallest. Largest node × I: the "
            "share of the items in the fullest codeword times the number of codewords; 1 is perfect balance."
        )
    if report["table"] == "table1":
        notes += [
            "The paper prints ten models; the eleventh is this data set's own recipe. EBR is read as Two Towers under "
            "a k-means index. Two-layer rows have K₁·√K₂ nodes, K being the recipe's codebooks, and keep a "
            "tenth of them.",
            "Gap closure: (row − EBR) / (XL flat − EBR) of Recall@100; a dash where XL flat is not above EBR.",
            "Milliseconds: measured in one process with one thread, one request at a time, every request through all "
            "rows before the next; rows that take long answer fewer of them.",
            "FLOPs are matrix products, a multiply-add is two. Of one inference: user tower, item tower and pair, "
            "what layers share counted once. Of a request: the user's part, and the pairs of all nodes scored. In "
            "brackets, and in the paper's column, relative to MoNN Small, flat.",
        ]
    notes += [f"Data: {note}" for note in report["data_notes"]]
    commits = report["trained_at"]
    if commits and commits != [report["commit"]]:
        notes.append(
            f"Models were trained, or calibrated and evaluated anew, at commit {', '.join(commits)}."
        )
    if report["trained_on"] not in ([], ["CPU"]):
        notes.append(f"Models were trained and evaluated on {', '.join(report['trained_on'])}.")
    for gap in report["missing"]:
        notes.append(f"**Missing: {gap['label']}, seed {gap['seed']}**: {gap['reason']}")
    return notes
