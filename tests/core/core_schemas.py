"""The schemas of the tests: the README's example, and random ones."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import strategies as st

ADS_YAML = """
name: ads
keys: {user: user_id, item: item_id, time: timestamp}
tasks:
  - {name: click, weight: 1.0, rank: 1.0}
  - {name: conversion}
features:
  user:
    age:     {kind: dense, default: 0.5}
    country: {kind: sparse, vocab: 300, type: string}
    likes:   {kind: sparse, max: 2, same_as: category}
    history: {kind: sequence, of: item, length: 5, from: click}
  item:
    item:     {kind: sparse, of: item}
    category: {kind: sparse, hash: 1000, max: 4}
    price:    {kind: dense, dim: 2}
    shelf:    {kind: sparse, range: 7}
interactions:
  topics: {user: history, item: category}
  seen:   {user: history, item: item}
  likes:  {user: likes, item: category, matches: 2}
"""


def ads() -> dict[str, Any]:
    """The plain form, fresh for every test to edit."""
    return yaml.safe_load(ADS_YAML)


@st.composite
def schema_dicts(draw: st.DrawFn) -> dict[str, Any]:
    """Valid schemas in their short form: settings with defaults are left out at random."""
    tasks = draw(st.lists(st.sampled_from(["click", "buy", "like"]), min_size=1, max_size=3, unique=True))
    item_type = draw(st.sampled_from(["int", "string"]))
    features: dict[str, dict[str, Any]] = {"user": {}, "item": {}}
    spaces: dict[str, str] = {}
    sharable: list[str] = []
    for owner in ("user", "item"):
        for number in range(draw(st.integers(1, 4))):
            name = f"{owner}{number}"
            kind = draw(st.sampled_from(["dense", "sparse", "sequence"]))
            entry: dict[str, Any] = {"kind": kind}
            if kind == "dense":
                entry |= draw(
                    st.fixed_dictionaries(
                        {}, optional={"dim": st.integers(1, 4), "default": st.floats(-9, 9, width=32)}
                    )
                )
            else:
                encoding = draw(st.sampled_from(["vocab", "hash", "range", "of", "same_as"]))
                if encoding == "same_as" and sharable:
                    entry["same_as"] = draw(st.sampled_from(sharable))
                elif encoding in ("of", "same_as"):
                    entry |= {"of": "item", "type": item_type}
                else:
                    entry[encoding] = draw(st.integers(1, 50))
                    if encoding != "range":
                        entry["type"] = draw(st.sampled_from(["int", "string"]))
                    sharable.append(name)
                spaces[name] = entry.get("same_as", "item" if "of" in entry else name)
                if kind == "sequence":
                    entry["length"] = draw(st.integers(1, 6))
                    if owner == "user" and "of" in entry and draw(st.booleans()):
                        entry["from"] = draw(st.sampled_from(tasks))
                elif draw(st.booleans()):
                    entry["max"] = draw(st.integers(1, 4))
            features[owner][name] = entry
    pairs = [
        (user, item)
        for user in features["user"]
        for item in features["item"]
        if user in spaces and item in spaces and (spaces[user] in ("item", spaces[item]))
    ]
    chosen = draw(st.lists(st.sampled_from(pairs), max_size=3, unique=True)) if pairs else []
    raw: dict[str, Any] = {
        "name": draw(st.sampled_from(["ads", "films"])),
        "keys": {"user": "u", "item": "i"} | draw(st.sampled_from([{}, {"time": "t"}])),
        "tasks": [
            {"name": name} | draw(st.sampled_from([{}, {"weight": 0.5}, {"rank": 2.0}])) for name in tasks
        ],
        "features": features,
    }
    if chosen:
        raw["interactions"] = {f"x{n}": {"user": user, "item": item} for n, (user, item) in enumerate(chosen)}
        for entry in raw["interactions"].values():
            item = entry["item"]
            lists = [name for name in features["item"] if spaces.get(name) == spaces[item]]
            if spaces[entry["user"]] == "item" and draw(st.booleans()):
                entry["via"] = draw(st.sampled_from(lists))
    return raw
