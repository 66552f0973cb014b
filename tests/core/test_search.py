from __future__ import annotations

import re

import numpy as np
import pytest
from core_fakes import assert_same_result, fake_scorer, one_user, random_index, random_users
from hypothesis import given, settings
from hypothesis import strategies as st

from hsnn_core.errors import DeadlineExceeded, SearchError
from hsnn_core.exhaustive import exhaustive
from hsnn_core.item_filter import MaskFilter
from hsnn_core.search import best, falling, rank_scores, search, sigmoid

RANK = np.array([1.0, 0.5], dtype=np.float32)


def full_widths(index):
    return [index.nodes(layer) for layer in range(1, index.layers)]


def naive_search(index, scorer, users, widths, k, rank, mask, adapt):
    """Algorithm 2 for one user at a time with lists, dictionaries and sorting."""

    def holds(node, layer, row=None):
        inside = index.ancestors(layer) == node
        return int(inside.sum() if row is None else mask[row, inside].sum())

    found, kept_nodes = [], []
    for row in range(len(users.ids)):
        user = one_user(users, row)
        state = scorer.open(user)
        candidates = {node: [] for node in range(index.nodes(1))}  # node -> ancestors' MoNN logits
        for layer in range(1, index.layers + 1):
            live = sorted(node for node in candidates if mask[row, index.ancestors(layer) == node].any())
            scored = []
            for node in live:
                previous = np.array(candidates[node], dtype=np.float32).reshape(1, 1, -1)
                monn, logits = scorer.score(state, layer, np.array([[node]]), previous)
                scored.append((-rank_scores(logits, rank)[0, 0], node, list(monn[0, 0])))
            scored, others = sorted(scored), []
            if layer == index.layers:
                scored = scored[:k]
            else:
                scored, others = scored[: widths[layer - 1]], scored[widths[layer - 1] :]
                every = sum(holds(node, layer) for _, node, _ in scored)
                passing = sum(holds(node, layer, row) for _, node, _ in scored)
                needed = max(k, int(np.sqrt(passing * every)))
                while adapt and others and sum(holds(node, layer, row) for _, node, _ in scored) < needed:
                    scored.append(others.pop(0))
                kept_nodes.append(sorted(node for _, node, _ in scored))
                below = index.parents(layer + 1)
                candidates = {
                    child: candidates[node] + monn
                    for _, node, monn in scored
                    for child in np.flatnonzero(below == node)
                }
        found.append([(int(index.item_ids[node]), -score) for score, node, _ in scored])
    return found, kept_nodes


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 4),
    items=st.integers(1, 50),
    batch=st.integers(1, 4),
    k=st.integers(1, 60),
    step=st.sampled_from([0.0, 0.5, 50.0]),
    masked=st.sampled_from([None, 0.0, 0.1, 0.7]),
)
def test_full_width_equals_exhaustive(seed, layers, items, batch, k, step, masked):
    rng = np.random.default_rng(seed)
    index = random_index(rng, layers, items)
    scorer, _ = fake_scorer(rng, index, step)
    users = random_users(rng, batch)
    mask = None if masked is None else rng.random((batch, items)) < masked
    allowed = None if mask is None else MaskFilter(index, mask)
    ours = search(index, scorer, users, full_widths(index), k, RANK, allowed)
    assert_same_result(ours, exhaustive(index, scorer, users, k, RANK, allowed))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 4),
    batch=st.integers(1, 3),
    width=st.integers(1, 4),
    step=st.sampled_from([0.0, 0.5, 50.0]),
    masked=st.sampled_from([1.0, 0.5, 0.05]),
    k=st.integers(1, 12),
    adapt=st.booleans(),
)
def test_narrow_beams_equal_a_naive_search(seed, layers, batch, width, step, masked, k, adapt):
    rng = np.random.default_rng(seed)
    index = random_index(rng, layers, 30)
    scorer, _ = fake_scorer(rng, index, step)
    users = random_users(rng, batch)
    mask = rng.random((batch, 30)) < masked
    widths = [width + layer for layer in range(layers - 1)]
    result = search(index, scorer, users, widths, k, RANK, MaskFilter(index, mask), adapt=adapt)
    found, kept = naive_search(index, scorer, users, widths, k, RANK, mask, adapt)
    for row in range(batch):
        count = result.valid[row]
        assert not adapt or count == min(k, mask[row].sum())
        ours = list(zip(result.item_ids[row, :count].tolist(), result.rank_score[row, :count]))
        assert ours == found[row]
    ours_kept = [
        [node for node in trace.nodes[row].tolist() if node >= 0]
        for row in range(batch)
        for trace in result.layers[:-1]
    ]
    assert ours_kept == kept


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 4),
    width=st.integers(1, 6),
    shares=st.lists(st.sampled_from([0.0, 0.05, 0.5, 1.0]), min_size=1, max_size=5),
)
def test_nodes_without_an_eligible_item_take_no_place_of_the_beam(seed, layers, width, shares):
    rng = np.random.default_rng(seed)
    index = random_index(rng, layers, 40)
    scorer, _ = fake_scorer(rng, index)
    mask = rng.random((len(shares), 40)) < np.array(shares)[:, None]  # every user has a mask of their own
    users = random_users(rng, len(shares))
    allowed = MaskFilter(index, mask)
    result = search(index, scorer, users, [width] * (layers - 1), 40, RANK, allowed, adapt=False)
    for row in range(len(shares)):
        for layer, trace in enumerate(result.layers, start=1):
            holding = np.unique(index.ancestors(layer)[mask[row]])
            kept = trace.nodes[row][trace.nodes[row] >= 0]
            assert np.isin(kept, holding).all()
            assert trace.kept[row] == len(kept)
            # Candidates are the eligible nodes under those kept above; all of them that fit are kept.
            if layer > 1:
                above = result.layers[layer - 2].nodes[row]
                holding = holding[np.isin(index.parents(layer)[holding], above)]
            assert trace.candidates[row] == len(holding)
            assert len(kept) == min(len(holding), 40 if layer == layers else width)
        assert mask[row, result.positions[row, : result.valid[row]]].all()
        assert result.valid[row] == result.layers[-1].kept[row]
        assert (result.valid[row] == 0) == (not mask[row].any())


