"""Retrieval figures: the candidates of every request, for the search and its twin alike."""

import numpy as np
import pytest
from tiny_world import tables

from hsnn_cli.commands_training import describe
from hsnn_train import retrieval as module
from hsnn_train.data.dataset import build_dataset
from hsnn_train.data.requests import evaluation_requests
from hsnn_train.data.splits import Split
from hsnn_train.retrieval import retrieval
from hsnn_train.trainer import Trainer

WIDE = {"widths": [100, 100], "max_k": 120, "requests": 1000}


@pytest.fixture
def report_of(dataset, make_recipe, tmp_path, monkeypatch):
    """retrieval() of a model after one step, and the results of its searches and of the twin."""

    def run(search=(), model=(), dataset=dataset):
        recipe = make_recipe(train={"max_steps": 1}, search=dict(search), model=dict(model))
        trainer = Trainer(recipe, dataset, tmp_path / "run", progress=False)
        trained = trainer.train()
        seen = {"search": [], "exhaustive": []}
        for name, results in seen.items():
            function = getattr(module, name)

            def recorded(*arguments, function=function, results=results, **options):
                results.append(function(*arguments, **options))
                return results[-1]

            monkeypatch.setattr(module, name, recorded)
        return retrieval(trained, dataset, recipe, trainer.state), seen["search"], seen["exhaustive"]

    return run


@pytest.mark.parametrize("candidates", ["new", "seen_before"])
def test_only_candidates_are_found(report_of, candidates):
    log = tables(users=12, rows=240)  # so few that items appear for the first time in test
    dataset = build_dataset(log.schema, log, Split.from_dict({"fractions": [0.5, 0.1, 0.4]}), seed=1)
    report, found, exact = report_of({**WIDE, "candidates": candidates}, dataset=dataset)
    requests = evaluation_requests(dataset, "test", candidates, 1000)
    mask = requests.eligible(slice(None))
    assert not mask.all()
    row_of = {key: row for row, key in enumerate(dataset.item_keys.tolist())}
    start = 0
    for ours, twin in zip(found, exact):
        np.testing.assert_array_equal(ours.valid, mask[start : start + len(ours.valid)].sum(1))
        for ids, count, allowed in zip(ours.item_ids, ours.valid, mask[start:]):
            assert {row_of[key] for key in ids[:count].tolist()} == set(np.flatnonzero(allowed))
        # The widths are full; torch's last bits depend on how many candidates are scored together.
        np.testing.assert_array_equal(ours.valid, twin.valid)
        np.testing.assert_allclose(ours.rank_score, twin.rank_score, rtol=1e-5)
        start += len(ours.valid)
    assert report["requests"] == start == len(requests)
    assert report["candidates_per_request"] == pytest.approx(mask.sum(1).mean())
    assert report["scored_share"] == 1.0
    assert report["positives_dropped"] == requests.positives - sum(map(len, requests.wanted)) > 0
    assert report["requests_dropped"] == requests.asked - len(requests)
    assert report["candidates"] == candidates
    title = f"({candidates}) of 120 items, {report['positives_dropped']} of {requests.positives} positives are none"
    assert title in describe({"pointwise": [], "index": [], "split": "test", "retrieval": report})
    assert report["search"] == pytest.approx(report["exhaustive"], abs=0.01)
    assert min(report["search_recall"].values()) > 0.99
    assert [row["true_item_kept"] for row in report["per_layer"]] == [1.0, 1.0]


def test_figures_of_all_candidates(report_of):
    report, found, _ = report_of()
    assert list(report["search"]) == ["recall@10", "recall@20", "recall@50", "ndcg@10", "ndcg@20"]
    assert list(report["search_recall"]) == ["@10", "@20", "@50"]
    assert (report["candidates"], report["positives_dropped"], report["requests_dropped"]) == ("all", 0, 0)
    assert report["candidates_per_request"] == report["corpus"] == 120
    scored = np.concatenate([result.layers[-1].candidates for result in found])
    assert report["scored_share"] == pytest.approx(scored.mean() / 120)


def test_a_flat_model_is_searched_once(report_of):
    flat = {"layers": ["small"], "codebooks": []}
    report, found, exact = report_of({"candidates": "new", "widths": []}, flat)
    assert found
    assert not exact
    assert report["search"] == report["exhaustive"]
    assert set(report["search_recall"].values()) == {1.0}
    assert report["scored_share"] == 1.0
    assert report["per_layer"] == []
