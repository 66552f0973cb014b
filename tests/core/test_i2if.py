from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from core_schemas import ads
from hypothesis import given, settings
from hypothesis import strategies as st

from hsnn_core import i2if as i2if_module
from hsnn_core.errors import FeatureError, FormatError
from hsnn_core.features import FeatureTransform
from hsnn_core.i2if import I2IF, Crossings
from hsnn_core.schema import KEY_MISSING, Schema

X = KEY_MISSING


def world(items: np.ndarray, categories: np.ndarray) -> tuple[Schema, FeatureTransform, I2IF]:
    """The example's schema over items with keys (V,) and categories (V, 4); position = row."""
    declared = ads()
    declared["interactions"]["seen"]["fade"] = 0.8
    schema = Schema.from_dict(declared)
    raw = {"item": items[:, None], "category": categories}
    transform = FeatureTransform.fit(schema, {"age": np.zeros((1, 1), np.float32)}, raw, items)
    position_of_id = np.full(transform.cardinality("item"), -1, np.int32)
    position_of_id[2:] = np.arange(len(items))
    return schema, transform, I2IF.build(schema, transform, transform.encode_items(raw), position_of_id)


def test_by_hand():
    items = np.array([10, 20, 30])
    categories = np.array([[1, 2, X, X], [2, 3, 4, X], [X, X, X, X]])
    _, transform, i2if = world(items, categories)
    users = transform.encode_users(
        {
            "likes": np.array([[4, 2], [X, X]]),
            # 20 twice, and 77, which no one knows; the second user has no history.
            "history": np.array([[20, 10, 77, 20, X], [X, X, X, X, X]]),
        }
    )
    query = i2if.query(users.ids)
    topics, seen, likes = query.terms
    # Through items: 20 counts twice, so categories 2 (ids +2), 3 and 4 twice, and 10 adds 1 and 2.
    assert topics.terms.tolist() == [[3, 4, 5, 6], [0, 0, 0, 0]]
    assert topics.weights.tolist() == [[1, 3, 2, 2], [0, 0, 0, 0]]
    assert topics.totals.tolist() == [8, 0]
    # The history's ages are 3, 2, 1, 0, their weights 131, 164, 205, 256: item 20 has the first and the last.
    assert seen.terms.tolist() == [[2, 3], [0, 0]]
    assert seen.weights.tolist() == [[164, 387], [0, 0]]
    assert likes.terms.tolist() == [[4, 6], [0, 0]]

    assert (i2if.dense_width, i2if.ids_width) == (9, 7)
    assert [(slot.interaction.name, slot.start, slot.stop) for slot in i2if.id_slots] == [
        ("topics", 0, 4),
        ("seen", 4, 5),
        ("likes", 5, 7),
    ]
    found = i2if.probe(query, np.array([[0, 1, 2], [0, 1, 2]]))
    f = np.float32
    assert found.dense.tolist() == [
        [
            # topics: matched, share of weight, share of terms | seen | likes
            [2, f(4 / 8), 1, 1, f(164 / 551), 1, 1, f(1 / 2), f(1 / 2)],
            [3, f(7 / 8), 1, 1, f(387 / 551), 1, 2, 1, f(2 / 3)],
            [0, 0, 0, 0, 0, 0, 0, 0, 0],
        ],
        [[0] * 9] * 3,
    ]
    assert found.ids.tolist() == [
        [[3, 4, 0, 0, 2, 4, 0], [4, 5, 6, 0, 3, 4, 6], [0] * 7],
        [[0] * 7] * 3,
    ]
    assert found.dense.dtype == np.float32
    assert found.ids.dtype == np.int32
    equal(i2if.walk(query, i2if.postings(np.arange(3))), found)


def equal(ours: Crossings, theirs: Crossings) -> None:
    np.testing.assert_array_equal(ours.dense.view(np.int32), theirs.dense.view(np.int32))  # the very bits
    np.testing.assert_array_equal(ours.ids, theirs.ids)


