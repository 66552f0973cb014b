from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from core_fakes import SMALL_SCHEMA, small_world
from hypothesis import given, settings
from hypothesis import strategies as st
from live_fakes import COUNTRIES, Catalogue, SmoothRunner, with_eligibility

from hsnn_core import live_attributes
from hsnn_core.eligibility import Context
from hsnn_core.errors import DataError
from hsnn_core.exhaustive import exhaustive
from hsnn_core.item_filter import MaskFilter
from hsnn_core.live_attributes import GrowingAttributes
from hsnn_core.live_index import LiveIndex
from hsnn_core.schema import ID_FIRST, KEY_MISSING
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import search
from hsnn_core.targeting import TargetingFilter

RANK = np.array([1.0, 0.5], dtype=np.float32)
NOTHING = np.empty(0, dtype=np.int64)


class Live:
    """A live index beside the catalogue that it should show."""

    def __init__(self, layers=3, items=30, interactions=True, eligibility=False, embeddings="float32"):
        # One more, via lists: what a new item leads to counts as soon as it is there.
        led = {"led": {"user": "history", "via": "category", "item": "category"}}
        self.world = small_world(layers=layers, items=items, interactions=led if interactions else False)
        self.world.runner = SmoothRunner(layers)
        if eligibility:
            with_eligibility(self.world)
        self.catalogue = Catalogue(self.world, embeddings)
        self.start(self.catalogue.corpus(records=True))

    def start(self, corpus):
        self.index = LiveIndex(self.world.schema, self.world.transform, corpus, self.world.runner.item_tower)
        self.scorer = LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, self.world.runner)

    def change(self, rng, upserts, deletes):
        for item in deletes:
            self.catalogue.raw.pop(item, None)
        for item in upserts:
            self.catalogue.draw(rng, item)
        before = self.index.state
        state = self.index.apply(
            np.array(upserts, dtype=np.int64),
            self.catalogue.encoded(upserts),
            self.catalogue.attributes(upserts),
            np.array(deletes, dtype=np.int64),
            before.log_position + 1,
        )
        assert state is self.index.state
        assert state.log_position == before.log_position + 1

    def search(self, widths, k, state=None):
        state = self.index.state if state is None else state
        self.scorer = self.scorer.over(state.view, state.i2if, state.embeddings)
        users = self.world.transform.encode_users(self.world.user_raw)
        return search(state.view, self.scorer, users, widths, k, RANK)


def assert_same_answer(ours, theirs):
    """Equal but for positions and node numbers, which depend on the order in which items came, and with them which of
    two equal scores stands first."""
    np.testing.assert_array_equal(ours.valid, theirs.valid)
    np.testing.assert_array_equal(ours.rank_score, theirs.rank_score)
    for user, count in enumerate(ours.valid):
        sure = ours.rank_score[user, :count] > ours.rank_score[user, count - 1] if count else []
        mine, other = (
            sorted(zip(found.rank_score[user, :count][sure], found.item_ids[user, :count][sure]))
            for found in (ours, theirs)
        )
        assert mine == other
    for mine, other in zip(ours.layers, theirs.layers):
        np.testing.assert_array_equal(mine.candidates, other.candidates)
        np.testing.assert_array_equal(mine.kept, other.kept)


def fresh_answer(live, widths, k):
    corpus = live.catalogue.corpus()
    scorer = LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, live.world.runner)
    users = live.world.transform.encode_users(live.world.user_raw)
    return search(corpus.index, scorer, users, widths, k, RANK)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 4),
    interactions=st.booleans(),
    steps=st.integers(1, 8),
    items=st.sampled_from([3, 30]),
    churn=st.sampled_from([1, 4, 25]),
    embeddings=st.sampled_from(["float32", "float16"]),
)
def test_search_equals_that_of_an_index_built_anew(
    seed, layers, interactions, steps, items, churn, embeddings
):
    """Random histories of upserts (of new items and of known ones), deletes and compactions."""
    rng = np.random.default_rng(seed)
    live = Live(layers, items, interactions, embeddings=embeddings)
    base = live.world.item_keys.tolist()
    never_known = list(range(10_000, 10_020))
    for _ in range(steps):
        pool = rng.permutation([*base, *never_known])
        cut = int(rng.integers(0, churn + 1))
        upserts, deletes = pool[:cut].tolist(), pool[cut : cut + int(rng.integers(0, churn + 1))].tolist()
        if set(live.catalogue.raw) - set(deletes) or upserts:
            live.change(rng, upserts, deletes)
        if rng.random() < 0.2:
            live.start(live.index.compact())
        widths = rng.integers(1, 5, size=layers - 1).tolist()
        k = int(rng.integers(1, 40))
        assert_same_answer(live.search(widths, k), fresh_answer(live, widths, k))
        assert live.index.state.view.live_items == len(live.catalogue.raw)


