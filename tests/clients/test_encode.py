"""Users as dicts -> wire tensors: what a client gets wrong is said before anything is sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clients.encode import UserEncoder
from hsnn_core.errors import HsnnError
from hsnn_core.schema import KEY_MISSING, Schema, stable_key

SCHEMA = Schema.from_dict(
    {
        "name": "encode",
        "keys": {"user": "user_id", "item": "item_id"},
        "tasks": [{"name": "click"}],
        "features": {
            "user": {
                "age": {"kind": "dense", "default": -1.0},
                "taste": {"kind": "dense", "dim": 2},
                "country": {"kind": "sparse", "vocab": 9, "type": "string"},
                "groups": {"kind": "sparse", "hash": 9, "max": 2},
                "history": {"kind": "sequence", "of": "item", "length": 3},
            },
            "item": {"item": {"kind": "sparse", "of": "item"}},
        },
    }
)


def test_a_batch_of_users_is_one_tensor_per_feature() -> None:
    tensors = UserEncoder(SCHEMA).encode(
        [
            {"age": 31, "taste": [0.5, 2.0], "country": "IT", "groups": [4, 5, 6], "history": [1, 2, 3, 4]},
            {"groups": 8, "history": []},
        ]
    )
    assert list(tensors) == ["age", "taste", "country", "groups", "history"]
    np.testing.assert_array_equal(tensors["age"], np.array([[31], [-1]], np.float32))
    np.testing.assert_array_equal(tensors["taste"], np.array([[0.5, 2], [0, 0]], np.float32))
    np.testing.assert_array_equal(tensors["country"], [[stable_key("IT")], [KEY_MISSING]])
    np.testing.assert_array_equal(tensors["groups"], [[4, 5], [8, KEY_MISSING]])  # the first that fit
    np.testing.assert_array_equal(tensors["history"], [[2, 3, 4], [KEY_MISSING] * 3])  # the most recent
    assert {name: value.dtype for name, value in tensors.items()} == {
        "age": np.float32,
        "taste": np.float32,
        "country": np.int64,
        "groups": np.int64,
        "history": np.int64,
    }


@pytest.mark.parametrize(
    ("users", "texts"),
    [
        ([{}, {"agee": 3}], ["user 1: unknown feature 'agee'", "expected among ['age'", "mean 'age'?"]),
        ([{"age": "old"}], ["user 0: feature 'age'", "got 'old'", "expected a number"]),
        ([{"age": float("nan")}], ["user 0: feature 'age'", "got nan", "expected finite"]),
        ([{"taste": [1.0]}], ["user 0: feature 'taste'", "got [1.0]", "a list of 2 numbers"]),
        ([{"country": 39}], ["user 0: feature 'country'", "got 39 (int)", "expected a string"]),
        ([{}, {"history": ["a"]}], ["user 1: feature 'history'", "got 'a' (str)", "expected an integer"]),
        ([{"history": 4}], ["user 0: feature 'history'", "got 4", "expected a list"]),
        ([], ["users: got an empty list, expected at least one user"]),
        ({"age": 3}, ["users: got dict, expected a list of dicts", "put a single user into a list"]),
        ([["age", 3]], ["user 0: got list, expected a dict"]),
    ],
)
def test_wrong_users_are_named(users: Any, texts: list[str]) -> None:
    with pytest.raises(HsnnError) as failure:
        UserEncoder(SCHEMA).encode(users)
    for text in texts:
        assert text in str(failure.value)