def slow_crossings(i2if: I2IF, user_ids: np.ndarray, positions: np.ndarray) -> Crossings:
    """Straight from the definition, one <user, item> pair at a time."""
    dense = np.zeros((*positions.shape, i2if.dense_width), np.float32)
    ids = np.zeros((*positions.shape, i2if.ids_width), np.int32)
    for number, (spec, slot) in enumerate(zip(i2if.specs, i2if.id_slots)):
        lists = i2if.forward[spec.interaction.item].base
        for user, row in enumerate(user_ids[:, spec.user].tolist()):
            row = [value for value in row if value > 0]
            fade = spec.interaction.fade
            weights = [1 if fade == 1 else max(1, round(256 * fade**age)) for age in range(len(row))][::-1]
            known = [(value, weight) for value, weight in zip(row, weights) if value > 1]
            if spec.interaction.through:
                held = [(i2if.position_of_id.positions()[value], weight) for value, weight in known]
                known = [(int(term), w) for at, w in held if at >= 0 for term in lists[at] if term > 0]
            total = sum(weight for _, weight in known)
            for column, position in enumerate(positions[user]):
                terms = [int(term) for term in lists[position] if term > 0]
                hits = [term for term in terms if term in dict(known)]
                dense[user, column, 3 * number : 3 * number + 3] = [
                    len(hits),
                    sum(weight for term, weight in known if term in hits) / max(total, 1),
                    len(hits) / max(len(terms), 1),
                ]
                capped = hits[: spec.interaction.matches]
                ids[user, column, slot.start : slot.start + len(capped)] = capped
    return Crossings(dense, ids)


def random_world(rng: np.random.Generator, rows: int) -> tuple[I2IF, np.ndarray]:
    items = rng.choice(100, size=rows, replace=False).astype(np.int64)
    categories = rng.integers(0, 12, size=(rows, 4))
    categories[rng.random(categories.shape) < 0.3] = X
    _, transform, i2if = world(items, categories)
    batch = int(rng.integers(1, 6))
    history = rng.choice(np.append(items, [500, X]), size=(batch, 5))
    likes = rng.choice(np.append(np.arange(12), X), size=(batch, 2))
    return i2if, transform.encode_users({"history": history, "likes": likes}).ids


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 15), nodes=st.integers(1, 20), few=st.booleans())
def test_both_plans_equal_the_slow_twin(seed, rows, nodes, few):
    rng = np.random.default_rng(seed)
    i2if, user_ids = random_world(rng, rows)
    query = i2if.query(user_ids)
    reps = rng.integers(0, rows, size=nodes)
    everyone = np.tile(reps, (len(user_ids), 1))
    with pytest.MonkeyPatch.context() as patch:
        if few:
            patch.setattr(i2if_module, "TABLE_ENTRIES", 1)  # one user per pass
        probed = i2if.probe(query, everyone)
        own = rng.integers(0, rows, size=(len(user_ids), nodes))
        equal(i2if.probe(query, own), slow_crossings(i2if, user_ids, own))
    equal(probed, slow_crossings(i2if, user_ids, everyone))
    equal(i2if.walk(query, i2if.postings(reps)), probed)


def test_members_of_a_node_weigh_together_as_its_representative():
    items = np.array([10, 20, 30, 40])
    declared = ads()
    declared["interactions"] = {"seen": {"user": "history", "item": "item", "nodes": "members"}}
    schema = Schema.from_dict(declared)
    raw = {"item": items[:, None], "category": np.full((4, 4), X)}
    transform = FeatureTransform.fit(schema, {"age": np.zeros((1, 1), np.float32)}, raw, items)
    i2if = I2IF.build(
        schema, transform, transform.encode_items(raw), np.array([-1, -1, 0, 1, 2, -1], np.int32)
    )
    users = transform.encode_users({"history": np.array([[20, 10, 30, 20, 40], [40, X, X, X, X]])})
    # items 10 and 20 lie in one node, which 10 represents; 30 is alone; 40 has left
    of_nodes = i2if.query_of_nodes(i2if.query(users.ids), np.array([0, 0, 2]).__getitem__)
    assert of_nodes.terms[0].terms.tolist() == [[2, 4], [0, 0]]
    assert of_nodes.terms[0].weights.tolist() == [[3, 1], [0, 0]]
    found = i2if.probe(of_nodes, np.array([[0, 2], [0, 2]]))
    np.testing.assert_array_equal(found.dense[0], np.array([[1, 3 / 4, 1], [1, 1 / 4, 1]], np.float32))
    assert not found.dense[1].any()
    assert found.ids.tolist() == [[[2], [4]], [[0], [0]]]
    equal(i2if.walk(of_nodes, i2if.postings(np.array([0, 2]))), found)
    # an item weighs what it did
    assert i2if.query(users.ids).terms[0].weights.tolist() == [[1, 2, 1, 1], [1, 0, 0, 0]]