def test_users_of_a_batch_do_not_touch_each_other():
    rng = np.random.default_rng(3)
    index = random_index(rng, 3, 200, codes=6)
    scorer, _ = fake_scorer(rng, index)
    users = random_users(rng, 5)
    mask = rng.random((5, 200)) < np.array([[1.0], [0.5], [0.02], [0.0], [0.3]])
    together = search(index, scorer, users, [2, 5], 20, RANK, MaskFilter(index, mask))
    for row in range(5):
        alone = search(
            index, scorer, one_user(users, row), [2, 5], 20, RANK, MaskFilter(index, mask[row : row + 1])
        )
        for name in ("item_ids", "positions", "rank_score", "probabilities", "valid"):
            np.testing.assert_array_equal(getattr(together, name)[row], getattr(alone, name)[0])
        for ours, theirs in zip(together.layers, alone.layers):
            assert ours.candidates[row] == theirs.candidates[0]
            assert ours.kept[row] == theirs.kept[0]
    assert len({tuple(ids) for ids in together.item_ids.tolist()}) == 5


def test_excluded_items_never_come_back_and_valid_counts_the_rest():
    rng = np.random.default_rng(4)
    index = random_index(rng, 3, 40)
    scorer, _ = fake_scorer(rng, index, step=50.0)
    mask = np.zeros((3, 40), dtype=bool)
    mask[0, [3, 17, 31]] = True
    mask[1] = True
    result = search(
        index, scorer, random_users(rng, 3), full_widths(index), 10, RANK, MaskFilter(index, mask)
    )
    assert result.valid.tolist() == [3, 10, 0]
    assert sorted(result.positions[0, :3]) == [3, 17, 31]
    assert np.isneginf(result.rank_score[0, 3:]).all()
    assert np.isneginf(result.rank_score[2]).all()
    assert np.isfinite(result.rank_score[1]).all()
    assert (result.item_ids[0, 3:] == 0).all()
    assert (result.probabilities[0, 3:] == 0).all()
    assert (result.probabilities[2] == 0).all()
    assert result.item_ids.dtype == np.int64
    assert result.valid.dtype == np.int32
    assert result.rank_score.dtype == np.float32
    assert result.probabilities.dtype == np.float32


