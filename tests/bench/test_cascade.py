"""Two towers with a ranker behind them: what it returns, and the report of a small simulated world."""

import json
from dataclasses import replace

import numpy as np
import pytest

from hsnn_bench import cascade, workers
from hsnn_bench.cascade import Line, Stages, rerank
from hsnn_bench.searcher import Searcher
from hsnn_cli.commands_training import load_data
from hsnn_cli.main import main
from hsnn_core.errors import DataError, SchemaError, SearchError
from hsnn_train.checkpoint import load_run
from hsnn_train.data.requests import evaluation_requests

SMALL = [
    "--set", "data.options={users: 300, ads: 400, impressions: 3000, days: 14, seed: 7}",
    "--set", "train.max_steps=6", "--set", "train.batch_size=128", "--set", "train.refresh_steps=3",
    "--set", "search.candidates=new",
]  # fmt: skip
USERS = 5
PRESETS = {"cpu_xs+cpu_xs": "ebr", "cpu_s": "small", "cpu_m+cpu_s+cpu_s": "recipe"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the command runs."""
    return tmp_path_factory.mktemp("cascade")


@pytest.fixture(scope="module")
def arguments(folder):
    """The command's, after it ran once."""
    found = ["bench", "cascade", "--data", "synthetic", "--seeds", "2", "--requests", "20", "--depth", "100",
             "--depth", "400", "--depth", "5000", "--results", str(folder / "results"),
             "--work", str(folder / "work"), *SMALL]  # fmt: skip
    assert main(found) == 0
    return found


@pytest.fixture(scope="module")
def report(arguments, folder):
    return json.loads((folder / "results" / "cascade-synthetic.json").read_text())


@pytest.fixture(scope="module")
def folders(arguments, folder):
    """(row, seed) -> run directory."""
    found = {}
    for path in (folder / "work" / "synthetic").iterdir():
        presets, _, rest = path.name.partition("-")
        if presets in PRESETS:
            found[PRESETS[presets], rest.split("-s")[1][0]] = path
    assert sorted(found) == [(name, seed) for name in sorted(cascade.STAGES) for seed in "12"]
    return found


@pytest.fixture(scope="module")
def stages(folders):
    """The models of the first seed, and some requests."""
    dataset = load_data(load_run(folders["small", "1"]).recipe)
    of = [Searcher(folders[name, "1"], dataset) for name in cascade.STAGES]
    return Stages(*of), evaluation_requests(dataset, "test", "new", USERS)


EVERY = slice(0, USERS)


def asked(searcher, requests):
    return requests.asked_of(EVERY, searcher.index)[0]


def test_the_report(report, folder):
    assert [row["id"] for row in report["rows"]] == [
        "ebr",
        "ebr+small@100",
        "ebr+small@400",
        "small",
        "recipe",
    ]
    assert report["simulated"] and 0 < report["requests"] <= 20 and report["seeds"] == [1, 2]
    for row in report["rows"]:
        assert row["cost"]["median_ms"] > 0 and len(row["figures"]["recall@100"]["values"]) == 2
    assert report["rows"][-1]["hsnn_over"] == {} and report["rows"][-1]["cost"]["of_hsnn"] == 1.0
    page = (folder / "results" / "cascade-synthetic.md").read_text()
    assert "EBR (Two Tower) → MoNN Small, 100" in page and "simulated" in page and str(folder) not in page
    assert (folder / "results" / "cascade-synthetic.png").exists()


def test_what_table_1_has_too_is_what_its_workers_found(report, folders):
    """So seeds, requests and candidates are the table's."""
    for row in report["rows"]:
        for seed, path in ((seed, path) for (name, seed), path in folders.items() if name == row["id"]):
            found = json.loads((path / "metrics.json").read_text())["retrieval"]["search"]
            for figure, summary in row["figures"].items():
                assert summary["values"][seed] == pytest.approx(found[figure], abs=1e-9)


def test_a_cascade_over_every_item_finds_what_the_ranker_finds(report):
    rows = {row["id"]: row for row in report["rows"]}
    assert rows["ebr+small@400"]["figures"] == rows["small"]["figures"]
    _, items, ordered = rows["ebr+small@100"]["cost"]["candidates"]
    assert ordered == 100 <= items


def test_a_second_call_only_measures_the_time(arguments, folder, report, monkeypatch):
    monkeypatch.setattr(cascade, "quality", None)
    monkeypatch.setattr(workers, "WORKER", ("false",))
    assert main(arguments) == 0
    again = json.loads((folder / "results" / "cascade-synthetic.json").read_text())
    assert [row["figures"] for row in again["rows"]] == [row["figures"] for row in report["rows"]]


def test_one_request_is_answered_as_among_others(stages):
    models, requests = stages
    for line in (Line("ebr", ""), Line("ebr+small@150", "", 150), Line("small", ""), Line("recipe", "")):
        together, ask = models.answer(line, requests, EVERY), models.asker(line, requests)
        for number in range(USERS):
            alone, count = ask(number), together.valid[number]
            assert alone.valid[0] == count
            np.testing.assert_array_equal(alone.item_ids[0, :count], together.item_ids[number, :count])


def test_ordering_every_item_is_what_the_flat_ranker_finds(stages):
    models, requests = stages
    ranker = models.ranker
    exact = ranker.find(requests, EVERY, ranker.index.items)
    rng, least = np.random.default_rng(5), exact.valid.min()
    mixed = [np.concatenate([rng.permutation(n), np.arange(n, exact.item_ids.shape[1])]) for n in exact.valid]
    shuffled = replace(exact, item_ids=np.take_along_axis(exact.item_ids, np.stack(mixed), axis=1))
    again = rerank(shuffled, ranker.index.items, ranker, asked(ranker, requests))
    assert least < ranker.index.items  # what a user has had is no candidate
    np.testing.assert_array_equal(again.valid, exact.valid)
    np.testing.assert_array_equal(again.item_ids[:, :least], exact.item_ids[:, :least])
    np.testing.assert_array_equal(again.positions[:, :least], exact.positions[:, :least])
    np.testing.assert_allclose(again.rank_score[:, :least], exact.rank_score[:, :least], atol=1e-5)
    np.testing.assert_allclose(again.probabilities[:, :least], exact.probabilities[:, :least], atol=1e-6)


@pytest.mark.parametrize("depth", [1, 7, 60])
def test_only_what_was_retrieved_first_comes_back(stages, depth):
    models, requests = stages
    found = models.retriever.find(requests, EVERY, 60)
    found = replace(found, valid=np.minimum(found.valid, [60, 3, 0, 60, 7]).astype(np.int32))
    ranked = rerank(found, depth, models.ranker, asked(models.ranker, requests))
    assert ranked.valid.tolist() == np.minimum(found.valid, depth).tolist()
    for user, count in enumerate(ranked.valid):
        assert sorted(ranked.item_ids[user, :count]) == sorted(found.item_ids[user, :count])
        scores = ranked.rank_score[user]
        assert (np.diff(scores[:count]) <= 0).all() and (scores[count:] == -np.inf).all()
        assert (ranked.probabilities[user, count:] == 0).all()
        assert (ranked.layers[-1].nodes[user, count:] == -1).all()
    assert ranked.layers[-1].candidates.tolist() == ranked.valid.tolist()
    assert ranked.total_microseconds > found.total_microseconds


def test_what_cannot_be_ranked_is_refused(stages, monkeypatch):
    models, requests = stages
    users, found = asked(models.ranker, requests), models.retriever.find(requests, EVERY, 10)
    with pytest.raises(SchemaError, match="a ranker of 2 layers, expected one"):
        rerank(found, 10, models.retriever, users)
    unknown = found.item_ids.copy()
    unknown[0, 0] = 987654
    with pytest.raises(DataError, match="item 987654 is not in the corpus of synthetic"):
        rerank(replace(found, item_ids=unknown), 10, models.ranker, users)
    monkeypatch.setattr(
        models.ranker.scorer, "score", lambda *_: (np.full((USERS, 10, 2), np.nan, np.float32),) * 2
    )
    with pytest.raises(SearchError, match="scores that are not finite"):
        rerank(found, 10, models.ranker, users)


def test_depths_that_cannot_give_a_hundred_are_refused(capsys):
    assert main(["bench", "cascade", "--data", "synthetic", "--depth", "99"]) == 1
    assert "--depth: got [99], expected numbers of items, each at least 100" in capsys.readouterr().err