def listed_world(lists: np.ndarray, **entry) -> tuple[FeatureTransform, I2IF]:
    """Items 10, 20, ... whose feature `next` lists items; interaction `led` goes via it."""
    items = 10 * np.arange(1, len(lists) + 1)
    declared = ads()
    declared["features"]["item"]["next"] = {"kind": "sparse", "of": "item", "max": lists.shape[1]}
    declared["interactions"] = {"led": {"user": "history", "via": "next", "item": "item", **entry}}
    schema = Schema.from_dict(declared)
    raw = {"item": items[:, None], "category": np.full((len(items), 4), X), "next": lists}
    transform = FeatureTransform.fit(schema, {"age": np.zeros((1, 1), np.float32)}, raw, items)
    position_of_id = np.full(transform.cardinality("item"), -1, np.int32)
    position_of_id[2:] = np.arange(len(items))
    return transform, I2IF.build(schema, transform, transform.encode_items(raw), position_of_id)


NEXT = np.array([[20, 30, 40], [40, 10, X], [X, X, X], [10, X, X]])


def test_via_lists_by_hand():
    transform, i2if = listed_world(NEXT, fade=0.5)
    # 10 is the older one: its list counts half. 30 leads nowhere, and nobody knows 77.
    users = transform.encode_users({"history": np.array([[77, 10, 20, X, X], [30, X, X, X, X]])})
    query = i2if.query(users.ids)
    assert query.terms[0].terms.tolist() == [[2, 3, 4, 5], [0, 0, 0, 0]]
    second, third = 4096 / 2**0.5, 4096 / 3**0.5
    weights = [round(second), 2048, round(second / 2), 4096 + round(third / 2)]
    assert query.terms[0].weights.tolist() == [weights, [0, 0, 0, 0]]
    found = i2if.probe(query, np.array([[0, 1, 2, 3], [0, 1, 2, 3]]))
    expected = [[np.log1p(w / 4096), w / sum(weights), 1] for w in weights]
    np.testing.assert_array_equal(found.dense[0], np.array(expected).astype(np.float32))
    assert found.ids[0].tolist() == [[2], [3], [4], [5]]  # what matched is the candidate itself
    assert not found.dense[1].any() and not found.ids[1].any()
    equal(i2if.walk(query, i2if.postings(np.arange(4))), found)


def test_via_lists_members_of_a_node_weigh_together():
    transform, i2if = listed_world(NEXT, nodes="members")
    users = transform.encode_users({"history": np.array([[10, 20, X, X, X]])})
    query = i2if.query(users.ids)
    one, two, three, four = query.terms[0].weights[0].tolist()
    # 10 and 40 lie in one node, which 10 represents, 20 and 30 in another, which 30 represents
    of_nodes = i2if.query_of_nodes(query, np.array([0, 2, 2, 0]).__getitem__)
    assert of_nodes.terms[0].terms.tolist() == [[2, 4]]
    assert of_nodes.terms[0].weights.tolist() == [[one + four, two + three]]
    assert of_nodes.terms[0].totals == query.terms[0].totals
    found = i2if.probe(of_nodes, np.array([[0, 2]]))
    assert found.dense[0, :, 0].tolist() == [
        np.float32(np.log1p(w / 4096)) for w in (one + four, two + three)
    ]
    equal(i2if.walk(of_nodes, i2if.postings(np.array([0, 2]))), found)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 12), fade=st.sampled_from([1.0, 0.8, 0.01]))
def test_via_lists_both_plans_equal_the_slow_twin(seed, rows, fade):
    rng = np.random.default_rng(seed)
    keys = np.append(10 * np.arange(1, rows + 1), [X, 77])
    transform, i2if = listed_world(rng.choice(keys, size=(rows, 4)), fade=fade)
    users = transform.encode_users({"history": rng.choice(keys, size=(3, 5))})
    positions = rng.integers(0, rows, size=(3, 9))
    query = i2if.query(users.ids)
    lists = i2if.forward["next"].base
    for user, row in enumerate(users.ids[:, i2if.specs[0].user].tolist()):
        row = [value for value in row if value > 0]
        held: dict[int, int] = {}
        for age, value in enumerate(reversed(row)):
            for place, term in enumerate(lists[value - 2] if value > 1 else []):
                if term:
                    weight = max(1, round(4096 * fade**age / (place + 1) ** 0.5))
                    held[int(term)] = held.get(int(term), 0) + weight
        here = query.terms[0].terms[user]
        assert {int(t): int(w) for t, w in zip(here, query.terms[0].weights[user]) if t} == held
    probed = i2if.probe(query, np.tile(positions[0], (3, 1)))
    equal(i2if.walk(query, i2if.postings(positions[0])), probed)


