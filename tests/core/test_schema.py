from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import yaml
from core_schemas import ADS_YAML, ads, schema_dicts
from hypothesis import given, settings

from hsnn_core.errors import FeatureError, SchemaError, SchemaMismatch
from hsnn_core.schema import (
    KEY_MISSING,
    Schema,
    WireTensor,
    check_same,
    encode_row_values,
    first_difference,
    load_schema,
    stable_key,
)


def schema(**changes) -> Schema:
    return Schema.from_dict(ads() | changes)


def test_the_example_says_what_it_looks_like():
    ours = schema()
    assert (ours.user_key, ours.item_key, ours.time_key) == ("user_id", "item_id", "timestamp")
    assert [(t.name, t.weight, t.rank) for t in ours.tasks] == [("click", 1.0, 1.0), ("conversion", 1.0, 0.0)]
    assert [f.name for f in ours.features_of("user")] == ["age", "country", "likes", "history"]
    likes, history, item = ours.feature("likes"), ours.feature("history"), ours.feature("item")
    # The space is declared further down in the file; encoding, size and type are taken from there.
    assert (likes.space, likes.encoding, likes.size, likes.length) == ("category", "hash", 1000, 2)
    assert (history.space, history.encoding, history.derive_from) == ("item", "item", "click")
    assert (item.space, item.length) == ("item", 1)
    assert [(i.name, i.matches, i.through) for i in ours.interactions] == [
        ("topics", 4, True),
        ("seen", 1, False),
        ("likes", 2, False),
    ]


def test_layout_and_wire():
    ours = schema()
    user, item = ours.layout("user"), ours.layout("item")
    assert (user.dense_width, user.ids_width) == (1, 8)
    assert [(s.feature.name, s.start, s.stop) for s in user.slots] == [
        ("country", 0, 1),
        ("likes", 1, 3),
        ("history", 3, 8),
    ]
    assert [(s.feature.name, s.start, s.stop) for s in item.dense_slots] == [("price", 0, 2)]
    assert ours.user_wire() == [
        WireTensor("age", "FP32", (1,)),
        WireTensor("country", "INT64", (1,)),
        WireTensor("likes", "INT64", (2,)),
        WireTensor("history", "INT64", (5,)),
    ]
    assert ours.item_wire()[2] == WireTensor("price", "FP32", (2,))
    raw = ads()
    del raw["features"]["user"]["age"]
    only_ids = Schema.from_dict(raw)
    assert only_ids.layout("user").dense_width == 0


@settings(max_examples=200, deadline=None)
@given(raw=schema_dicts())
def test_round_trip(raw):
    ours = Schema.from_dict(raw)
    for again in (
        Schema.from_json(ours.to_json()),
        Schema.from_dict(ours.to_dict()),
        Schema.from_dict(yaml.safe_load(yaml.safe_dump(ours.to_dict(), sort_keys=False))),
    ):
        assert again == ours
        assert again.hash == ours.hash
        assert first_difference(ours, again) is None
    check_same(ours, Schema.from_dict(copy.deepcopy(raw)))
    for owner in ("user", "item"):
        layout = ours.layout(owner)
        assert layout.ids_width == sum(f.length for f in ours.features_of(owner) if f.kind != "dense")
        assert layout.dense_width == sum(f.dim for f in ours.features_of(owner) if f.kind == "dense")


@settings(max_examples=100, deadline=None)
@given(left=schema_dicts(), right=schema_dicts())
def test_schemas_with_one_hash_are_the_same(left, right):
    a, b = Schema.from_dict(left), Schema.from_dict(right)
    assert (first_difference(a, b) is None) == (a == b) == (a.hash == b.hash)


def test_hash_of_the_example_is_fixed():
    """A change of the canonical form orphans every checkpoint and snapshot: make it on purpose."""
    assert schema().hash == "a7904064cb5d8d24"


def test_load_schema(tmp_path):
    path = tmp_path / "ads.yaml"
    path.write_text(ADS_YAML)
    assert load_schema(path) == schema()
    path.write_text("name: [")
    with pytest.raises(SchemaError, match=rf"schema {path}: not valid YAML"):
        load_schema(path)
    path.write_text("name: ads")
    with pytest.raises(SchemaError, match=rf"schema {path}: keys: missing; a schema needs"):
        load_schema(path)
    with pytest.raises(SchemaError, match="no such file"):
        load_schema(tmp_path / "other.yaml")
    with pytest.raises(SchemaError, match="not valid JSON"):
        Schema.from_json("{")


