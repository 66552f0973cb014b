from __future__ import annotations

import numpy as np
import pytest
from core_schemas import ads, schema_dicts
from hypothesis import given, settings
from hypothesis import strategies as st

from hsnn_core.arrayfile import open_arrays, write_arrays
from hsnn_core.errors import FeatureError, FormatError
from hsnn_core.features import Encoded, FeatureTransform, Vocabulary
from hsnn_core.schema import KEY_MISSING, Feature, Owner, Schema, encode_row_values, stable_key

X = KEY_MISSING


def raw_table(schema: Schema, owner: Owner, rows: list[dict]) -> dict[str, np.ndarray]:
    return {
        feature.name: np.stack([encode_row_values(feature, row.get(feature.name)) for row in rows])
        for feature in schema.features_of(owner)
    }


def small() -> tuple[Schema, FeatureTransform]:
    """Three users, four items; country keeps its two most frequent values."""
    raw = ads()
    raw["features"]["user"]["country"]["vocab"] = 2
    schema = Schema.from_dict(raw)
    users = [
        {"age": 1.0, "country": "de", "history": [40, 10]},
        {"age": 3.0, "country": "fr"},
        {"age": 5.0, "country": "fr", "likes": [7]},
        {"age": 3.0, "country": "it"},
    ]
    items = [{"item": key, "price": [key, 1.0], "shelf": key // 10} for key in (40, 10, 30, 20)]
    keys = np.array([40, 10, 30, 20])
    fitted = FeatureTransform.fit(
        schema, raw_table(schema, "user", users), raw_table(schema, "item", items), keys
    )
    return schema, fitted


def test_fit_by_hand():
    _, transform = small()
    # fr twice; de and it once each: the smaller key stays.
    second = min("de", "it", key=stable_key)
    assert transform.cardinality("country") == 4
    assert transform.vocabularies["country"].encode(np.array([stable_key("fr")])).tolist() == [2]
    assert transform.vocabularies["country"].encode(np.array([stable_key(second)])).tolist() == [3]
    assert transform.vocabularies["item"].encode(np.array([40, 10, 30, 20, 11, X])).tolist() == [
        2,
        3,
        4,
        5,
        1,
        0,
    ]
    assert [transform.cardinality(space) for space in ("item", "category", "shelf")] == [6, 1002, 9]
    assert transform.dense_mean["user"].tolist() == [3.0]
    np.testing.assert_allclose(transform.dense_std["user"], np.sqrt(2.0))
    # The second price is constant: its deviation counts as 1.
    assert transform.dense_mean["item"].tolist() == [25.0, 1.0]
    assert transform.dense_std["item"][1] == 1.0
    with pytest.raises(FeatureError, match="id space 'age' is unknown"):
        transform.cardinality("age")


def test_encode_by_hand():
    schema, transform = small()
    users = [
        {"age": 3.0 + np.sqrt(2.0), "country": "xx", "likes": [5, 5], "history": [10, 99, 10]},
        {},
    ]
    found = transform.encode_users(raw_table(schema, "user", users))
    np.testing.assert_allclose(found.dense, [[1.0], [(0.5 - 3.0) / np.sqrt(2.0)]], rtol=1e-6)
    # country | likes: a sparse feature drops repeats | history: a sequence keeps them, 99 is unknown
    assert found.ids.tolist() == [[1, 7, 0, 3, 1, 3, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]]
    assert found.dense.dtype == np.float32
    assert found.ids.dtype == np.int32
    assert len(found) == 2
    items = transform.encode_items({"category": np.array([[1003, X, 3, -1]]), "shelf": np.array([[6]])})
    # 1003 and 3 fall together modulo 1000, -1 is 999; the gap closes. `item` and `price` are missing.
    assert items.ids.tolist() == [[0, 5, 1001, 0, 0, 8]]
    np.testing.assert_allclose(
        items.dense, [(0 - transform.dense_mean["item"]) / transform.dense_std["item"]]
    )


def test_tensors_leave_out_what_has_no_columns():
    dense, ids = np.zeros((2, 3), np.float32), np.zeros((2, 4), np.int32)
    assert list(Encoded(dense, ids).tensors("user")) == ["user_dense", "user_ids"]
    assert list(Encoded(dense[:, :0], ids).tensors("item")) == ["item_ids"]
    assert list(Encoded(dense, ids[:, :0]).tensors("item")) == ["item_dense"]


def test_far_outliers_stay_finite():
    _, transform = small()
    found = transform.encode_users({"age": np.array([[3e38], [-3e38]], np.float32)})
    assert found.dense.tolist() == [[1000.0], [-1000.0]]


def test_shared_space_learns_from_both_sides():
    schema = Schema.from_dict(
        {
            "name": "x",
            "keys": {"user": "u", "item": "i"},
            "tasks": [{"name": "click"}],
            "features": {
                "user": {"wants": {"kind": "sparse", "same_as": "has"}},
                "item": {"has": {"kind": "sparse", "vocab": 2}},
            },
        }
    )
    wants, has = np.array([[8], [8], [9]]), np.array([[9], [9], [8], [7]])
    transform = FeatureTransform.fit(schema, {"wants": wants}, {"has": has}, np.arange(4))
    assert transform.vocabularies["has"].encode(np.array([7, 8, 9])).tolist() == [1, 2, 3]
    assert transform.encode_users({"wants": np.array([[9]])}).ids.tolist() == [[3]]


@settings(max_examples=100, deadline=None)
@given(raw=schema_dicts(), seed=st.integers(0, 10**6))
def test_every_row_as_the_slow_twin_says(raw, seed):
    schema = Schema.from_dict(raw)
    rng = np.random.default_rng(seed)
    item_keys = rng.choice(40, size=12, replace=False).astype(np.int64)
    tables = {owner: random_raw(schema, owner, rng, rows=12) for owner in ("user", "item")}
    transform = FeatureTransform.fit(schema, tables["user"], tables["item"], item_keys)
    fresh = {owner: random_raw(schema, owner, rng, rows=5) for owner in ("user", "item")}
    for owner, found in (
        ("user", transform.encode_users(fresh["user"])),
        ("item", transform.encode_items(fresh["item"])),
    ):
        layout = schema.layout(owner)
        for slot in layout.slots:
            values = learnt_values(schema, slot.feature, tables, item_keys)
            for row, keys in enumerate(fresh[owner][slot.feature.name].tolist()):
                expected = slow_ids(slot.feature, keys, values)
                assert found.ids[row, slot.start : slot.stop].tolist() == expected
            assert found.ids[:, slot.start : slot.stop].max() < transform.cardinality(slot.feature.space)
        for slot in layout.dense_slots:
            seen = tables[owner][slot.feature.name].astype(np.float64)
            expected = (fresh[owner][slot.feature.name] - seen.mean(axis=0)) / seen.std(axis=0)
            np.testing.assert_allclose(found.dense[:, slot.start : slot.stop], expected, rtol=1e-4, atol=1e-4)
        # Every row is encoded by itself, whatever its batch.
        encode = transform.encode_users if owner == "user" else transform.encode_items
        single = encode({name: array[2:3] for name, array in fresh[owner].items()})
        np.testing.assert_array_equal(single.ids, found.ids[2:3])
        np.testing.assert_array_equal(single.dense, found.dense[2:3])


def random_raw(schema: Schema, owner: Owner, rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    raw = {}
    for feature in schema.features_of(owner):
        if feature.kind == "dense":
            raw[feature.name] = rng.normal(3.0, 2.0, size=(rows, feature.dim)).astype(np.float32)
        else:
            top = feature.size if feature.encoding == "range" else 60
            keys = rng.integers(0, top, size=(rows, feature.length))
            keys[rng.random(keys.shape) < 0.3] = KEY_MISSING
            raw[feature.name] = keys
    return raw


def learnt_values(schema: Schema, feature: Feature, tables: dict, item_keys: np.ndarray) -> list[int]:
    if feature.encoding == "item":
        return item_keys.tolist()
    counts: dict[int, int] = {}
    for other in schema.features:
        if other.space == feature.space and feature.encoding == "vocab":
            for key in tables[other.owner][other.name].ravel().tolist():
                if key != KEY_MISSING:
                    counts[key] = counts.get(key, 0) + 1
    return sorted(counts, key=lambda key: (-counts[key], key))[: feature.size]


def slow_ids(feature: Feature, keys: list[int], values: list[int]) -> list[int]:
    ids: list[int] = []
    for key in keys:
        if key == KEY_MISSING:
            continue
        if feature.encoding in ("hash", "range"):
            value = 2 + key % feature.size
        else:
            value = 2 + values.index(key) if key in values else 1
        if feature.kind == "sequence" or value not in ids:
            ids.append(value)
    return ids + [0] * (feature.length - len(ids))


@settings(max_examples=100, deadline=None)
@given(
    keys=st.lists(st.integers(X + 1, 2**63 - 1) | st.integers(-20, 20), unique=True, max_size=30),
    others=st.lists(st.integers(X, 2**63 - 1) | st.integers(-25, 25), max_size=30),
)
def test_vocabulary_for_all_keys(keys, others):
    vocabulary = Vocabulary.of(np.array(keys, dtype=np.int64))
    wanted = np.array([*keys, *others, X], dtype=np.int64)
    expected = [0 if k == X else keys.index(k) + 2 if k in keys else 1 for k in wanted.tolist()]
    assert vocabulary.encode(wanted).tolist() == expected
    assert vocabulary.encode(wanted[:, None]).shape == (len(wanted), 1)


def test_file_round_trip(tmp_path):
    schema, transform = small()
    write_arrays(tmp_path / "transform.hsnn", "transform", transform.to_arrays())
    arrays = open_arrays(tmp_path / "transform.hsnn", "transform").arrays
    again = FeatureTransform.from_arrays(schema, arrays)
    users = raw_table(schema, "user", [{"age": 2.0, "country": "fr", "history": [40, 41]}])
    np.testing.assert_array_equal(again.encode_users(users).ids, transform.encode_users(users).ids)
    np.testing.assert_array_equal(again.encode_users(users).dense, transform.encode_users(users).dense)
    assert again.cardinality("country") == transform.cardinality("country")

    with pytest.raises(
        FormatError, match=r"transform: array vocabulary.item.keys is missing; got dense.item"
    ):
        FeatureTransform.from_arrays(schema, {n: a for n, a in arrays.items() if n != "vocabulary.item.keys"})
    with pytest.raises(
        FormatError,
        match=r"array dense.user.mean is float32 of shape \(2,\), expected float32 of shape \(1,\)",
    ):
        FeatureTransform.from_arrays(schema, {**arrays, "dense.user.mean": np.zeros(2, np.float32)})


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ({"colour": np.array([[1]])}, "unknown user feature 'colour', expected one of age, country, likes"),
        ({"price": np.zeros((1, 2), np.float32)}, "unknown user feature 'price'"),
        ({}, "no user feature was given, expected at least one of age, country, likes, history"),
        ({"age": np.zeros((1, 1))}, "feature 'age': got float64, expected float32 (dense)"),
        ({"likes": np.zeros((1, 2), np.int32)}, "feature 'likes': got int32, expected int64 (sparse)"),
        ({"likes": [[1, 2]]}, "feature 'likes': got list, expected int64 (sparse)"),
        ({"likes": np.zeros((1, 3), np.int64)}, "feature 'likes': got shape (1, 3), expected (rows, 2)"),
        ({"likes": np.zeros(2, np.int64)}, "feature 'likes': got shape (2,), expected (rows, 2)"),
        (
            {"age": np.zeros((2, 1), np.float32), "likes": np.zeros((3, 2), np.int64)},
            "feature 'likes': got 3 rows, expected 2 as in the others",
        ),
        (
            {"age": np.array([[0.0], [np.nan]], np.float32)},
            "feature 'age': got [nan] in row 1, expected finite numbers",
        ),
    ],
)
def test_bad_raw_arrays(raw, text):
    _, transform = small()
    with pytest.raises(FeatureError) as caught:
        transform.encode_users(raw)
    assert text in str(caught.value)


@pytest.mark.parametrize("key", [7, -1])
def test_key_outside_its_range_is_refused(key):
    _, transform = small()
    text = f"feature 'shelf': got key {key} in row 1, expected 0..6 (range: 7)"
    with pytest.raises(FeatureError) as caught:
        transform.encode_items({"shelf": np.array([[X], [key]])})
    assert str(caught.value) == text


def test_bad_item_keys():
    schema, _ = small()
    users, items = {"age": np.zeros((1, 1), np.float32)}, {"shelf": np.array([[0]])}
    with pytest.raises(FeatureError, match="item keys: 5 occurs more than once, expected every item once"):
        FeatureTransform.fit(schema, users, items, np.array([5, 3, 5]))
    with pytest.raises(FeatureError, match=r"item keys: got float64 of shape \(2,\), expected int64 \(V,\)"):
        FeatureTransform.fit(schema, users, items, np.zeros(2))