def test_full_width_equals_exhaustive():
    rng = np.random.default_rng(1)
    live = Live()
    live.change(rng, [10_000, 10_001, int(live.world.item_keys[0])], live.world.item_keys[3:9].tolist())
    view = live.index.state.view
    widths = [view.nodes(layer) for layer in (1, 2)]
    ours = live.search(widths, 40)
    users = live.world.transform.encode_users(live.world.user_raw)
    theirs = exhaustive(view, live.scorer, users, 40, RANK)
    for name in ("item_ids", "rank_score", "valid", "positions"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize(
    ("layers", "embeddings"), [(1, "float32"), (2, "float16"), (3, "float32"), (3, "float16")]
)
def test_compaction_is_the_build_of_the_live_items(layers, embeddings):
    rng = np.random.default_rng(2)
    live = Live(layers, embeddings=embeddings)
    for _ in range(4):
        pool = rng.permutation([*live.world.item_keys.tolist(), *range(10_000, 10_010)])
        live.change(rng, pool[:6].tolist(), pool[6:11].tolist())
    ours, theirs = live.index.compact(), live.catalogue.corpus(records=True)
    arrays = [
        {
            **corpus.index.to_arrays(),
            **corpus.i2if.to_arrays(),
            **corpus.records.to_arrays(),
            **{f"embedding{layer}": table for layer, table in enumerate(corpus.embeddings)},
        }
        for corpus in (ours, theirs)
    ]
    for name, array in arrays[1].items():
        np.testing.assert_array_equal(arrays[0][name], array, err_msg=name)
        assert arrays[0][name].dtype == array.dtype


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 3),
    steps=st.integers(0, 5),
    items=st.sampled_from([3, 30, 80]),
    chunk=st.sampled_from([8, 4096]),
    by_bid=st.booleans(),
)
def test_targeting_equals_a_mask_over_an_index_built_anew(seed, layers, steps, items, chunk, by_bid):
    """Whatever was upserted and deleted: items that do not match are never returned, the others as by a plain mask."""
    rng = np.random.default_rng(seed)
    live = Live(layers, items, eligibility=True)
    pool = [*live.world.item_keys.tolist(), *range(10_000, 10_015)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_attributes, "CHUNK", chunk)
        for _ in range(steps):
            order = rng.permutation(pool)
            live.change(rng, order[:9].tolist(), order[9 : 9 + int(rng.integers(0, 8))].tolist())
            if rng.random() < 0.2:
                live.start(live.index.compact())
    users = live.world.transform.encode_users(live.world.user_raw)
    state = live.index.state
    asked = [
        {
            "countries": [str(c) for c in rng.choice(COUNTRIES, size=rng.integers(0, 3), replace=False)],
            "at": float(rng.integers(-10, 150)),
            "excluded": rng.integers(0, 5, size=rng.integers(0, 3)).tolist(),
            "items": rng.choice(pool, size=rng.integers(0, 6)).tolist(),
        }
        for _ in range(4)
    ]
    context = Context.from_rows(
        live.world.schema,
        [{"country": one["countries"], "running": one["at"]} for one in asked],
        now=0.0,
        excluded=[{"advertiser": one["excluded"]} for one in asked],
    )
    excluded = [state.view.find(np.array(one["items"], dtype=np.int64)) for one in asked]
    targeting = TargetingFilter(state.view, 4, state.attributes, context, excluded)
    corpus = live.catalogue.corpus()
    mask = np.array(
        [
            [
                live.catalogue.matches(int(item), one["countries"], one["at"], one["excluded"])
                and int(item) not in one["items"]
                for item in corpus.index.item_ids
            ]
            for one in asked
        ]
    )
    fresh = GrowingAttributes(corpus.index, corpus.attributes).state
    widths = rng.integers(1, 4, size=layers - 1).tolist()
    k = int(rng.integers(1, 12))
    bids = (state.attributes.bids, fresh.bids) if by_bid else (None, None)
    scorer = live.scorer.over(state.view, state.i2if, state.embeddings)
    ours = search(state.view, scorer, users, widths, k, RANK, targeting, bids[0])
    plain = LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, live.world.runner)
    theirs = search(corpus.index, plain, users, widths, k, RANK, MaskFilter(corpus.index, mask), bids[1])
    assert_same_answer(ours, theirs)
    assert ours.valid.tolist() == np.minimum(mask.sum(axis=1), k).tolist()
    assert targeting.eligible().tolist() == mask.sum(axis=1).tolist()
    full = [state.view.nodes(layer) for layer in range(1, layers)]
    ours = search(state.view, scorer, users, full, k, RANK, targeting, bids[0])
    twin = exhaustive(state.view, scorer, users, k, RANK, targeting, bids[0])
    np.testing.assert_array_equal(ours.item_ids, twin.item_ids)


