"""`hsnn bench overview`: the committed tables of all data sets on one page, beside the targets of `TARGETS`.

    docs/results/{table1,table2,table3,cascade,baselines,throughput}-<data>.json -> docs/results/overview.{md,png}

Nothing is trained or measured, and no figure is typed: a page that differs from its tables is out of date.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hsnn_core.errors import DataError
from hsnn_core.files import write_bytes

from .figures import Summary, relative_change
from .plots import recall_by_data
from .report import DASH, change, markdown, mean_std

#: In the order of the page; data sets without a Table 1 are left out.
DATA = ("beauty", "toys", "gowalla", "globo", "ml-100k")
KINDS = ("table1", "table2", "table3", "cascade", "baselines", "throughput")
#: What two towers are to be no worse than; all that ranks without a network of ours.
OUTSIDE = ("item_knn", "als", "bpr")
WITHOUT_NETWORK = ("popularity", "recent", "lists", *OUTSIDE)
RECALL = "recall@100"
MET, MISSED = "✓", "✗"
#: Where two towers are a measure.
STATIC = ("beauty", "toys", "gowalla", "ml-100k")


@dataclass(frozen=True)
class Reports:
    """What is known of a data set: report by kind, rows of a report by id."""

    data: str
    reports: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def rows(self, kind: str) -> dict[str, dict[str, Any]]:
        """Rows by id; empty without such a report."""
        return {row["id"]: row for row in self.reports.get(kind, {}).get("rows", [])}

    def figures(self, kind: str, row: str) -> dict[str, dict[str, Any]]:
        """Summaries of a row by figure; empty where it is not known."""
        found: dict[str, dict[str, Any]] = self.rows(kind).get(row, {}).get("figures", {})
        return found

    def mean(self, kind: str, row: str, figure: str) -> float | None:
        """Mean over the seeds, None where it is not known."""
        found = self.figures(kind, row).get(figure)
        return None if found is None else float(found["mean"])

    @property
    def task(self) -> str:
        """The task whose NE stands in the paper's column: the first."""
        return str(self.reports["table1"]["tasks"][0])


@dataclass(frozen=True)
class Outcome:
    """What a data set has of a target: the figures, and whether they reach it."""

    text: str
    met: bool

    def __str__(self) -> str:
        return f"{self.text} {MET if self.met else MISSED}"


@dataclass(frozen=True)
class Target:
    """A figure, what is asked of it, how a data set's outcome is read (None where nothing was measured), and the data
    sets of which it is asked: of all when there is none."""

    figure: str
    asked: str
    read: Callable[[Reports], Outcome | None]
    only: tuple[str, ...] = ()

    def cell(self, own: Reports) -> str:
        """What the page says of a data set: nothing where it is not asked."""
        if self.only and own.data not in self.only:
            return ""
        outcome = self.read(own)
        return DASH if outcome is None else str(outcome)


def read_reports(results: Path) -> list[Reports]:
    """The data sets of `DATA` that have a Table 1 in ``results``. Raises DataError when none has."""
    found = []
    for data in DATA:
        paths = {kind: results / f"{kind}-{data}.json" for kind in KINDS}
        reports = {kind: json.loads(path.read_text()) for kind, path in paths.items() if path.exists()}
        if "table1" in reports:
            found.append(Reports(data, reports))
    if not found:
        raise DataError(
            f"{results}: no table1-<data>.json of {', '.join(DATA)}; make one with: hsnn bench table1 --data beauty"
        )
    return found


def write_overview(results: Path) -> Path:
    """Write overview.md and overview.png into ``results``; returns the page's path. Raises DataError, see
    `read_reports`."""
    reports = read_reports(results)
    page = results / "overview.md"
    write_bytes(page, render(reports).encode())
    recall_by_data(_recalls(reports), page.with_suffix(".png"))
    return page


def render(reports: Sequence[Reports]) -> str:
    """The page as Markdown."""
    commands = [
        f"- {own.data}: `{report['command']}`, {report['date']}"
        for own in reports
        for report in own.reports.values()
    ]
    parts = [
        "# All data sets at a glance",
        "`hsnn bench overview`, from the tables beside it; no figure here was typed.",
        "![Recall@100 of the data sets](overview.png)",
        "## Retrieval",
        headline(reports),
        NOTE,
        "## Targets",
        f"{MET} reached, {MISSED} not; a dash where nothing was measured, blank where nothing is asked. Recall is "
        "asked of means over seeds, calibration and codewords of the worst seed, changes beyond their interval.",
        targets(reports),
        "## Made by",
        "\n".join(commands),
    ]
    return "\n\n".join(parts) + "\n"


