"""What the orchestrator makes of a request's parameters and of the tensors beside the users' features."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny_snapshot import ORCHESTRATOR, SCHEMA

from hsnn_core.errors import FeatureError, RequestError
from hsnn_core.schema import KEY_MISSING, Schema

PLAIN = Schema.from_dict(SCHEMA)
TARGETED = Schema.from_dict(
    SCHEMA
    | {
        "eligibility": {
            "market": {"kind": "set"},
            "running": {"kind": "range", "from": "start", "until": "end", "default": "now"},
            "owner": {"kind": "key"},
        },
        "bid": "bid",
    }
)


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr(sys, "path", [str(ORCHESTRATOR), *sys.path])
    yield importlib.import_module("request_decoding")
    sys.modules.pop("request_decoding", None)


def ask(decoding: ModuleType, schema: Schema = TARGETED, **parameters: Any) -> Any:
    default = decoding.Ask(10, (4, 8), tuple(schema.rank.tolist()))
    return decoding.decode_ask(json.dumps(parameters), default, 100, schema)


def test_a_request_says_what_to_rank_by(decoding: ModuleType) -> None:
    assert ask(decoding) == decoding.Ask(10, (4, 8), (1.0, 0.5), by_bid=False)
    assert ask(decoding, k="7", rank_by="bid", widths="1,2") == decoding.Ask(7, (1, 2), (1.0, 0.5), True)
    assert ask(decoding, tasks="conversion").rank == (0.0, 1.0)
    assert ask(decoding, tasks="conversion, click", rank_by="probability").rank == (1.0, 1.0)


@pytest.mark.parametrize(
    ("schema", "parameters", "text"),
    [
        (TARGETED, {"rank_by": "price"}, "rank_by: got 'price', expected one of ['probability', 'bid']"),
        (PLAIN, {"rank_by": "bid"}, "rank_by: got 'bid', but the items have none; declare the schema's bid"),
        (
            TARGETED,
            {"tasks": "view"},
            "tasks: got 'view', expected different ones of ['click', 'conversion']",
        ),
        (TARGETED, {"tasks": ""}, "tasks: got '', expected different ones of"),
        (TARGETED, {"tasks": "click,click"}, "tasks: got 'click,click', expected different ones of"),
    ],
)
def test_wrong_parameters_are_named(
    decoding: ModuleType, schema: Schema, parameters: dict[str, Any], text: str
) -> None:
    with pytest.raises(RequestError) as caught:
        ask(decoding, schema, **parameters)
    assert text in str(caught.value)


def test_context_is_told_from_the_users_features(decoding: ModuleType) -> None:
    features = {"age": np.zeros((2, 1), np.float32), "country": np.zeros((2, 1), np.int64)}
    beside = {
        "context_market": np.array([[3], [KEY_MISSING]]),
        "context_running": np.array([[5.5], [np.nan]]),
        "exclude_owner": np.array([[1, 2], [3, KEY_MISSING]]),
        "exclude_items": np.array([[17], [4]]),
    }
    users, tensors = decoding.split_inputs(TARGETED, features | beside)
    assert (users, tensors) == (features, beside)
    context, excluded = decoding.decode_context(TARGETED, tensors, 2, now=99.9)
    assert len(context) == 2
    np.testing.assert_array_equal(context.sets["market"], beside["context_market"])
    assert context.ranges["running"].tolist() == [5.5, 99.0]
    np.testing.assert_array_equal(context.excluded["owner"], beside["exclude_owner"])
    np.testing.assert_array_equal(excluded, beside["exclude_items"])
    # A schema without the section knows one of them; the others stay with the features, which name them.
    users, tensors = decoding.split_inputs(PLAIN, features | beside)
    assert set(tensors) == {"exclude_items"}
    assert "context_market" in users


def test_a_request_that_says_nothing(decoding: ModuleType) -> None:
    context, excluded = decoding.decode_context(TARGETED, {}, 3, now=7.0)
    assert (len(context), excluded.shape) == (3, (3, 0))
    assert context.ranges["running"].tolist() == [7.0] * 3
    context, excluded = decoding.decode_context(PLAIN, {}, 3, now=7.0)
    assert (len(context), dict(context.ranges)) == (3, {})


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (
            {"exclude_items": np.zeros((2, 3), np.int64)},
            "exclude_items: got int64 of shape (2, 3), expected int64 of",
        ),
        (
            {"exclude_owner": np.zeros((3, 1))},
            "exclude_owner: got float64 of shape (3, 1), expected int64 of shape",
        ),
        (
            {"context_market": np.zeros((3, 2), np.int64)},
            "context_market: got int64 of shape (3, 2), expected int64",
        ),
    ],
)
def test_wrong_context_tensors_are_named(
    decoding: ModuleType, tensors: dict[str, np.ndarray], text: str
) -> None:
    with pytest.raises(FeatureError) as caught:
        decoding.decode_context(TARGETED, tensors, 3, now=0.0)
    assert text in str(caught.value)


def test_a_user_needs_a_tensor_of_every_feature(decoding: ModuleType) -> None:
    everything = {tensor.name: np.zeros((1, 1)) for tensor in TARGETED.user_wire()}
    decoding.check_complete(TARGETED, everything)
    without = {name: values for name, values in everything.items() if name != "age"}
    with pytest.raises(
        FeatureError, match="user features .'age'. are missing, expected a tensor of every one"
    ):
        decoding.check_complete(TARGETED, without)