def test_lists_are_kept_in_the_file_and_not_looked_up_per_candidate():
    transform, i2if = listed_world(NEXT)
    arrays = i2if.to_arrays()
    assert sorted(arrays) == ["i2if.led", "i2if.led.via", "i2if.position_of_id"]
    assert arrays["i2if.led.via"].tolist() == [[3, 4, 5], [5, 2, 0], [0, 0, 0], [2, 0, 0]]
    again = I2IF.from_arrays(transform.schema, transform, arrays)
    users = transform.encode_users({"history": np.array([[10, 20, X, X, X]])}).ids
    positions = np.array([[0, 1, 2, 3]])
    equal(again.probe(again.query(users), positions), i2if.probe(i2if.query(users), positions))
    with pytest.raises(FormatError, match=r"i2if: array i2if.led.via is missing; got i2if.led"):
        I2IF.from_arrays(transform.schema, transform, {n: a for n, a in arrays.items() if "via" not in n})
    i2if.forward["next"].take = None  # neither plan may read the lists of candidates
    query = again.query(users)
    i2if.probe(query, positions)
    i2if.walk(query, i2if.postings(np.arange(4)))


def test_an_item_that_left_the_corpus_leads_nowhere_and_is_led_to_no_more():
    transform, i2if = listed_world(NEXT)
    position_of_id = i2if.position_of_id.positions().copy()
    position_of_id[2] = -1  # 10 has left; its list has too
    gone = I2IF.from_arrays(
        transform.schema, transform, i2if.to_arrays() | {"i2if.position_of_id": position_of_id}
    )
    users = transform.encode_users({"history": np.array([[10, 20, X, X, X]])}).ids
    assert gone.query(users).terms[0].terms.tolist() == [[2, 5]]  # what 20 leads to, 10 among them
    of_nodes = gone.query_of_nodes(gone.query(users), np.array([0, 1, 2, 3]).__getitem__)
    assert of_nodes.terms[0].terms.tolist() == [[2, 5]]  # not crossed by members: as it was


def test_interactions_that_read_one_history_equal_the_slow_twin():
    """Two go through the history's items, one of them fading; one crosses it as it is."""
    rng = np.random.default_rng(6)
    declared = ads()
    declared["interactions"]["shelves"] = {"user": "history", "item": "shelf", "fade": 0.5}
    schema, items = Schema.from_dict(declared), np.arange(10, 40)
    categories = rng.integers(0, 9, size=(30, 4))
    categories[rng.random(categories.shape) < 0.3] = X
    raw = {"item": items[:, None], "category": categories, "shelf": rng.integers(0, 7, size=(30, 1))}
    transform = FeatureTransform.fit(schema, {"age": np.zeros((1, 1), np.float32)}, raw, items)
    position_of_id = np.full(transform.cardinality("item"), -1, np.int32)
    position_of_id[2:-3] = np.arange(27)  # three are not in the corpus
    encoded = transform.encode_items({name: value[:27] for name, value in raw.items()})
    i2if = I2IF.build(schema, transform, encoded, position_of_id)
    history = rng.choice(np.append(items, [500, X]), size=(20, 5))
    users = transform.encode_users({"history": history, "likes": rng.integers(0, 9, size=(20, 2))}).ids
    positions = rng.integers(0, 27, size=(20, 15))
    equal(i2if.probe(i2if.query(users), positions), slow_crossings(i2if, users, positions))


def test_item_that_left_the_corpus_gives_no_terms():
    schema, transform, i2if = world(np.array([10, 20]), np.array([[1, 2, X, X], [3, X, X, X]]))
    position_of_id = i2if.position_of_id.positions().copy()
    position_of_id[2] = -1
    gone = I2IF.from_arrays(schema, transform, i2if.to_arrays() | {"i2if.position_of_id": position_of_id})
    users = transform.encode_users({"history": np.array([[10, 20, X, X, X]])})
    assert gone.query(users.ids).terms[0].terms.tolist() == [[5]]


def test_terms_of_an_item_are_unique_and_known():
    """A sequence may repeat ids; a term counts once per item, and unknown is no term."""
    raw = ads()
    raw["features"]["item"]["category"] = {"kind": "sequence", "vocab": 5, "length": 4}
    schema = Schema.from_dict(raw)
    items, table = np.array([1, 2]), {"category": np.array([[7, 8, 7, 9], [X, X, X, X]])}
    transform = FeatureTransform.fit(schema, {"age": np.zeros((1, 1), np.float32)}, table, items)
    encoded = transform.encode_items({"category": np.array([[8, 66, 8, 7], [X, X, X, X]])})
    i2if = I2IF.build(schema, transform, encoded, np.array([-1, -1, 0, 1], np.int32))
    assert i2if.forward["category"].base.tolist() == [[3, 2, 0, 0], [0, 0, 0, 0]]