NOTE = (
    "Test split, all items that a user can still get are candidates (on Globo those that had appeared). HSNN and EBR "
    "through their pruned search. EBR, two towers under a k-means index, and the flat two-tower read the same columns"
    " of users and items as HSNN, but no crossings of the two: no inner product can. EBR → MoNN Small: about as many "
    "items as HSNN's item layer scores, retrieved by EBR and ordered by a flat MoNN that reads the crossings, the "
    "plain alternative to HSNN (`hsnn bench cascade`). Outside: the best of popularity, recent popularity (Globo "
    "alone), neighbour lists (not on ml-100k), item-KNN, ALS and BPR, tuned. ± is the standard deviation over seeds, "
    "behind a change the half width of its 95% interval. On Globo half of the clicks are on articles without a "
    "training click, where two towers are no measure."
)


def headline(reports: Sequence[Reports]) -> str:
    """Data sets against what ranks them, as a Markdown table."""
    header = ["data", "figure", "best outside", "two-tower, flat", "EBR", "EBR → MoNN Small", "**HSNN**",
              "HSNN over EBR", "HSNN over EBR → Small", "items scored, EBR, HSNN",
              "search recall@100"]  # fmt: skip
    lines = []
    for own in reports:
        xs, ebr, hsnn = (own.figures("table1", row) for row in ("xs", "ebr", "recipe"))
        cascade = _cascade(own)
        ranked = [
            [
                label,
                _best_outside(own, name),
                *(mean_std(row, name) for row in (xs, ebr, cascade.get("figures", {}), hsnn)),
                _over_ebr(ebr, hsnn, name),
                change(cascade.get("hsnn_over", {}).get(name)),
            ]
            for name, label in (("recall@10", "Recall@10"), (RECALL, "Recall@100"))
        ]
        shares = f"{mean_std(ebr, 'scored_share')}, {mean_std(hsnn, 'scored_share')}"
        lines.append([own.data, *ranked[0], "", ""])
        lines.append(["", *ranked[1], shares, _three(own.mean("table1", "recipe", "search_recall@100"))])
    return markdown(header, lines)


def targets(reports: Sequence[Reports]) -> str:
    """Targets against data sets, as a Markdown table."""
    lines = []
    for target in TARGETS:
        lines.append([target.figure, target.asked, *map(target.cell, reports)])
    return markdown(["figure", "target", *(own.data for own in reports)], lines)


# Cells.


