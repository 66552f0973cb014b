"""The schema's eligibility section and the tensors that a request says its context with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import yaml
from core_schemas import ads

from hsnn_core.errors import FeatureError, SchemaError
from hsnn_core.schema import KEY_MISSING, Schema, WireTensor, first_difference, stable_key
from hsnn_core.schema_eligibility import encode_context

ELIGIBILITY = """
country:    {kind: set, type: string, max: 30}
placement:  {kind: set, type: string, max: 4, ask: 2}
running:    {kind: range, from: start_time, until: end_time, default: now}
age:        {kind: range, from: youngest, until: oldest}
paused:     {kind: flag}
advertiser: {kind: key}
"""


def targeted(**changes: Any) -> Schema:
    return Schema.from_dict(ads() | {"eligibility": yaml.safe_load(ELIGIBILITY), "bid": "bid"} | changes)


def test_the_example_says_what_it_looks_like() -> None:
    ours = targeted()
    assert [(a.name, a.kind) for a in ours.eligibility] == [
        ("country", "set"),
        ("placement", "set"),
        ("running", "range"),
        ("age", "range"),
        ("paused", "flag"),
        ("advertiser", "key"),
    ]
    assert ours.eligibility[0].columns == ("country",)
    assert ours.eligibility[2].columns == ("start_time", "end_time")
    assert [a.now for a in ours.eligibility] == [False, False, True, False, False, False]
    assert ours.bid == "bid"
    assert ours.context_wire() == [
        WireTensor("context_country", "INT64", (1,)),
        WireTensor("context_placement", "INT64", (2,)),
        WireTensor("context_running", "FP64", (1,)),
        WireTensor("context_age", "FP64", (1,)),
        WireTensor("exclude_advertiser", "INT64", (-1,)),
        WireTensor("exclude_items", "INT64", (-1,)),
    ]
    assert Schema.from_dict(ads()).context_wire() == [WireTensor("exclude_items", "INT64", (-1,))]


def test_it_survives_its_json_and_is_in_the_hash() -> None:
    ours, plain = targeted(), Schema.from_dict(ads())
    assert Schema.from_json(ours.to_json()) == ours
    assert plain.hash == "a7904064cb5d8d24", "a schema without the section keeps its hash"
    assert len({plain.hash, ours.hash, targeted(bid=None).hash, targeted(eligibility=None).hash}) == 4
    raw = yaml.safe_load(ELIGIBILITY)
    raw["country"]["ask"] = 2
    assert first_difference(ours, targeted(eligibility=raw)) == "eligibility.country.ask: 1 != 2"


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"a": {}}, "eligibility.a.kind: missing, expected one of set, range, flag, key"),
        ({"a": {"kind": "list"}}, "eligibility.a.kind: got 'list', expected one of set, range, flag, key"),
        (
            {"a": {"kind": "set", "of": 3}},
            "eligibility.a.of: unknown set setting, expected one of kind, type, max, ask",
        ),
        ({"a": {"kind": "set", "max": 0}}, "eligibility.a.max: got 0, expected a whole number from 1"),
        (
            {"a": {"kind": "key", "type": "text"}},
            "eligibility.a.type: got 'text', expected one of int, string",
        ),
        ({"a": {"kind": "range", "from": "x"}}, "eligibility.a.until: got None, expected a text"),
        ({"a": {"kind": "range", "from": "x", "until": "x"}}, "eligibility.a: from and until are both x"),
        (
            {"a": {"kind": "range", "from": "x", "until": "y", "default": "today"}},
            "eligibility.a.default: got 'today', expected now (the server's clock), or leave it out",
        ),
        ({"a-b": {"kind": "flag"}}, "eligibility.a-b: the name 'a-b' is not letters"),
        (
            {"items": {"kind": "key"}},
            "eligibility.items: its request tensor exclude_items has the name of the items that a request excludes",
        ),
        ([], "eligibility"),
        ("all", "eligibility: got 'all' (str), expected a mapping"),
    ],
)
def test_bad_sections_name_the_entry(section: Any, text: str) -> None:
    if section == []:
        assert targeted(eligibility=section).eligibility == ()
        return
    with pytest.raises(SchemaError) as caught:
        targeted(eligibility=section)
    assert text in str(caught.value)


def test_request_tensors_have_names_that_no_user_feature_has() -> None:
    raw = ads()
    raw["features"]["user"]["context_country"] = {"kind": "dense"}
    raw["eligibility"] = {"country": {"kind": "set"}}
    with pytest.raises(
        SchemaError,
        match=r"eligibility.country: its request tensor context_country has the name of features.user.context_country",
    ):
        Schema.from_dict(raw)
    del raw["eligibility"], raw["features"]["user"]["context_country"]
    raw["features"]["user"]["exclude_items"] = {"kind": "dense"}
    with pytest.raises(
        SchemaError, match=r"features.user.exclude_items: the name is kept for the items that"
    ):
        Schema.from_dict(raw)
    with pytest.raises(SchemaError, match=r"bid: got 3, expected a text"):
        targeted(bid=3)


def test_a_context_is_all_tensors_or_none() -> None:
    ours = targeted()
    assert encode_context(ours, [{}, {}], [{}, {}], [(), ()]) == {}
    tensors = encode_context(
        ours,
        [{"country": "IT", "age": 31}, {"placement": ["feed"]}],
        [{"advertiser": [5, 6]}, {}],
        [(), [17]],
    )
    assert list(tensors) == [tensor.name for tensor in ours.context_wire()]
    missing = int(KEY_MISSING)
    assert tensors["context_country"].tolist() == [[stable_key("IT")], [missing]]
    assert tensors["context_placement"].tolist() == [[missing, missing], [stable_key("feed"), missing]]
    np.testing.assert_array_equal(tensors["context_running"], [[np.nan], [np.nan]])
    np.testing.assert_array_equal(tensors["context_age"], [[31.0], [np.nan]])
    assert tensors["exclude_advertiser"].tolist() == [[5, 6], [missing, missing]]
    assert tensors["exclude_items"].tolist() == [[missing], [17]]
    assert {t.name: t.datatype for t in ours.context_wire()} == {
        name: "FP64" if values.dtype == np.float64 else "INT64" for name, values in tensors.items()
    }


def test_excluded_items_may_be_named_as_the_table_or_as_the_answer_names_them() -> None:
    raw = ads()
    for owner, name in (("user", "history"), ("item", "item")):
        raw["features"][owner][name]["type"] = "string"
    strings = Schema.from_dict(raw)
    tensors = encode_context(strings, [{}], [{}], [["sku-1", stable_key("sku-2")]])
    assert tensors["exclude_items"].tolist() == [[stable_key("sku-1"), stable_key("sku-2")]]


@pytest.mark.parametrize(
    ("context", "excluded", "items", "text"),
    [
        (
            {"contry": "IT"},
            {},
            (),
            "user 1: context: unknown attribute 'contry', expected among ['age', 'country'",
        ),
        ({"contry": "IT"}, {}, (), "did you mean 'country'?"),
        ({"paused": True}, {}, (), "user 1: context: unknown attribute 'paused'"),
        (
            {"country": 39},
            {},
            (),
            "user 1: context: attribute 'country': got 39 (int) as a key, expected a string",
        ),
        (
            {"country": ["IT", "DE"]},
            {},
            (),
            "attribute 'country': got 2 keys, expected at most 1 (the schema says ask: 1)",
        ),
        ({"age": "old"}, {}, (), "attribute 'age': got 'old', expected a finite number (range)"),
        ({"age": float("nan")}, {}, (), "attribute 'age': got nan, expected a finite number (range)"),
        ({"age": True}, {}, (), "attribute 'age': got True, expected a finite number (range)"),
        (
            {},
            {"country": ["IT"]},
            (),
            "user 1: exclude: unknown attribute 'country', expected among ['advertiser']",
        ),
        ({}, {"advertiser": ["x"]}, (), "exclude: attribute 'advertiser': got 'x' (str) as a key"),
        ({}, {}, ["x"], "user 1: exclude_items: got 'x' (str) as a key, expected an integer of 64 bits"),
        ([], {}, (), "user 1: context: got [], expected a dict of attribute name -> value"),
    ],
)
def test_a_wrong_context_is_named(context: Any, excluded: Any, items: Any, text: str) -> None:
    with pytest.raises(FeatureError) as caught:
        encode_context(targeted(), [{}, context], [{}, excluded], [(), items])
    assert text in str(caught.value)