def test_threads_share_one_i2if():
    rng = np.random.default_rng(0)
    i2if, user_ids = random_world(rng, 15)
    positions = rng.integers(0, 15, size=(len(user_ids), 50))
    expected = i2if.probe(i2if.query(user_ids), positions)
    failures: list[Exception] = []

    def work():
        try:
            for _ in range(50):
                equal(i2if.probe(i2if.query(user_ids), positions), expected)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_probe_that_fails_leaves_nothing_for_the_next_user():
    _, transform, i2if = world(np.array([10, 20]), np.array([[1, 2, X, X], [3, X, X, X]]))
    users = transform.encode_users({"history": np.array([[10, X, X, X, X], [20, X, X, X, X]])})
    first, second = (i2if.query(users.ids[row : row + 1]) for row in (0, 1))
    positions = np.array([[0, 1]])
    expected = i2if.probe(second, positions)

    class OutOfMemory(np.ndarray):
        def take(self, *args, **kwargs):
            raise MemoryError

    table = i2if._scratch.table
    i2if._scratch.table = table.view(OutOfMemory)
    with pytest.raises(MemoryError):
        i2if.probe(first, positions)
    i2if._scratch.table = table
    equal(i2if.probe(second, positions), expected)


def test_probe_takes_milliseconds():
    """B = 1, C = 2000, L = 4: what one layer of a request may cost. The bound is ten times what is usual."""
    rng = np.random.default_rng(0)
    rows = 5000
    _, transform, i2if = world(np.arange(rows), rng.integers(0, 300, size=(rows, 4)))
    users = transform.encode_users(
        {"history": rng.integers(0, rows, size=(1, 5)), "likes": rng.integers(0, 300, size=(1, 2))}
    )
    positions = rng.integers(0, rows, size=(1, 2000))
    i2if.probe(i2if.query(users.ids), positions)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        i2if.probe(i2if.query(users.ids), positions)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.005


def test_no_candidates():
    i2if, user_ids = random_world(np.random.default_rng(0), 5)
    found = i2if.probe(i2if.query(user_ids), np.empty((len(user_ids), 0), np.int64))
    assert found.dense.shape == (len(user_ids), 0, 9)
    assert found.ids.shape == (len(user_ids), 0, 7)


def test_user_ids_of_another_transform():
    _, _, i2if = world(np.array([10, 20]), np.array([[1, 2, X, X], [3, X, X, X]]))
    ids = np.zeros((1, 8), np.int32)
    ids[0, 3] = 4
    with pytest.raises(
        FeatureError, match=r"interaction 'topics': user ids 0..4, expected 0..3; encode users"
    ):
        i2if.query(ids)


def test_arrays_that_do_not_fit():
    schema, transform, i2if = world(np.array([10, 20]), np.array([[1, 2, X, X], [3, X, X, X]]))
    arrays = i2if.to_arrays()
    again = I2IF.from_arrays(schema, transform, arrays)
    assert again.forward.keys() == i2if.forward.keys()

    def broken(**changes):
        return I2IF.from_arrays(schema, transform, arrays | {f"i2if.{n}": a for n, a in changes.items()})

    with pytest.raises(FormatError, match=r"i2if: array i2if.seen is missing; got i2if.position_of_id"):
        I2IF.from_arrays(schema, transform, {n: a for n, a in arrays.items() if n != "i2if.seen"})
    with pytest.raises(FormatError, match=r"i2if: forward lists of 'item': int64 \(2, 1\), expected int32"):
        broken(seen=np.zeros((2, 1), np.int64))
    with pytest.raises(FormatError, match=r"i2if: forward lists of \[1, 2\] items"):
        broken(seen=np.zeros((1, 1), np.int32))
    with pytest.raises(FormatError, match=r"i2if: forward lists of 'item' hold ids 0..4, expected 0..3"):
        broken(seen=np.array([[0], [4]], np.int32))
    with pytest.raises(FormatError, match=r"position_of_id of shape \(4,\) reaches position 2, expected"):
        broken(position_of_id=np.array([-1, -1, 0, 2], np.int32))
    raw = ads()
    del raw["interactions"]
    with pytest.raises(FormatError, match="i2if: schema 'ads' has no interactions, expected at least one"):
        I2IF.build(
            Schema.from_dict(raw), transform, transform.encode_items({"item": np.array([[10]])}), np.zeros(4)
        )
