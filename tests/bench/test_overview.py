"""The page over all data sets: what it reads from reports, when a target is reached, what is committed."""

import json
from pathlib import Path

import pytest

from hsnn_bench.overview import TARGETS, Reports, headline, read_reports, render, targets, write_overview
from hsnn_core.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


def figure(mean, *more):
    return {"mean": mean, "std": 0.01, "values": {str(i): v for i, v in enumerate((mean, *more), 1)}}


def row(name, over_ebr=None, closure=None, of_xl=None, changed=None, **figures):
    return {
        "id": name,
        "label": f"{name} (implicit)",
        "figures": {key.replace("_at_", "@"): value for key, value in figures.items()},
        "recall_vs_ebr": over_ebr,
        "gap_closure": closure,
        "cost": None if of_xl is None else {"of_xl": of_xl},
        "ne_change": {} if changed is None else {"click": changed},
    }


def report(*rows, **more):
    return {
        "command": "hsnn bench x",
        "date": "2026-11-28",
        "tasks": ["click"],
        "seeds": [1, 2],
        "rows": rows,
    } | more


def moved(percent, interval=0.1, tie=False):
    return {"percent": percent, "interval": interval, "tie": tie}


def outcome(start, own):
    """The outcome of the first target whose figure starts so."""
    return next(target for target in TARGETS if target.figure.startswith(start)).read(own)


def table1(data="beauty", **recipe):
    return Reports(data, {"table1": report(row("xs"), row("ebr"), row("recipe", **recipe))})


@pytest.mark.parametrize(
    ("start", "recipe", "met"),
    [
        ("HR@10", {"recall_at_10": figure(0.0821), "ndcg_at_10": figure(0.0424)}, True),
        ("HR@10", {"recall_at_10": figure(0.09), "ndcg_at_10": figure(0.0423)}, False),
        ("HSNN over EBR", {"over_ebr": moved(15.0)}, True),
        ("HSNN over EBR", {"over_ebr": moved(14.99)}, False),
        ("HSNN over EBR", {"over_ebr": moved(20.0, 21.0, tie=True)}, False),
        ("gap closure", {"closure": 0.95, "of_xl": 0.07}, True),
        ("gap closure", {"closure": 1.2, "of_xl": 0.071}, False),
        ("gap closure", {"closure": 0.94, "of_xl": 0.01}, False),
        ("search recall", {"search_recall_at_100": figure(0.98), "scored_share": figure(0.1)}, True),
        ("search recall", {"search_recall_at_100": figure(0.99), "scored_share": figure(0.101)}, False),
        ("search recall", {"search_recall_at_100": figure(0.979), "scored_share": figure(0.05)}, False),
        ("calibration", {"lowest_calibration": figure(0.97), "highest_calibration": figure(1.03)}, True),
        # the worst seed counts, not the mean
        ("calibration", {"lowest_calibration": figure(0.99, 0.96), "highest_calibration": figure(1.0)}, False),
        ("codewords", {"occupancy": figure(0.95), "largest_node": figure(5.0)}, True),
        ("codewords", {"occupancy": figure(1.0), "largest_node": figure(4.0, 5.1)}, False),
    ],
)  # fmt: skip
def test_a_target_is_reached_at_its_bound_and_missed_beyond(start, recipe, met):
    assert outcome(start, table1(**recipe)).met is met


def test_what_was_not_measured_or_is_not_asked_has_no_outcome():
    assert [target.figure for target in TARGETS if target.read(table1()) is not None] == []
    own = table1("gowalla", recall_at_10=figure(0.5), ndcg_at_10=figure(0.5), recall_at_20=figure(0.1824))
    cells = {line.split(" | ")[0]: line.split(" | ")[2].rstrip(" |") for line in targets([own]).splitlines()}
    assert cells["| HR@10 / NDCG@10, search"] == ""
    assert cells["| Recall@20, search"] == "0.1824 ± 0.0100 ✓"
    assert cells["| search recall@100"] == "–"


def test_changes_over_ebr_are_taken_seed_by_seed_and_a_tie_is_called_one():
    def shown(*recall):
        ebr, hsnn = row("ebr", recall_at_10=figure(0.1, 0.2)), row("recipe", recall_at_10=figure(*recall))
        return headline([Reports("toys", {"table1": report(ebr, hsnn)})]).splitlines()[2]

    assert "+10.00% ± 0.00 |" in shown(0.11, 0.22)
    assert ", tie |" in shown(0.15, 0.2)


