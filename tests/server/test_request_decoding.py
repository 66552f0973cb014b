"""What the orchestrator makes of a request's parameters and of the tensors beside the users' features."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_snapshot import ORCHESTRATOR, SCHEMA, orchestrator_modules

from hsnn_core.eligibility import Context
from hsnn_core.errors import FeatureError, RequestError, SchemaMismatch
from hsnn_core.features import FeatureTransform
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


TRANSFORM = FeatureTransform.fit(
    TARGETED,
    {
        "age": np.arange(3, dtype=np.float32)[:, None],
        "country": np.arange(3)[:, None],
        "history": np.zeros((3, 5), np.int64),
    },
    {
        "item": np.arange(3)[:, None],
        "category": np.zeros((3, 3), np.int64),
        "price": np.arange(3, dtype=np.float32)[:, None],
    },
    np.arange(3),
)
WIRE = {tensor.name: tensor for tensor in (*TARGETED.user_wire(), *TARGETED.context_wire())}
DTYPES = {"FP32": np.float32, "FP64": np.float64, "INT64": np.int64}
# Of the types that Triton gives parameters. Tensors may be of any type and shape, as where a configuration was changed.
VALUES = st.text(max_size=8) | st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.floats()
LIKELY = st.sampled_from(["1", "7", "4,8", "click", "bid", "click,conversion", TARGETED.hash, 1, 100, 101, 0])
PARAMETERS = st.dictionaries(
    st.sampled_from(["k", "widths", "rank_by", "tasks", "after", "schema_hash", "triton_x"])
    | st.text(max_size=3),
    VALUES | LIKELY,
    max_size=4,
)


NUMBERS = st.sampled_from(
    [0, 1, -1, 7.5, np.nan, np.inf, -np.inf, 2**31, 2**62, -(2**63), KEY_MISSING, 1e300]
)
TYPES = st.sampled_from(
    [np.float32, np.float64, np.int64, np.int32, np.uint64, np.bool_, np.float16, np.object_]
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
# How a tensor comes, mostly as it should.
FORMS = st.sampled_from(["good", "good", "good", "good", "good", "good", "other", "none"])


@pytest.fixture(scope="module")
def request_decoding() -> Iterator[ModuleType]:
    """The module once for all that is drawn."""
    with orchestrator_modules("request_decoding") as modules:
        yield modules.request_decoding


@st.composite
def tensors_of_a_request(draw: st.DrawFn) -> dict[str, np.ndarray]:
    users = draw(st.integers(1, 3))
    drawn = {}
    for name, tensor in WIRE.items():
        form, width = draw(FORMS), tensor.shape[0] if tensor.shape[0] >= 0 else users
        if form != "none":
            dtype = DTYPES[tensor.datatype] if form == "good" else draw(TYPES)
            with np.errstate(all="ignore"):
                drawn[name] = np.zeros((users, width) if form == "good" else draw(SHAPES)).astype(dtype)
                drawn[name].flat[:1] = np.array(draw(NUMBERS)).astype(dtype)
    return drawn


@given(parameters=PARAMETERS)
def test_whatever_parameters_come_are_decoded_or_refused(
    request_decoding: ModuleType, parameters: dict[str, Any]
) -> None:
    """Never another error than those that clients know, and what is decoded is as the search expects it."""
    default = request_decoding.Ask(10, (4, 8), (1.0, 0.5))
    with suppress(RequestError, SchemaMismatch):
        asked = request_decoding.decode_ask(json.dumps(parameters), default, 100, TARGETED)
        assert 1 <= asked.k <= 100
        assert len(asked.widths) == 2 and min(asked.widths) >= 1
        assert len(asked.rank) == 2 and type(asked.by_bid) is bool and asked.after >= 0


@given(tensors=tensors_of_a_request())
def test_whatever_tensors_come_are_decoded_or_refused(
    request_decoding: ModuleType, tensors: dict[str, np.ndarray]
) -> None:
    with suppress(FeatureError):
        features, beside = request_decoding.split_inputs(TARGETED, tensors)
        request_decoding.check_complete(TARGETED, features)
        users = TRANSFORM.encode_users(features)
        context, excluded = request_decoding.decode_context(TARGETED, beside, len(users), now=99.9)
        assert np.isfinite(users.dense).all() and (users.ids >= 0).all()
        assert isinstance(context, Context) and len(context) == len(users) == len(excluded)
        assert np.isfinite(context.ranges["running"]).all()