def test_serving_needs_no_yaml():
    code = (
        "import sys; sys.modules['yaml'] = None; from hsnn_core.schema import Schema; "
        f"print(Schema.from_json({schema().to_json()!r}).hash)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == schema().hash


@pytest.mark.parametrize(
    ("edit", "difference"),
    [
        (lambda raw: raw["features"]["user"]["age"].update(dim=2), "features.user.age.dim: 1 != 2"),
        (lambda raw: raw["tasks"].pop(), "tasks: 2 entries != 1 entries"),
        (lambda raw: raw["tasks"][1].update(weight=0.5), "tasks.1.weight: 1.0 != 0.5"),
        (lambda raw: raw["keys"].pop("time"), "keys.time: present != absent"),
        (lambda raw: raw["features"]["item"].pop("shelf"), "features.item.shelf: present != absent"),
        (
            lambda raw: raw["features"]["user"].update(age=raw["features"]["user"].pop("age")),
            "features.user: order (age, country, likes, history) != (country, likes, history, age)",
        ),
        (lambda raw: raw["interactions"]["topics"].update(matches=1), "interactions.topics.matches: 4 != 1"),
    ],
)
def test_first_difference(edit, difference):
    raw = ads()
    edit(raw)
    ours, theirs = schema(), Schema.from_dict(raw)
    assert first_difference(ours, theirs) == difference
    assert ours.hash != theirs.hash
    with pytest.raises(SchemaMismatch) as caught:
        check_same(ours, theirs)
    assert str(caught.value) == (
        f"schemas differ: ours is {ours.hash}, theirs {theirs.hash}; first difference (ours != theirs): "
        f"{difference}"
    )


def at(path: str, value):
    """An edit that sets the dotted path; None deletes it."""

    def edit(raw):
        *folders, last = path.split(".")
        for folder in folders:
            raw = raw[int(folder)] if isinstance(raw, list) else raw[folder]
        if value is None:
            del raw[last]
        else:
            raw[last] = value

    return edit


def both(first, second):
    """Two edits, one after the other."""
    return lambda raw: (first(raw), second(raw))


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            at("feature", {}),
            "feature: unknown setting, expected one of name, keys, tasks, features, interactions, eligibility, bid; d",
        ),
        (at("name", " "), "name: got ' ', expected a text that is not empty"),
        (at("keys.user", None), "keys.user: missing; expected the column with the user's key"),
        (at("keys.item", "user_id"), "expected a column of its own for each"),
        (at("tasks", []), "tasks: got [], expected a list with at least one task"),
        (at("tasks", None), "tasks: missing; a schema needs name, keys, tasks and features"),
        (at("tasks", [{"name": "click"}, {"name": "click"}]), "tasks.1.name: 'click' is declared twice"),
        (at("tasks", [{"name": "a", "weight": -1}]), "tasks.0.weight: got -1.0, expected a number >= 0"),
        (
            at("tasks", [{"name": "a", "rank": 0}]),
            "tasks: every rank is 0, expected at least one task to rank by",
        ),
        (at("tasks", ["click"]), "tasks.0: got 'click' (str), expected a mapping"),
        (
            at("tasks", [{"name": "a", "given": "shown"}, {"name": "b"}]),
            "tasks.0.given: got 'shown', expected another task (b)",
        ),
        (
            at("tasks", [{"name": "a", "given": 1}]),
            "tasks.0.given: got 1, expected another task (there is none)",
        ),
        (
            at("tasks", [{"name": "a", "given": ["b"]}, {"name": "b"}]),
            "tasks.0.given: got ['b'], expected another",
        ),
        (
            at("tasks", [{"name": "click", "given": "shown"}, {"name": "shown"}]),
            "tasks.0.given: click ranks items (rank 1) and shown, which it is given, does not; expected rank 1 of",
        ),
        (
            at("tasks", [{"name": "c"}, {"name": "b", "given": "a", "rank": 2}, {"name": "a"}]),
            "tasks.1.given: b ranks items (rank 2) and a, which it is given, does not",
        ),
        (
            at("tasks", [{"name": "a", "given": "a"}]),
            "tasks.0.given: a given a: a circle, expected a task that is",
        ),
        (
            at("tasks", [{"name": "c"}, {"name": "a", "given": "b"}, {"name": "b", "given": "a"}]),
            "tasks.1.given: a given b given a: a circle, expected a task that is given none at its end",
        ),
        (at("features.item", {}), "features.item: no features, expected at least one feature of the item"),
        (
            at("features.user.price", {"kind": "dense"}),
            "features.item.price: the name is taken by features.user.price",
        ),
        (
            at("features.user.a-b", {"kind": "dense"}),
            "features.user.a-b: the name 'a-b' is not letters, digits and _",
        ),
        (
            at("features.user.age.kind", None),
            "features.user.age.kind: missing, expected one of dense, sparse, sequence",
        ),
        (
            at("features.user.age.kind", "number"),
            "features.user.age.kind: got 'number', expected one of dense",
        ),
        (
            at("features.user.age.max", 3),
            "features.user.age.max: unknown dense setting, expected one of kind, dim, def",
        ),
        (at("features.user.age.dim", 0), "features.user.age.dim: got 0, expected a whole number from 1 to"),
        (
            at("features.user.age.default", float("nan")),
            "features.user.age.default: got nan, expected a number that",
        ),
        (
            at("features.user.age.default", 1e300),
            "features.user.age.default: got 1e+300, expected a number that",
        ),
        (
            at("features.user.country.vocab", None),
            "features.user.country: got none of vocab, hash, range, of; expected",
        ),
        (
            at("features.user.country.hash", 3),
            "features.user.country: got vocab and hash of vocab, hash, range, of",
        ),
        (
            at("features.user.country.vocab", 2.5),
            "features.user.country.vocab: got 2.5, expected a whole number",
        ),
        (
            at("features.user.country.type", "float"),
            "features.user.country.type: got 'float', expected one of int,",
        ),
        (
            at("features.user.country.from", "click"),
            "features.user.country.from: only a user's sequence `of: item`",
        ),
        (
            at("interactions.likes.fade", 0.5),
            "interactions.likes.fade: likes is no sequence, so nothing in it is older",
        ),
        (
            at("interactions.seen.fade", 0.0),
            "interactions.seen.fade: got 0.0, expected a number above 0, at most 1",
        ),
        (
            at("features.item.shelf.type", "string"),
            "features.item.shelf.type: got string, expected int with range",
        ),
        (
            at("features.user.history.length", None),
            "features.user.history.length: missing; expected the number of ids",
        ),
        (
            at("features.user.history.of", "category"),
            "features.user.history.of: got 'category', expected item; to share",
        ),
        (
            at("features.user.history.from", "view"),
            "features.user.history.from: got 'view', expected one of click, con",
        ),
        (
            at("features.user.history.type", "string"),
            "features.item.item.type: item keys are int here and string in h",
        ),
        (
            at("features.item.item", {"kind": "sparse", "hash": 5}),
            "features.item.item: the name 'item' is kept for the",
        ),
        (
            at("features.user.likes.same_as", "age"),
            "features.user.likes.same_as: got 'age', expected a sparse or seq",
        ),
        (at("features.user.likes.same_as", "item"), "for item ids write `of: item`"),
        (
            at("features.user.likes.hash", 5),
            "features.user.likes.same_as: hash: 5 of type int differs from category's",
        ),
        (
            at("interactions.seen.user", "age"),
            "interactions.seen.user: got 'age', expected a sparse or sequence feature",
        ),
        (
            at("interactions.seen.item", "history"),
            "interactions.seen.item: got 'history', expected a sparse or sequen",
        ),
        (
            at("interactions.seen.user", "country"),
            "interactions.seen: ids of country (space country) and item (space i",
        ),
        (at("interactions.topics.matches", 5), "interactions.topics.matches: got 5, expected at most 4"),
        (
            at("interactions.topics.matches", True),
            "interactions.topics.matches: got True, expected a whole number",
        ),
        (
            at("interactions.seen.nodes", "all"),
            "interactions.seen.nodes: got 'all', expected representative or members",
        ),
        (
            at("interactions.topics.nodes", "members"),
            "interactions.topics.nodes: members are counted by the item itself; category is not, cross a feature",
        ),
        (
            at("interactions.seen.via", "category"),
            "interactions.seen.via: got 'category', expected an item feature with the ids of item (item)",
        ),
        (
            both(
                at("interactions.seen.via", "item"),
                at("features.user.history.length", 2**20),
            ),
            "interactions.seen.via: 1048576 ids of history with lists of 1 in item can weigh 2^31 and more; exp",
        ),
        (
            at("interactions.likes.via", "category"),
            "interactions.likes.user: got likes (space category), expected a feature `of: item`: via follows",
        ),
        (
            at("interactions.topics.match", 1),
            "interactions.topics.match: unknown setting, expected one of user, item, ",
        ),
    ],
)
def test_bad_schemas_name_the_entry(edit, text):
    raw = ads()
    edit(raw)
    with pytest.raises(SchemaError) as caught:
        Schema.from_dict(raw)
    assert text in str(caught.value)