def test_narrow_targeting_does_not_starve():
    """One eligible item in the corpus: found with beams of one node, whatever its node's score."""
    rng = np.random.default_rng(5)
    index = random_index(rng, 4, 100)
    scorer, _ = fake_scorer(rng, index)
    users = random_users(rng, 1)
    for position in range(0, 100, 7):
        mask = np.zeros((1, 100), dtype=bool)
        mask[0, position] = True
        result = search(index, scorer, users, [1, 1, 1], 5, RANK, MaskFilter(index, mask))
        assert result.valid.tolist() == [1]
        assert result.positions[0, 0] == position


def test_k_beyond_the_corpus_keeps_the_shape():
    rng = np.random.default_rng(6)
    index = random_index(rng, 2, 7)
    scorer, _ = fake_scorer(rng, index)
    result = search(index, scorer, random_users(rng, 2), [99], 20, RANK)
    assert result.item_ids.shape == (2, 20)
    assert result.probabilities.shape == (2, 20, 2)
    assert result.valid.tolist() == [7, 7]
    assert sorted(result.item_ids[0, :7]) == sorted(index.item_ids)


def test_nobody_has_a_candidate():
    rng = np.random.default_rng(7)
    index = random_index(rng, 3, 20)
    scorer, runner = fake_scorer(rng, index)
    nothing = np.zeros((2, 20), dtype=bool)
    result = search(index, scorer, random_users(rng, 2), [2, 2], 4, RANK, MaskFilter(index, nothing))
    assert result.valid.tolist() == [0, 0]
    assert result.item_ids.tolist() == [[0] * 4, [0] * 4]
    assert runner.calls == []


def test_trace_counts_candidates_and_kept():
    rng = np.random.default_rng(8)
    index = random_index(rng, 3, 100)
    scorer, _ = fake_scorer(rng, index)
    result = search(index, scorer, random_users(rng, 2), [2, 3], 4, RANK)
    first, second, last = result.layers
    assert first.candidates.tolist() == [index.nodes(1)] * 2
    assert first.kept.tolist() == [2, 2]
    for row in (0, 1):
        children = np.isin(index.parents(2), first.nodes[row])
        assert second.candidates[row] == children.sum()
        assert last.candidates[row] == np.isin(index.ancestors(2), second.nodes[row]).sum()
        assert np.isin(result.positions[row, : result.valid[row]], last.nodes[row]).all()
    assert result.total_microseconds >= result.user_microseconds >= 0


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_name_the_layer(layer, value):
    rng = np.random.default_rng(9)
    index = random_index(rng, 3, 30)
    scorer, runner = fake_scorer(rng, index)
    healthy = runner.score

    def broken(at, inputs):
        monn, logits = healthy(at, inputs)
        if at == layer:
            logits[0, 0, 1] = value
        return monn, logits

    runner.score = broken
    users = random_users(rng, 2)
    text = f"the scorer of layer {layer} gave scores that are not finite for 1 of "
    with pytest.raises(SearchError, match=text):
        search(index, scorer, users, full_widths(index), 3, RANK)
    with pytest.raises(SearchError, match=text):
        exhaustive(index, scorer, users, 3, RANK)