def with_cascade(hsnn=0.3):
    def behind(depth, mean, over):
        shown = row(f"ebr+small@{depth}", recall_at_100=figure(mean))
        return shown | {"depth": depth, "hsnn_over": {"recall@100": moved(over)}}

    own = row("recipe", recall_at_100=figure(hsnn)) | {"depth": None, "cost": {"candidates": [32, 900, 1200]}}
    return Reports("toys", {
        "table1": report(row("ebr"), row("recipe", recall_at_100=figure(0.3))),
        "cascade": report(behind(200, 0.2, 50.0), behind(1000, 0.28, 7.1), behind(4000, 0.29, 3.4), own),
    })  # fmt: skip


def test_the_cascade_that_scores_as_many_items_stands_beside_hsnn():
    line = headline([with_cascade()]).splitlines()[3]
    assert "| 0.2800 ± 0.0100 | 0.3000 ± 0.0100 |" in line and "| +7.10% ± 0.10 |" in line


def test_a_cascade_of_other_models_than_the_tables_is_not_shown():
    line = headline([with_cascade(hsnn=0.31)]).splitlines()[3]
    assert "| – | 0.3000 ± 0.0100 |" in line


def test_throughput_is_reached_when_every_pair_of_trainings_reaches_it():
    def found(low):
        measured = {"ratio": 0.95, "ratio_range": [low, 1.2], "command": "", "date": ""}
        return outcome("JOIM", Reports("beauty", {"table1": report(), "throughput": measured}))

    assert found(0.9).met and not found(0.89).met
    assert found(0.8).text == "0.95, single pairs 0.80 to 1.20"


def test_two_towers_are_held_against_the_best_of_three_and_a_list_of_popular_items_is_not_among_them():
    reports = {
        "table1": report(row("xs", recall_at_100=figure(0.2)), row("recipe")),
        "baselines": report(row("recent", recall_at_100=figure(0.9)), row("als", recall_at_100=figure(0.19)),
                            row("bpr", recall_at_100=figure(0.21))),
    }  # fmt: skip
    found = outcome("two-tower", Reports("toys", reports))
    assert (found.text, found.met) == ("0.200, bpr 0.210", False)
    assert "0.9000 (recent)" in headline([Reports("toys", reports)])


@pytest.mark.parametrize(
    ("change", "met"), [(moved(-0.15), True), (moved(-0.14), False), (moved(-3.0, tie=True), False)]
)
def test_lti_has_to_be_better_by_more_than_noise(change, met):
    tables = {"table1": report(row("recipe")), "table2": report(row("sil"), row("lti", changed=change))}
    own = Reports("beauty", tables)
    assert outcome("NE of LTI", own).met is met
    assert outcome("the same", own) is None


def test_every_part_of_lti_has_to_be_missed():
    names = ("no-temperature", "no-warmup", "no-balance")

    def removed(*changes):
        rows = [row(name, changed=change) for name, change in zip(names, changes)]
        return outcome("NE without", Reports("beauty", {"table1": report(), "table3": report(*rows)}))

    assert removed(moved(0.1), moved(0.2), moved(0.3)).met
    assert not removed(moved(0.1), moved(0.2), moved(0.3, tie=True)).met
    assert not removed(moved(0.1), moved(-0.2), moved(0.3)).met
    assert removed(moved(0.1), moved(0.2)) is None


def test_a_row_per_target_and_a_column_per_data_set():
    lines = targets([table1("beauty"), table1("toys")]).splitlines()
    assert len(lines) == 2 + len(TARGETS)
    assert lines[0] == "| figure | target | beauty | toys |"


def test_a_folder_without_tables_says_how_to_make_one(tmp_path):
    with pytest.raises(
        DataError, match=r"no table1-<data>\.json of beauty, .*hsnn bench table1 --data beauty"
    ):
        write_overview(tmp_path)


def test_page_and_plot_are_written_beside_the_tables(tmp_path):
    for kind in ("table1", "baselines"):
        (tmp_path / f"{kind}-beauty.json").write_text((RESULTS / f"{kind}-beauty.json").read_text())
    assert json.loads((tmp_path / "table1-beauty.json").read_text())["command"] in (
        write_overview(tmp_path).read_text()
    )
    assert (tmp_path / "overview.png").stat().st_size > 5000


def test_the_committed_page_is_that_of_the_committed_tables():
    assert (RESULTS / "overview.md").read_text() == render(read_reports(RESULTS)), "run: hsnn bench overview"


def test_the_readmes_headline_is_that_of_the_committed_tables():
    readme = (ROOT / "README.md").read_text()
    shown = readme.split("<!-- overview: begin -->\n")[1].split("\n<!-- overview: end -->")[0]
    assert shown.strip() == headline(read_reports(RESULTS)), (
        "copy the first table of docs/results/overview.md"
    )
