"""Encoded examples: fitted on train, histories as a client would send them, evaluation requests."""

from __future__ import annotations

from typing import Any

import log_samples as sample
import numpy as np
import pyarrow as pa
import pytest

from hsnn_core.errors import DataError
from hsnn_core.schema import KEY_MISSING
from hsnn_train.data.dataset import Dataset, build_dataset
from hsnn_train.data.splits import Split


def build(split: dict[str, Any] | None = None, **changes: Any) -> Dataset:
    return build_dataset(
        changes.get("schema", sample.schema()), sample.tables(**changes), Split.from_dict(split or {}), 1
    )


def test_examples_by_hand() -> None:
    data = build({"fractions": [0.5, 0.25, 0.25]})
    assert [len(part) for part in (data.train, data.valid, data.test)] == [3, 1, 2]
    assert data.item_keys.tolist() == [30, 10, 20]
    assert data.train.item_row.tolist() == [1, 1, 2]
    assert data.train.labels.tolist() == [[1, 0], [1, 1], [1, 0]]
    assert data.item_counts.tolist() == [0, 2, 1]
    # hour + 2; then the history as item row + 2: item 10 is row 1, item 20 row 2
    assert data.train.users.ids.tolist() == [[3, 0, 0], [4, 0, 0], [5, 3, 0]]
    assert data.test.users.ids.tolist() == [[7, 3, 0], [8, 3, 4]]
    assert data.items.ids.tolist() == [[2, 2, 0], [3, 2, 3], [4, 0, 0]]
    mean, std = np.mean([20, 50, 20]), np.std([20, 50, 20])
    np.testing.assert_allclose(data.test.users.dense[:, 0], (np.array([50, 20]) - mean) / std, rtol=1e-6)


def test_derived_histories_equal_those_a_client_sends() -> None:
    data = build({"fractions": [0.5, 0.25, 0.25]})
    history = np.array([[10, KEY_MISSING], [10, 20]], np.int64)
    sent = data.transform.encode_users({
        "age": np.array([[50.0], [20.0]], np.float32), "hour": np.array([[5], [6]]), "history": history
    })  # fmt: skip
    np.testing.assert_array_equal(sent.ids, data.test.users.ids)
    np.testing.assert_array_equal(sent.dense, data.test.users.dense)


def test_nothing_is_fitted_on_held_out_users() -> None:
    split = {"fractions": [0.5, 0.25, 0.25]}
    first = build(split)
    table = sample.impressions(hour=[1, 2, 3, 9, 9, 9], age=[20.0, 50.0, 20.0, 900.0, 900.0, 900.0])
    plain = sample.impressions(age=[20.0, 50.0, 20.0, 20.0, 50.0, 20.0])
    other, same = build(split, impressions=table), build(split, impressions=plain)
    np.testing.assert_array_equal(other.transform.dense_mean["user"], first.transform.dense_mean["user"])
    np.testing.assert_array_equal(same.test.users.dense, first.test.users.dense)
    assert other.test.users.dense.max() > 10