def test_a_broken_score_of_an_excluded_item_does_not_matter():
    rng = np.random.default_rng(10)
    index = random_index(rng, 1, 10)
    scorer, runner = fake_scorer(rng, index)
    healthy = runner.score

    def broken(at, inputs):
        monn, logits = healthy(at, inputs)
        logits[:, 4] = np.nan
        return monn, logits

    runner.score = broken
    mask = np.ones((1, 10), dtype=bool)
    mask[0, 4] = False
    result = search(index, scorer, random_users(rng, 1), [], 10, RANK, MaskFilter(index, mask))
    assert result.valid.tolist() == [9]
    assert 4 not in result.positions[0, :9]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"k": 0}, "k is 0, expected at least 1"),
        ({"widths": [2]}, "1 widths, expected 2: one for each layer above the items"),
        ({"widths": [2, 0]}, "the width of layer 2 is 0, expected at least 1"),
        ({"rank": np.array([])}, "rank exponents [], expected one finite number per task"),
        ({"rank": np.array([1.0, np.nan])}, "rank exponents [1.0, nan], expected one finite number per task"),
        (
            {"rank": np.array([1.0])},
            "the scorer of layer 1 gave monn of shape (2, 3, 2), expected (2, 3, 1): users, candidates",
        ),
    ],
)
def test_requests_that_cannot_be_answered(change, text):
    rng = np.random.default_rng(11)
    index = random_index(rng, 3, 30)
    scorer, _ = fake_scorer(rng, index)
    arguments = {"widths": [2, 2], "k": 3, "rank": RANK} | change
    with pytest.raises(SearchError) as caught:
        search(index, scorer, random_users(rng, 2), **arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (
            np.ones((1, 5), dtype=bool),
            "bool of shape (1, 5), expected bool of shape (users, 30): users, items",
        ),
        (np.ones((2, 30)), "item mask: float64 of shape (2, 30), expected bool"),
        (np.ones((1, 30), dtype=bool), "item mask of 1 users, asked for user 1"),
    ],
)
def test_masks_that_do_not_fit(mask, text):
    rng = np.random.default_rng(11)
    index = random_index(rng, 3, 30)
    scorer, _ = fake_scorer(rng, index)
    with pytest.raises(SearchError, match=re.escape(text)):
        search(index, scorer, random_users(rng, 2), [2, 2], 3, RANK, MaskFilter(index, mask))


def test_a_width_that_holds_too_few_items_is_widened_until_there_are_k():
    rng = np.random.default_rng(14)
    index = random_index(rng, 3, 60)
    scorer, _ = fake_scorer(rng, index)
    users = random_users(rng, 2)
    narrow = search(index, scorer, users, [1, 1], 50, RANK, adapt=False)
    assert (narrow.valid < 50).all()
    result = search(index, scorer, users, [1, 1], 50, RANK)
    assert result.valid.tolist() == [50, 50]
    assert search(index, scorer, users, [1, 1], 90, RANK).valid.tolist() == [60, 60]
    # Without need the widths are what was asked for.
    assert [trace.kept.tolist() for trace in search(index, scorer, users, [2, 3], 1, RANK).layers[:2]] == [
        [2, 2], [3, 3],
    ]  # fmt: skip


def test_a_filter_that_everything_passes_changes_nothing():
    rng = np.random.default_rng(15)
    index = random_index(rng, 3, 80)
    scorer, _ = fake_scorer(rng, index)
    users = random_users(rng, 2)
    everything = MaskFilter(index, np.ones((2, 80), dtype=bool))
    assert_same_result(
        search(index, scorer, users, [2, 3], 5, RANK),
        search(index, scorer, users, [2, 3], 5, RANK, everything),
    )


class FixedBids:
    """Bids by position; a node's is the largest under it."""

    def __init__(self, index, bids):
        self.index, self.bids = index, bids

    def log(self, layer, nodes):
        most = np.maximum.reduceat(self.bids, self.index.item_ptr(layer)[:-1])
        return np.log(most[nodes]).astype(np.float32)