def _three(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def _outside(own: Reports, name: str, methods: Sequence[str]) -> tuple[str, float] | None:
    """The best of the methods, and its figure."""
    rows = own.rows("baselines")
    found = [(rows[row]["label"], own.mean("baselines", row, name)) for row in methods if row in rows]
    known = [(label.split(" (")[0], value) for label, value in found if value is not None]
    return max(known, key=lambda pair: pair[1], default=None)


def _best_outside(own: Reports, name: str) -> str:
    best = _outside(own, name, WITHOUT_NETWORK)
    return DASH if best is None else f"{best[1]:.4f} ({best[0]})"


def _cascade(own: Reports) -> dict[str, Any]:
    """The cascade whose ranker scores about as many items as HSNN's item layer does; empty where none was measured, or
    of other models than Table 1's."""
    rows = own.rows("cascade")
    behind = [row for row in rows.values() if row["depth"] is not None]
    if not behind or rows["recipe"]["figures"][RECALL] != own.figures("table1", "recipe").get(RECALL):
        return {}
    items = rows["recipe"]["cost"]["candidates"][-1]
    return min(behind, key=lambda row: abs(math.log(row["depth"] / items)))


def _over_ebr(ebr: Mapping[str, Any], hsnn: Mapping[str, Any], name: str) -> str:
    if name not in ebr or name not in hsnn:
        return DASH
    found = relative_change(Summary(**hsnn[name]), Summary(**ebr[name]))
    return change(None if found is None else asdict(found))


def _recalls(reports: Sequence[Reports]) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Recall@100 (mean, deviation over seeds) of every data set, by the models that are known."""
    labels = {"xs": "two-tower, flat", "ebr": "two towers + k-means (EBR)", "recipe": "HSNN, default recipe",
              "xl": "MoNN XL, flat"}  # fmt: skip
    found: dict[str, dict[str, tuple[float, float | None]]] = {}
    for own in reports:
        outside = _outside(own, RECALL, WITHOUT_NETWORK)
        found[own.data] = {} if outside is None else {"best without a network": (outside[1], None)}
        for row, label in labels.items():
            figure = own.figures("table1", row).get(RECALL)
            if figure is not None:
                found[own.data][label] = figure["mean"], figure["std"]
    return found


# Targets.


def _at_least(figure: str, said: str, asked: Mapping[str, Mapping[str, float]]) -> Target:
    """The recipe's figures against those asked of some data sets: {"beauty": {"recall@10": .0821}}."""

    def read(own: Reports) -> Outcome | None:
        figures, wanted = own.figures("table1", "recipe"), asked.get(own.data, {})
        if not wanted or any(name not in figures for name in wanted):
            return None
        text = " / ".join(mean_std(figures, name) for name in wanted)
        return Outcome(text, all(figures[name]["mean"] >= least for name, least in wanted.items()))

    return Target(figure, said, read, tuple(asked))


def _two_tower(own: Reports) -> Outcome | None:
    best, two_tower = _outside(own, RECALL, OUTSIDE), own.mean("table1", "xs", RECALL)
    if best is None or two_tower is None:
        return None
    return Outcome(f"{two_tower:.3f}, {best[0]} {best[1]:.3f}", two_tower >= best[1])


def _over(own: Reports) -> Outcome | None:
    found = own.rows("table1").get("recipe", {}).get("recall_vs_ebr")
    return None if found is None else Outcome(change(found), found["percent"] >= 15 and found["tie"] is False)


def _closure(own: Reports) -> Outcome | None:
    row = own.rows("table1").get("recipe", {})
    closure, cost = row.get("gap_closure"), (row.get("cost") or {}).get("of_xl")
    if closure is None or cost is None:
        return None
    return Outcome(f"{closure:.2f} at {cost:.1%}", closure >= 0.95 and cost <= 0.07)


def _search(own: Reports) -> Outcome | None:
    recall, share = (own.mean("table1", "recipe", name) for name in ("search_recall@100", "scored_share"))
    if recall is None or share is None:
        return None
    return Outcome(f"{recall:.3f} at {share:.1%}", recall >= 0.98 and share <= 0.1)


def _lti(block: str) -> Callable[[Reports], Outcome | None]:
    def read(own: Reports) -> Outcome | None:
        row = own.rows("table2").get(f"{block}lti", {})
        found = row.get("ne_change", {}).get(own.task)
        if found is None:
            return None
        return Outcome(change(found), found["percent"] <= -0.15 and found["tie"] is False)

    return read


def _removed(block: str) -> Callable[[Reports], Outcome | None]:
    def read(own: Reports) -> Outcome | None:
        rows = own.rows("table3")
        names = {"schedule": "no-temperature", "warm-up": "no-warmup", "balance": "no-balance"}
        found = {
            label: rows.get(block + row, {}).get("ne_change", {}).get(own.task)
            for label, row in names.items()
        }
        known = {label: value for label, value in found.items() if value is not None}
        if len(known) < len(names):
            return None
        text = "; ".join(f"{label} {change(value)}" for label, value in known.items())
        worse = all(value["percent"] > 0 and value["tie"] is False for value in known.values())
        return Outcome(text, worse)

    return read


def _calibration(own: Reports) -> Outcome | None:
    """Over all seeds, layers and tasks."""
    figures = own.figures("table1", "recipe")
    lowest, highest = (figures.get(f"{name}_calibration") for name in ("lowest", "highest"))
    if lowest is None or highest is None:
        return None
    low, high = min(lowest["values"].values()), max(highest["values"].values())
    return Outcome(f"{low:.3f} to {high:.3f}", low >= 0.97 and high <= 1.03)


def _occupancy(own: Reports) -> Outcome | None:
    figures = own.figures("table1", "recipe")
    if "occupancy" not in figures or "largest_node" not in figures:
        return None
    used = min(figures["occupancy"]["values"].values())
    largest = max(figures["largest_node"]["values"].values())
    return Outcome(f"{used:.2f} / {largest:.1f}", used >= 0.95 and largest <= 5)


def _throughput(own: Reports) -> Outcome | None:
    """Single pairs of trainings are noisy: reached when all of them reach it."""
    report = own.reports.get("throughput", {})
    if not report:
        return None
    low, high = report["ratio_range"]
    return Outcome(f"{report['ratio']:.2f}, single pairs {low:.2f} to {high:.2f}", low >= 0.9)


TARGETS = (
    _at_least(
        "HR@10 / NDCG@10, search", "Beauty .0821 / .0424, Toys .0800 / .0420",
        {"beauty": {"recall@10": 0.0821, "ndcg@10": 0.0424}, "toys": {"recall@10": 0.08, "ndcg@10": 0.042}},
    ),
    _at_least("Recall@20, search", "Gowalla .1824 (LightGCN)", {"gowalla": {"recall@20": 0.1824}}),
    Target("two-tower, exhaustive, Recall@100", "the best of item-KNN, ALS, BPR", _two_tower, STATIC),
    Target("HSNN over EBR, Recall@100", "+15%, three sets", _over, STATIC),
    Target("gap closure to XL flat, Recall@100", ".95 at 7% of its cost", _closure),
    Target("search recall@100", ".98 at 10% of the items scored", _search),
    Target("NE of LTI over SIL, Small over two towers", "−.15%, beyond noise", _lti("")),
    Target("the same, default recipe", "−.15%, beyond noise", _lti("recipe-")),
    Target("NE without LTI's parts, Small over two towers", "worse, each, beyond noise", _removed("")),
    Target("the same, default recipe", "worse, each, beyond noise", _removed("recipe-")),
    Target("calibration, every seed, layer and task", ".97 to 1.03", _calibration),
    Target("codewords used / largest, times its fair share", ".95 / at most 5", _occupancy),
    Target("JOIM training throughput", ".9 of the same without LTI", _throughput, ("beauty",)),
)  # fmt: skip