def test_a_feature_of_the_impressions_wins_over_the_users() -> None:
    data = build({"fractions": [1, 0, 0]}, impressions=sample.impressions(age=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert (np.diff(data.train.users.dense[:, 0]) > 0).all()


def test_a_dictionary_encoded_feature_is_the_same_as_a_plain_one() -> None:
    """What many impressions share, such as a list of what is popular now, need not be stored with each."""
    features = sample.SCHEMA["features"]
    user = features["user"] | {"popular": {"kind": "sequence", "of": "item", "length": 2}}
    schema = sample.schema(features=features | {"user": user})
    lists = [[10], [10, 20, 30], []]
    of = [0, 0, 1, 2, 1, 1]
    plain = sample.impressions(popular=[lists[number] for number in of])
    coded = sample.impressions(
        popular=pa.DictionaryArray.from_arrays(
            pa.array(of, pa.int32()), pa.array(lists, pa.list_(pa.int64()))
        )
    )
    split = {"fractions": [0.5, 0.25, 0.25]}
    one, other = (build(split, schema=schema, impressions=table) for table in (plain, coded))
    assert one.test.users.ids[:, -2:].tolist() == [[4, 2], [4, 2]]  # the last two: items 20 and 30
    for name in ("train", "valid", "test"):
        np.testing.assert_array_equal(getattr(one, name).users.ids, getattr(other, name).users.ids)
    np.testing.assert_array_equal(one.raw_users("test", np.array([1]))["popular"], [[20, 30]])
    nothing = sample.impressions(
        popular=pa.DictionaryArray.from_arrays(
            pa.array([0, None, 1, 2, 1, 1]), pa.array(lists, pa.list_(pa.int64()))
        )
    )
    missing = build(split, schema=schema, impressions=nothing)
    assert missing.train.users.ids[1, -2:].tolist() == [0, 0]


def test_users_who_are_not_in_the_table_have_missing_features() -> None:
    users = sample.users().slice(1)  # user 2 is gone
    data = build({"fractions": [1, 0, 0]}, users=users)
    assert data.notes == ("1 users are not in the users table: their features are missing",)
    mean = np.mean([20, 30, 20, 20, 30, 20])  # 30 is the default
    np.testing.assert_allclose(data.transform.dense_mean["user"], mean)


def test_missing_feature_columns() -> None:
    with pytest.raises(DataError) as error:
        build(users=sample.users().drop(["age"]))
    assert str(error.value) == (
        "users: column 'age' is missing (user feature; impressions lacks it too); columns there: user_id"
    )
    with pytest.raises(DataError, match=r"impressions: column 'age' is missing \(user feature\)"):
        build(users=None)
    with pytest.raises(DataError, match=r"items: column 'topics' is missing \(item feature\)"):
        build(items=sample.items().drop(["topics"]))


def test_histories_within_a_session() -> None:
    table = sample.impressions(session=[1, 2, 1, 3, 2, 3])
    data = build({"fractions": [1, 0, 0]}, impressions=table, history_by="session")
    assert data.train.users.ids[:, 1:].tolist() == [[0, 0], [0, 0], [3, 0], [0, 0], [3, 0], [0, 0]]


def test_relevant_items_of_a_time_split() -> None:
    table = sample.impressions(click=[1, 0, 1, 1, 1, 1])
    data = build({"fractions": [0.5, 0, 0.5]}, impressions=table)
    users, wanted = data.relevant("test")
    assert [rows.tolist() for rows in wanted] == [[0], [2]]  # user 1: item 30 twice; user 2: item 20
    assert users.ids.tolist() == [[6, 3, 4], [7, 0, 0]]  # as of their first impression in test
    assert data.relevant("valid")[1] == []
    assert len(data.relevant("valid")[0]) == 0


def test_relevant_is_one_item_per_user_when_one_is_left_out() -> None:
    data = build({"by": "leave_one_out"})
    users, wanted = data.relevant("test")
    assert [rows.tolist() for rows in wanted] == [[0]]
    assert users.ids.tolist() == [[8, 3, 4]]
    assert [rows.tolist() for rows in data.relevant("valid")[1]] == [[2]]


def test_requests_on_the_wire_encode_to_the_users_of_relevant() -> None:
    data = build({"by": "leave_one_out"})
    raw, users = data.requests("test", 10)
    assert raw["history"].tolist() == [[10, 20]]
    sent = data.transform.encode_users(raw)
    for expected in (users, data.relevant("test", 10)[0]):
        np.testing.assert_array_equal(sent.ids, expected.ids)
        np.testing.assert_array_equal(sent.dense, expected.dense)


def test_relevant_is_cut_to_the_same_choice_every_time() -> None:
    count = 50
    table = sample.impressions(
        user_id=list(range(count)), item_id=[10] * count, time=list(range(count)), hour=[3] * count,
        click=[1] * count, buy=[0] * count,
    )  # fmt: skip
    data = build({"fractions": [0.2, 0, 0.8]}, impressions=table)
    first, again = data.relevant("test", 10), data.relevant("test", 10)
    assert len(first[1]) == len(first[0]) == 10
    np.testing.assert_array_equal(first[0].ids, again[0].ids)
    assert len(data.relevant("test", 1000)[1]) == 40


def test_a_schema_of_histories_alone() -> None:
    features = {
        "user": {"history": {"kind": "sequence", "of": "item", "length": 3, "from": "buy"}},
        "item": {"item": {"kind": "sparse", "of": "item"}},
    }
    schema = sample.schema(features=features, interactions={})
    data = build({"fractions": [0.5, 0.25, 0.25]}, schema=schema, users=None)
    assert data.train.users.dense.shape == (3, 0)
    assert data.test.users.ids.tolist() == [[3, 0, 0], [0, 0, 0]]
    assert not data.simulated