def test_bids_order_items_and_nodes():
    rng = np.random.default_rng(16)
    index = random_index(rng, 3, 60)
    scorer, _ = fake_scorer(rng, index)
    users = random_users(rng, 3)
    bids = FixedBids(index, rng.lognormal(size=60).astype(np.float32))
    ours = search(index, scorer, users, full_widths(index), 12, RANK, bids=bids)
    assert_same_result(ours, exhaustive(index, scorer, users, 12, RANK, bids=bids))
    plain = exhaustive(index, scorer, users, 60, RANK)
    for row in range(3):
        worth = plain.rank_score[row] + np.log(bids.bids[plain.positions[row]])
        best_first = plain.item_ids[row][np.argsort(-worth, kind="stable")]
        assert ours.item_ids[row].tolist() == best_first[:12].tolist()
    # A beam of one node follows the bids: the item that is worth most by far is found.
    bids.bids[17] = 1e6
    assert (search(index, scorer, users, [1, 1], 1, RANK, bids=bids).positions[:, 0] == 17).all()


def test_a_batch_of_no_users():
    rng = np.random.default_rng(13)
    index = random_index(rng, 2, 5)
    scorer, _ = fake_scorer(rng, index)
    with pytest.raises(SearchError, match="no users, expected at least one row of user features"):
        search(index, scorer, random_users(rng, 0), [2], 3, RANK)


def test_deadline_is_asked_before_the_user_tower_and_every_layer():
    rng = np.random.default_rng(12)
    index = random_index(rng, 3, 30)
    scorer, runner = fake_scorer(rng, index)
    users = random_users(rng, 1)
    asked = []
    search(index, scorer, users, [2, 2], 3, RANK, deadline=lambda: asked.append(len(runner.calls)))
    assert asked == [0, 0, 1, 2]

    runner.calls.clear()

    def late() -> None:
        if runner.calls:
            raise DeadlineExceeded("too late")

    with pytest.raises(DeadlineExceeded, match="too late"):
        search(index, scorer, users, [2, 2], 3, RANK, deadline=late)
    assert [layer for layer, _ in runner.calls] == [1]


def test_rank_scores_by_hand():
    logits = np.array([[0.0, 2.0], [-1.0, 500.0], [-500.0, 0.0], [200.0, 0.0]], dtype=np.float32)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    with np.errstate(divide="ignore"):
        expected = np.log(probabilities[:, 0]) + 0.5 * np.log(probabilities[:, 1])
    expected[2] = -500.0 + 0.5 * np.log(0.5)
    ours = rank_scores(logits, RANK)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    # A task of rank 0 does not count, however extreme.
    np.testing.assert_array_equal(
        rank_scores(logits, np.array([0.0, 1.0])), rank_scores(logits[:, 1:], np.array([1.0]))
    )
    assert sigmoid(logits).dtype == np.float32
    np.testing.assert_allclose(sigmoid(logits), probabilities, rtol=1e-6, atol=1e-30)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 1.0]), min_size=6, max_size=6), min_size=1, max_size=3
    ),
    width=st.integers(1, 8),
)
def test_best_breaks_ties_by_the_smaller_column(rows, width):
    keys = np.array(rows, dtype=np.float32)
    expected = np.zeros(keys.shape, dtype=bool)
    for row, values in enumerate(rows):
        columns = [column for column in np.argsort(-keys[row], kind="stable") if values[column] > -np.inf]
        expected[row, columns[:width]] = True
    np.testing.assert_array_equal(best(keys, width), expected)


@given(
    st.lists(
        st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, -np.inf, np.inf, 1e-45, -1e-45]),
        max_size=40,
    )
)
def test_falling_is_the_stable_order_of_the_largest_first(values):
    keys = np.array(values, dtype=np.float32)
    np.testing.assert_array_equal(falling(keys), np.argsort(-keys, kind="stable"))
