from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
from core_schemas import ads, schema_dicts
from hypothesis import given
from hypothesis import strategies as st

from hsnn_core.errors import FeatureError
from hsnn_core.features import FeatureTransform
from hsnn_core.item_updates import MAX_BYTES, MAX_SEQUENCE, Update, item_wire_rows, parse_update
from hsnn_core.schema import KEY_MISSING, Feature, Schema, encode_row_values, stable_key

X = KEY_MISSING
SCHEMA = Schema.from_dict(
    ads()
    | {
        "eligibility": {
            "country_of": {"kind": "set", "type": "string", "max": 2},
            "running": {"kind": "range", "from": "start", "until": "end"},
            "paused": {"kind": "flag"},
        },
        "bid": "bid",
    }
)


def upsert(**change: Any) -> dict[str, Any]:
    """A valid upsert with some entries changed; None removes one."""
    raw = {"id": 17, "sequence": 9, "features": {"category": [4, 9], "price": [2.5, 1], "shelf": 3}} | change
    return {name: value for name, value in raw.items() if value is not None}


def test_an_upsert_by_hand() -> None:
    update = parse_update(SCHEMA, json.dumps(upsert(bid=0.7, eligibility={"country_of": ["IT"]})).encode())
    assert update == Update(
        17, 9, False, {"category": [4, 9], "price": [2.5, 1], "shelf": 3}, {"country_of": ["IT"]}, 0.7
    )
    assert update.to_json() == (
        '{"id":17,"sequence":9,"features":{"category":[4,9],"price":[2.5,1],"shelf":3},'
        '"eligibility":{"country_of":["IT"]},"bid":0.7}'
    )
    assert Update.from_json(update.to_json()) == update
    rows = item_wire_rows(SCHEMA, [update, Update(-5, 1)])
    assert {name: array.tolist() for name, array in rows.items()} == {
        "item": [[17], [-5]],
        "category": [[4, 9, X, X], [X, X, X, X]],
        "price": [[2.5, 1.0], [0.0, 0.0]],
        "shelf": [[3], [X]],
    }


def test_a_delete_by_hand() -> None:
    update = parse_update(SCHEMA, {"id": 17, "sequence": 10, "deleted": True})
    assert update == Update(17, 10, deleted=True)
    assert update.to_json() == '{"id":17,"sequence":10,"deleted":true}'
    assert Update.from_json(update.to_json()) == update


def test_what_is_left_out_takes_its_default() -> None:
    update = parse_update(SCHEMA, {"id": 0, "sequence": 0})
    assert update == Update(0, 0)
    assert update.to_json() == '{"id":0,"sequence":0,"features":{}}'
    assert (
        parse_update(SCHEMA, {"id": 17, "sequence": MAX_SEQUENCE, "features": None, "bid": None}).bid is None
    )
    assert parse_update(SCHEMA, upsert(features={"item": 17})).features == {"item": 17}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", r"update: not valid JSON \(.*\); expected an object like \{\"id\": 17"),
        ("[" * 100_000, "update: not valid JSON"),
        (b"\xff", "update: not valid JSON"),
        ("[1]", r"update: got \[1\], expected an object with id, sequence and features"),
        (b'"' + b"x" * MAX_BYTES, f"update: got {MAX_BYTES + 1} bytes of JSON, expected at most {MAX_BYTES}"),
        (upsert(id=None), r"id: missing, got \['features', 'sequence'\]; expected the item's id"),
        (upsert(id=True), r"id: got True \(bool\), expected an integer of 64 bits above -2\*\*63"),
        (upsert(id="a"), r"id: got 'a' \(str\), expected an integer of 64 bits"),
        (upsert(id=2**63), r"id: got 9223372036854775808 \(int\), expected an integer of 64 bits"),
        (upsert(sequence=None), "item 17: sequence: missing, expected a whole number that grows"),
        (upsert(sequence=-1), r"item 17: sequence: got -1 \(int\), expected a whole number from 0 to 2\*\*62"),
        (upsert(sequence=2**62 + 1), "item 17: sequence: got 4611686018427387905"),
        (upsert(sequence=1.0), r"item 17: sequence: got 1.0 \(float\)"),
        (upsert(deleted=1), "item 17: deleted: got 1, expected true or false"),
        (upsert(deleted=True), "item 17: unknown entry 'features' of a delete, expected one of id, sequence, deleted"),
        (upsert(featurs={}), "item 17: unknown entry 'featurs', expected one of .*; did you mean 'features'"),
        (upsert(features=[1]), r"item 17: features: got \[1\], expected an object of names and values"),
        (upsert(features={"prize": 1}), "item 17: unknown item feature 'prize', expected one of .*mean 'price'"),
        (upsert(features={"age": 1}), "item 17: unknown item feature 'age'"),
        (upsert(features={"price": [math.nan, 1]}), r"item 17: feature 'price': got \[nan, 1\], expected finite"),
        (upsert(features={"price": [1e40, 1]}), r"item 17: feature 'price': got \[1e\+40, 1\], expected finite"),
        (upsert(features={"price": "2"}), "item 17: feature 'price': got '2', expected a list of 2 numbers"),
        (upsert(features={"shelf": 7}), r"item 17: feature 'shelf': got key 7, expected 0..6 \(range: 7\)"),
        (upsert(features={"category": ["x"]}), r"item 17: feature 'category': got 'x' \(str\) as a key"),
        (upsert(features={"category": [2**63]}), "item 17: feature 'category': got 9223372036854775808"),
        (upsert(features={"item": 18}), "item 17: feature 'item': got 18, expected the item's own id as in `id`"),
        (upsert(bid=0), "item 17: bid: got 0, expected a finite number above 0"),
        (upsert(bid=math.inf), "item 17: bid: got inf"),
        (upsert(bid=True), "item 17: bid: got True"),
        (upsert(eligibility={"running": [math.nan, 1]}), "item 17: attribute .running.: got .*nan"),
        (upsert(eligibility={"running": [2, 1]}), "item 17: attribute 'running': got .*expected from <= until"),
        (upsert(eligibility={"country": ["IT"]}), "item 17: eligibility: unknown attribute 'country', expected one"),
        (upsert(eligibility={"country_of": ["I", "D", "F"]}), "item 17: attribute 'country_of': got"),
    ],
)  # fmt: skip
def test_bad_updates_are_explained(raw: Any, message: str) -> None:
    with pytest.raises(FeatureError, match=f"^{message}"):
        parse_update(SCHEMA, raw)


