"""Two towers with a ranker behind them: what it returns, and the report of a small simulated world."""

import json
from dataclasses import replace

import numpy as np
import pytest

from hsnn_bench.cascade import Stage, rerank
from hsnn_cli.commands_training import load_data
from hsnn_cli.main import main
from hsnn_core.errors import SchemaError
from hsnn_train.checkpoint import load_run
from hsnn_train.data.requests import evaluation_requests

SMALL = [
    "--set", "data.options={users: 300, ads: 200, impressions: 3000, days: 14, seed: 7}",
    "--set", "train.max_steps=6", "--set", "train.batch_size=128", "--set", "train.refresh_steps=3",
]  # fmt: skip
USERS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the command ran."""
    folder = tmp_path_factory.mktemp("cascade")
    arguments = ["bench", "cascade", "--data", "synthetic", "--seeds", "1", "--requests", "20", "--depth", "100",
                 "--results", str(folder / "results"), "--work", str(folder / "work"), *SMALL]  # fmt: skip
    assert main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def stages(folder):
    """The retriever and the ranker, and some requests."""
    found = {}
    for path in (folder / "work" / "synthetic").iterdir():
        if (path / "done.json").exists():
            found["+".join(load_run(path).recipe.model.layers)] = path
    recipe = load_run(found["cpu_s"]).recipe
    dataset = load_data(recipe)
    requests = evaluation_requests(dataset, "test", "all", USERS)
    return Stage(found["cpu_xs+cpu_xs"], dataset), Stage(found["cpu_s"], dataset), requests


def asked(stage, requests):
    return requests.asked_of(slice(0, USERS), stage.index)


def test_the_report(folder):
    report = json.loads((folder / "results" / "cascade-synthetic.json").read_text())
    assert [row["id"] for row in report["rows"]] == ["ebr", "ebr+small@100", "small", "recipe"]
    assert report["simulated"] and report["requests"] == 20
    for row in report["rows"]:
        assert 0 <= row["figures"]["recall@100"]["mean"] <= 1
        assert row["cost"]["median_ms"] > 0
    behind = report["rows"][1]
    # the nodes that EBR scored, the items under its beam, which are fewer than a hundred here, and these once more
    nodes, items, ordered = behind["cost"]["candidates"]
    assert nodes == 38 and items == ordered < 100
    # of what comes back whole, only the order changes
    assert behind["figures"]["recall@100"] == report["rows"][0]["figures"]["recall@100"]
    page = (folder / "results" / "cascade-synthetic.md").read_text()
    assert "first 100 ordered by MoNN Small" in page and "simulated" in page and str(folder) not in page
    assert "--depth 100" in page
    assert (folder / "results" / "cascade-synthetic.png").exists()


def test_ordering_every_item_is_what_the_flat_ranker_finds(stages):
    _, ranker, requests = stages
    users, _, allowed = asked(ranker, requests)
    exact = ranker.find(users, allowed, ranker.index.items)
    mixed = np.random.default_rng(5).permutation(ranker.index.items)
    shuffled = replace(exact, item_ids=exact.item_ids[:, mixed], positions=exact.positions[:, mixed])
    again = rerank(shuffled, ranker.index.items, ranker, users)
    np.testing.assert_array_equal(again.item_ids, exact.item_ids)
    np.testing.assert_array_equal(again.positions, exact.positions)
    np.testing.assert_allclose(again.rank_score, exact.rank_score, atol=1e-5)
    np.testing.assert_allclose(again.probabilities, exact.probabilities, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 7, 60])
def test_only_what_was_retrieved_first_comes_back(stages, depth):
    retriever, ranker, requests = stages
    users, _, allowed = asked(retriever, requests)
    found = retriever.find(users, allowed, 60)
    found = replace(found, valid=np.minimum(found.valid, [60, 3, 0, 60, 7]).astype(np.int32))
    ranked = rerank(found, depth, ranker, users)
    assert ranked.valid.tolist() == np.minimum(found.valid, depth).tolist()
    for user, count in enumerate(ranked.valid):
        assert sorted(ranked.item_ids[user, :count]) == sorted(found.item_ids[user, :count])
        scores = ranked.rank_score[user]
        assert (np.diff(scores[:count]) <= 0).all() and (scores[count:] == -np.inf).all()
        assert (ranked.probabilities[user, count:] == 0).all()
    assert ranked.layers[-1].candidates.tolist() == ranked.valid.tolist()


def test_a_ranker_with_an_index_is_refused(stages):
    retriever, _, requests = stages
    users, _, allowed = asked(retriever, requests)
    with pytest.raises(SchemaError, match="a ranker of 2 layers, expected one"):
        rerank(retriever.find(users, allowed, 10), 10, retriever, users)


def test_depths_that_cannot_give_a_hundred_are_refused(capsys):
    assert main(["bench", "cascade", "--data", "synthetic", "--depth", "99"]) == 1
    assert "--depth: got [99], expected numbers of items, each at least 100" in capsys.readouterr().err