def test_not_a_mapping():
    with pytest.raises(SchemaError, match=r"schema: got \[\] \(list\), expected a mapping"):
        Schema.from_dict([])


def test_unknown_feature():
    with pytest.raises(FeatureError, match="feature 'colour' is unknown; expected one of age, country"):
        schema().feature("colour")


def test_stable_key_is_fixed():
    """Keys are stored in every vocabulary: other values would make every string unknown."""
    assert [stable_key(text) for text in ("", "de", "日本")] == [
        3797230976420062948,
        8804398627457808120,
        4223062404410717160,
    ]
    assert min(stable_key(str(number)) for number in range(1000)) >= 0


@pytest.mark.parametrize(
    ("name", "value", "row"),
    [
        ("age", None, [0.5]),
        ("age", 3, [3.0]),
        ("age", [3.5], [3.5]),
        ("age", np.float64(2.0), [2.0]),
        ("price", [1, 2.5], [1.0, 2.5]),
        ("price", None, [0.0, 0.0]),
        ("country", "de", [stable_key("de")]),
        ("country", ["de", "fr"], [stable_key("de")]),
        ("likes", 7, [7, KEY_MISSING]),
        ("likes", [7, 8, 9], [7, 8]),  # sparse: the first
        ("likes", np.array([7], dtype=np.int32), [7, KEY_MISSING]),
        ("likes", [], [KEY_MISSING] * 2),
        ("likes", None, [KEY_MISSING] * 2),
        ("history", (1, 2), [1, 2, *[KEY_MISSING] * 3]),
        ("history", [1, 2, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7]),  # sequence: the most recent
        ("history", np.arange(7), [2, 3, 4, 5, 6]),
        ("history", np.array([], dtype=float), [KEY_MISSING] * 5),
    ],
)
def test_encode_row_values(name, value, row):
    found = encode_row_values(schema().feature(name), value)
    assert found.tolist() == row
    assert found.dtype == (np.float32 if name in ("age", "price") else np.int64)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("age", "old", "feature 'age': got 'old', expected a number (dense)"),
        ("age", [1, 2], "feature 'age': got [1, 2], expected a number (dense)"),
        ("age", float("nan"), "feature 'age': got nan, expected finite float32 numbers"),
        ("age", 1e300, "feature 'age': got 1e+300, expected finite float32 numbers"),
        ("price", 3.0, "feature 'price': got 3.0, expected a list of 2 numbers (dense)"),
        ("price", [1.0, None], "feature 'price': got [1.0, None], expected a list of 2 numbers (dense)"),
        ("country", 3, "feature 'country': got 3 (int) as a key, expected a string (type: string)"),
        ("likes", "7", "feature 'likes': got '7' (str) as a key, expected an integer of 64 bits"),
        ("likes", True, "feature 'likes': got True (bool) as a key, expected an integer"),
        ("likes", 2.0, "feature 'likes': got 2.0 (float) as a key, expected an integer"),
        ("likes", [1, None], "feature 'likes': got None (NoneType) as a key, expected an integer"),
        (
            "likes",
            2**63,
            "feature 'likes': got 9223372036854775808 (int) as a key, expected an integer of 64",
        ),
        ("likes", KEY_MISSING, "as a key, expected an integer of 64 bits above -2**63 (type: int)"),
        (
            "likes",
            np.array([KEY_MISSING]),
            "as a key, expected an integer of 64 bits above -2**63 (type: int)",
        ),
        ("likes", [[1]], "feature 'likes': got [[1]], expected one key or a list of int keys (sparse)"),
        ("history", 5, "feature 'history': got 5, expected a list of int keys (sequence)"),
        ("history", "abc", "feature 'history': got 'abc', expected a list of int keys (sequence)"),
    ],
)
def test_values_that_cannot_be_encoded(name, value, text):
    with pytest.raises(FeatureError) as caught:
        encode_row_values(schema().feature(name), value)
    assert text in str(caught.value)


def test_rank_exponents_are_one_per_task():
    schema = Schema.from_dict(
        ads() | {"tasks": [{"name": "click"}, {"name": "b"}, {"name": "c", "rank": 0.25}]}
    )
    assert schema.rank.dtype == np.float32
    assert schema.rank.tolist() == [1.0, 0.0, 0.25]


def test_a_task_may_be_given_another_and_negatives_are_drawn_for_the_first_that_is_not():
    tasks = [
        {"name": "click", "given": "shown"},
        {"name": "order", "given": "click"},
        {"name": "shown", "rank": 1},
    ]
    schema = Schema.from_dict(ads() | {"tasks": tasks})
    assert schema.given.tolist() == [2, 0, -1]
    assert schema.drawn_task == 2
    assert Schema.from_json(schema.to_json()).hash == schema.hash
    plain = Schema.from_dict(ads())
    assert plain.given.tolist() == [-1, -1] and plain.drawn_task == 0
    assert "given" not in plain.to_json(), "older schemas keep their hashes"