def test_a_search_that_runs_sees_one_moment():
    """A state that a search holds stays what it was, whatever is changed meanwhile."""
    rng = np.random.default_rng(3)
    live = Live()
    live.change(rng, [10_000, 10_001], live.world.item_keys[:5].tolist())
    held = live.index.state
    before = live.search([2, 3], 40, held)
    for step in range(5):
        keys = live.world.item_keys
        live.change(rng, [10_001, 10_002 + step, *keys[:8].tolist()], [10_000, *keys[8 + step :].tolist()])
    after = live.search([2, 3], 40, held)
    np.testing.assert_array_equal(before.item_ids, after.item_ids)
    np.testing.assert_array_equal(before.rank_score, after.rank_score)
    assert not np.array_equal(live.search([2, 3], 40).item_ids, before.item_ids)


def test_a_deleted_representative_is_followed_by_the_next_nearest_live_item():
    rng = np.random.default_rng(4)
    live = Live()
    corpus = live.world.corpus(records=True)
    index, records = corpus.index, corpus.records
    node = int(np.argmax(index.occupancy(1)))
    members = np.flatnonzero(index.ancestors(1) == node)
    by_distance = members[np.lexsort((index.item_ids[members], records.distances[members, 0]))]
    for gone, follows in pairwise(by_distance):
        live.change(rng, [], [int(index.item_ids[gone])])
        assert live.index.state.view.representative[0][node] == follows
        row = index.row_of_position[follows]
        features = live.world.transform.encode_items(live.world.item_raw)
        tower = live.world.runner.item_tower(features.tensors("item"))["item_l1"][row]
        weight, bias = live.world.projection[0]
        expected = tower + live.world.codebooks[0][index.codes[0][node, 0]] @ weight + bias
        got = live.index.state.embeddings[0].take(np.array([node]))[0]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    live.change(rng, [], [int(index.item_ids[by_distance[-1]])])
    assert live.index.state.view.live[0][node] == 0
    assert not live.index.state.view.present(1, np.array([node]))[0]


def test_a_delete_of_an_item_that_is_not_there_changes_nothing():
    rng = np.random.default_rng(5)
    live = Live()
    before = live.search([2, 3], 30)
    live.change(rng, [], [987_654])
    live.change(rng, [], [])
    assert_same_answer(live.search([2, 3], 30), before)


def test_everything_may_be_deleted_and_come_back():
    rng = np.random.default_rng(6)
    live = Live()
    live.change(rng, [], live.world.item_keys.tolist())
    assert live.search([2, 3], 5).valid.tolist() == [0] * 4
    with pytest.raises(DataError, match="no item is live, expected at least one to make a snapshot of"):
        live.index.compact()
    live.change(rng, live.world.item_keys[:7].tolist(), [])
    assert_same_answer(live.search([2, 3], 9), fresh_answer(live, [2, 3], 9))


