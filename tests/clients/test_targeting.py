"""What a request says beside its users: context, exclusions, and what to rank by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tritonclient.grpc.service_pb2 import ModelInferRequest

from clients.encode import WireUsers, context_tensors
from clients.load import serialise
from clients.wire import Codec, Question, ServedModel
from hsnn_cli.commands_serving import item_keys_of, json_object
from hsnn_core.errors import FeatureError, HsnnError, RequestError
from hsnn_core.schema import KEY_MISSING, Schema, stable_key

RAW: dict[str, Any] = {
    "name": "targeting",
    "keys": {"user": "user_id", "item": "item_id"},
    "tasks": [{"name": "click"}, {"name": "sale", "rank": 0.5}],
    "features": {
        "user": {"age": {"kind": "dense"}},
        "item": {"item": {"kind": "sparse", "of": "item"}},
    },
    "eligibility": {
        "country": {"kind": "set", "type": "string"},
        "running": {"kind": "range", "from": "start", "until": "end", "default": "now"},
        "advertiser": {"kind": "key"},
    },
    "bid": "bid",
}
SCHEMA = Schema.from_dict(RAW)
MISSING = int(KEY_MISSING)


def codec(schema: Schema = SCHEMA) -> Codec:
    return Codec(ServedModel("hsnn_retrieve", schema, 10, (4,), 8, "bls"))


def sent(request: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    return {tensor.name(): (tensor.datatype(), tensor.shape()) for tensor in request["inputs"]}


def test_one_for_all_users_or_one_per_user() -> None:
    assert context_tensors(SCHEMA, 2) == {}
    one = context_tensors(SCHEMA, 2, {"country": "IT"}, [17, 4], {"advertiser": 5})
    assert one["context_country"].tolist() == [[stable_key("IT")]] * 2
    assert one["exclude_items"].tolist() == [[17, 4]] * 2
    assert one["exclude_advertiser"].tolist() == [[5]] * 2
    each = context_tensors(
        SCHEMA, 2, [{"running": 3.5}, None], [[17], np.array([4, 5])], [None, {"advertiser": [5]}]
    )
    np.testing.assert_array_equal(each["context_running"], [[3.5], [np.nan]])
    assert each["exclude_items"].tolist() == [[17, MISSING], [4, 5]]
    assert each["exclude_advertiser"].tolist() == [[MISSING], [5]]
    assert context_tensors(SCHEMA, 2, exclude_items=np.array([3]))["exclude_items"].tolist() == [[3]] * 2


def test_a_load_may_have_context() -> None:
    requests = [{"age": np.zeros((users, 1), np.float32)} for users in (1, 2, 1)]
    about = [{"context": {"country": "IT"}, "exclude_items": [17]}, {}]
    model = ServedModel("hsnn_retrieve", SCHEMA, 10, (4,), 8, "bls")
    found = [
        {tensor.name: list(tensor.shape) for tensor in ModelInferRequest.FromString(message).inputs}
        for message in serialise(model, requests, about=about)
    ]
    asked = {
        "context_country": [1, 1],
        "context_running": [1, 1],
        "exclude_advertiser": [1, 0],
        "exclude_items": [1, 1],
    }
    assert found == [{"age": [1, 1]} | asked, {"age": [2, 1]}, {"age": [1, 1]} | asked]


def test_requests_without_context_are_as_they_always_were() -> None:
    request = codec().request([{}, {}], Question())
    assert sent(request) == {"age": ("FP32", [2, 1])}
    assert request["parameters"] == {"schema_hash": SCHEMA.hash}


def test_context_travels_beside_the_features() -> None:
    users = WireUsers({"age": np.zeros((2, 1), np.float32)})
    question = Question(
        context={"country": "IT"}, exclude_items=[1, 2, 3], rank_by="bid", tasks=["sale", "click"]
    )
    request = codec().request(users, question)
    assert sent(request) == {
        "age": ("FP32", [2, 1]),
        "context_country": ("INT64", [2, 1]),
        "context_running": ("FP64", [2, 1]),
        "exclude_advertiser": ("INT64", [2, 0]),
        "exclude_items": ("INT64", [2, 3]),
    }
    assert request["parameters"] == {"schema_hash": SCHEMA.hash, "tasks": "sale,click", "rank_by": "bid"}


@pytest.mark.parametrize(
    ("question", "kind", "text"),
    [
        ({"context": {"contry": "IT"}}, FeatureError, "user 0: context: unknown attribute 'contry'"),
        (
            {"context": [{}]},
            RequestError,
            "context: got 1 entries, expected one for all users, or a list of 2",
        ),
        ({"context": "IT"}, RequestError, "context: got str, expected one for all users, or a list of 2"),
        (
            {"exclude": [{}] * 3},
            RequestError,
            "exclude: got 3 entries, expected one for all users, or a list of 2",
        ),
        (
            {"exclude_items": [[1]]},
            RequestError,
            "exclude_items: got 1 entries, expected one for all users, or",
        ),
        (
            {"exclude_items": ["a"]},
            FeatureError,
            "user 0: exclude_items: got 'a' (str) as a key, expected an integer",
        ),
        ({"rank_by": "price"}, RequestError, "rank_by: got 'price', expected one of ['probability', 'bid']"),
        (
            {"tasks": ["view"]},
            RequestError,
            "tasks: got ['view'], expected a list with one or more of ['click', 'sale",
        ),
        ({"tasks": "click"}, RequestError, "tasks: got 'click', expected a list"),
        ({"exclude_items": 5}, RequestError, "exclude_items: got 5, expected a list of item ids"),
        ({"tasks": []}, RequestError, "tasks: got [], expected a list"),
    ],
)
def test_wrong_questions_are_named(question: dict[str, Any], kind: type[HsnnError], text: str) -> None:
    with pytest.raises(kind) as caught:
        codec().request([{}, {}], Question(**question))
    assert text in str(caught.value)


def test_ranking_by_bids_needs_bids() -> None:
    plain = codec(Schema.from_dict(RAW | {"bid": None}))
    with pytest.raises(
        RequestError, match=r"rank_by: got 'bid', expected one of \['probability'\] \(the schema decl"
    ):
        plain.request([{}], Question(rank_by="bid"))


def test_arguments_of_the_command_line() -> None:
    assert item_keys_of("3, 17,-4,sku-1,") == [3, 17, -4, "sku-1"]
    with pytest.raises(FeatureError, match="--context: got list, expected a JSON object of attributes"):
        json_object("[1]", "--context", "attributes")