def test_ids_that_are_strings_are_kept_as_their_key() -> None:
    raw = ads()
    raw["features"]["item"]["item"]["type"] = raw["features"]["user"]["history"]["type"] = "string"
    schema = Schema.from_dict(raw)
    update = parse_update(schema, {"id": "sku-1", "sequence": 1})
    assert update.item == stable_key("sku-1")
    assert parse_update(schema, {"id": update.item, "sequence": 1}).item == update.item
    assert item_wire_rows(schema, [update])["item"].tolist() == [[update.item]]


def values_of(feature: Feature) -> st.SearchStrategy[Any]:
    if feature.kind == "dense":
        number = st.floats(-1e6, 1e6, width=32)
        several = st.lists(number, min_size=feature.dim, max_size=feature.dim)
        return several if feature.dim > 1 else number
    if feature.encoding == "range":
        keys: st.SearchStrategy[Any] = st.integers(0, feature.size - 1)
    else:
        keys = st.text("aü", max_size=3) if feature.type == "string" else st.integers(-(2**63) + 1, 2**63 - 1)
    return st.lists(keys, max_size=feature.length + 2)


@given(st.data())
def test_wire_rows_are_what_the_transform_takes(data: st.DataObject) -> None:
    """For any schema: the rows equal those of each value alone, and survive the log's JSON."""
    schema = Schema.from_dict(data.draw(schema_dicts()))
    updates, rows = [], []
    for item in range(data.draw(st.integers(1, 4))):
        features = {
            feature.name: data.draw(st.none() | values_of(feature))
            for feature in schema.item_features
            if feature.name != "item" and data.draw(st.booleans())
        }
        raw = {"id": item, "sequence": 1, "features": features}
        updates.append(Update.from_json(parse_update(schema, json.dumps(raw)).to_json()))
        rows.append(features)
    wire = item_wire_rows(schema, updates)
    for feature in schema.item_features:
        own = feature.encoding == "item" and feature.kind == "sparse" and feature.length == 1
        for item, features in enumerate(rows):
            value = features.get(feature.name)
            expected = np.array([item]) if own and value is None else encode_row_values(feature, value)
            np.testing.assert_array_equal(wire[feature.name][item], expected)
    users = {
        feature.name: np.stack([encode_row_values(feature, None)]) for feature in schema.features_of("user")
    }
    transform = FeatureTransform.fit(schema, users, wire, np.arange(len(updates)))
    assert len(transform.encode_items(wire)) == len(updates)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "a", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2)
    ),
    max_leaves=6,
)
ENTRIES = {
    "id": st.just(17) | ANYTHING,
    "sequence": st.just(1) | ANYTHING,
    "features": st.fixed_dictionaries({}, optional=dict.fromkeys(["item", "category", "price", "shelf"], ANYTHING))
    | ANYTHING,
    "eligibility": st.fixed_dictionaries({}, optional=dict.fromkeys(["country_of", "running", "paused"], ANYTHING)),
    "bid": ANYTHING,
    "deleted": ANYTHING,
}  # fmt: skip


@given(st.fixed_dictionaries({}, optional=ENTRIES), st.sampled_from(["int", "string"]))
def test_whatever_comes_is_an_update_or_an_error_that_says_why(raw: dict[str, Any], key_type: str) -> None:
    plain = ads() | {name: SCHEMA.to_dict()[name] for name in ("eligibility", "bid")}
    for owner, name in (("item", "item"), ("user", "history")):
        plain["features"][owner][name]["type"] = key_type
    schema = Schema.from_dict(plain)
    refusal, update = "", Update(0, 0)
    try:
        update = parse_update(schema, json.dumps(raw))
    except FeatureError as error:
        refusal = str(error)
    if refusal:
        assert re.match("(id|item -?[0-9]+): ", refusal)
        return
    assert Update.from_json(update.to_json()).to_json() == update.to_json()
    if not update.deleted:
        item_wire_rows(schema, [update])