def test_what_cannot_be_used_is_refused_and_changes_nothing():
    rng = np.random.default_rng(7)
    live = Live()
    before = live.index.state
    live.catalogue.draw(rng, 5)
    twice = live.catalogue.encoded([5, 5])
    with pytest.raises(DataError, match="2 upserts and 1 deletes name an item twice"):
        live.index.apply(np.array([5, 5]), twice, None, np.array([7]), 1)
    tower = live.world.runner.item_tower
    live.index._tower = lambda inputs: {name: value * np.nan for name, value in tower(inputs).items()}
    with pytest.raises(DataError, match="is not finite for the item of row 0"):
        live.index.apply(np.array([5]), live.catalogue.encoded([5]), None, NOTHING, 1)
    assert live.index.state is before


def test_what_half_precision_cannot_hold_is_refused():
    live = Live(embeddings="float16")
    tower = live.world.runner.item_tower
    live.index._tower = lambda inputs: {name: value * 1e5 for name, value in tower(inputs).items()}
    live.catalogue.draw(np.random.default_rng(8), 5)
    with pytest.raises(DataError, match=r"tower's item_l1: got values up to .*, float16 holds at most 65504"):
        live.index.apply(np.array([5]), live.catalogue.encoded([5]), None, NOTHING, 1)
    # Its own embedding fits, that of a node that it might represent does not.
    live.index._tower = tower
    weight, bias = live.index._projection[1]
    live.index._projection[1] = (weight, bias + 1e5)
    with pytest.raises(DataError, match="tower's item_l2: got values up to 1e"):
        live.index.apply(np.array([5]), live.catalogue.encoded([5]), None, NOTHING, 1)
    assert live.index.usable


def test_a_corpus_that_cannot_change_says_why():
    world = small_world()
    with pytest.raises(DataError, match="has no item records, so its items cannot change; export it with"):
        LiveIndex(world.schema, world.transform, world.corpus(), world.runner.item_tower)
    paths = np.zeros((30, 2), dtype=np.int32)
    given_paths = world.corpus(codebooks=[], codeword_projection=[], paths=paths, records=True)
    with pytest.raises(DataError, match=re.escape("came with the data, so a new item's nodes are not known")):
        LiveIndex(world.schema, world.transform, given_paths, world.runner.item_tower)
    assert replace(given_paths, records=None).records is None


def test_an_upsert_keeps_the_list_that_training_derived():
    own = SMALL_SCHEMA["features"]
    derived = {"kind": "sparse", "of": "item", "max": 2, "from": "click"}
    world = small_world(
        interactions={"led": {"user": "history", "via": "next", "item": "item", "nodes": "members"}},
        features=own | {"item": own["item"] | {"next": derived}},
    )
    keys = world.item_keys
    first, second, new = int(keys[4]), int(keys[9]), int(keys.max()) + 1
    world.item_raw["next"] = np.full((len(keys), 2), KEY_MISSING)
    world.item_raw["next"][4] = [keys[20], keys[21]]
    index = LiveIndex(world.schema, world.transform, world.corpus(records=True), world.runner.item_tower)

    def lists(state, item):
        (position,) = state.view.find(np.array([item]))
        named = state.i2if.forward["next"].take(np.array([position]))[0]
        return [int(keys[id_ - ID_FIRST]) for id_ in named if id_]

    def upsert(items, **given):
        raw = {
            "item": np.array(items)[:, None],
            "category": np.full((len(items), 3), KEY_MISSING),
            "price": np.ones((len(items), 1), np.float32),
        }
        encoded = world.transform.encode_items(raw | given)
        return index.apply(np.array(items), encoded, None, np.empty(0, np.int64), 1)

    state = upsert([new, first, second])
    assert lists(state, first) == [keys[20], keys[21]]
    assert lists(state, second) == lists(state, new) == []
    assert lists(upsert([first], next=np.array([[keys[7], KEY_MISSING]])), first) == [keys[7]]
    assert lists(upsert([first]), first) == [keys[7]]
    users = world.transform.encode_users({"history": np.array([[first] + [KEY_MISSING] * 5])})
    assert index.state.i2if.query(users.ids).terms[-1].terms.tolist() == [[7 + ID_FIRST]]
    compact = index.compact()
    (place,) = np.flatnonzero(compact.index.item_ids == first)
    assert compact.i2if.forward["next"].base[place].tolist() == [7 + ID_FIRST, 0]
