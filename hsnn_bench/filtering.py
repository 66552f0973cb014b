"""Is an item ever returned that must not be? Random histories of updates, random requests, and the rules read plainly.

The exported networks of a run search in this process, over an index that is changed between batches of requests: items
come, go, and change their attributes; now and then the index is compacted. What comes back is checked item by item
against a dictionary of what is live and the meaning of each attribute, and the number of results against a count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from export.exported import Exported, open_export
from hsnn_cli.provenance import commit, machine
from hsnn_core.bundle import Bundle
from hsnn_core.eligibility import Context
from hsnn_core.errors import DataError
from hsnn_core.features import Encoded
from hsnn_core.files import write_bytes
from hsnn_core.item_attributes import ItemAttributes
from hsnn_core.live_index import LiveIndex
from hsnn_core.onnx_runner import OnnxItemTower, OnnxRunner
from hsnn_core.schema import Schema
from hsnn_core.schema_eligibility import Attribute
from hsnn_core.search import search
from hsnn_core.targeting import TargetingFilter
from hsnn_train.checkpoint import write_json

USERS = 64  # requests of one batch
K, WIDTH = 20, 3
KEYS = tuple(f"key {n}" for n in range(6))  # of set attributes; key attributes have the numbers 0..5
NOW = 1000.0
COMPACTED = 0.01  # of the batches come after a compaction
COUNTED = 0.2  # of the batches have a request whose number of results is checked
FIRST_NEW = 1 << 40


@dataclass
class Tally:
    """What was seen."""

    queries: int = 0
    counted: int = 0
    items: int = 0
    updates: int = 0
    deletes: int = 0
    compactions: int = 0
    wrong: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)


class Rules:
    """The live items and their attributes as plain values, and what they mean."""

    def __init__(self, schema: Schema, ids: Sequence[int]) -> None:
        self.schema = schema
        self.rows: dict[int, dict[str, Any]] = {item: {} for item in ids}

    def draw(self, rng: np.random.Generator) -> dict[str, Any]:
        """Attributes of an item, as an update has them."""
        row: dict[str, Any] = {}
        for attribute in self.schema.eligibility:
            if attribute.kind == "set":
                count = int(rng.integers(0, min(3, attribute.max) + 1))
                row[attribute.name] = self._some(rng, attribute, count)
            elif attribute.kind == "flag":
                row[attribute.name] = bool(rng.random() < 0.1)
            elif attribute.kind == "key":
                row[attribute.name] = self._some(rng, attribute, 1)[0] if rng.random() < 0.8 else None
            else:
                start = float(rng.integers(0, 2000))
                row[attribute.name] = [
                    start if rng.random() < 0.5 else None,
                    start + 500 if rng.random() < 0.5 else None,
                ]
        return row

    def draw_context(self, rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
        """Context and exclusions of a request, as a client gives them."""
        context: dict[str, Any] = {}
        excluded: dict[str, Any] = {}
        for attribute in self.schema.eligibility:
            if attribute.kind == "set":
                context[attribute.name] = self._some(rng, attribute, int(rng.integers(0, attribute.ask + 1)))
            elif attribute.kind == "range" and rng.random() < 0.7:
                context[attribute.name] = float(rng.integers(-100, 2600))
            elif attribute.kind == "key":
                excluded[attribute.name] = self._some(rng, attribute, int(rng.integers(0, 3)))
        return context, excluded

    def may_get(self, item: int, context: Mapping[str, Any], excluded: Mapping[str, Any]) -> bool:
        """Whether a request may return the item: it is live and every attribute lets it through."""
        row = self.rows.get(item)
        return row is not None and all(
            self._lets_through(attribute, row.get(attribute.name), context, excluded)
            for attribute in self.schema.eligibility
        )

    @staticmethod
    def _lets_through(
        attribute: Attribute, value: Any, context: Mapping[str, Any], excluded: Mapping[str, Any]
    ) -> bool:
        if attribute.kind == "set":
            return not value or bool(set(value) & set(context.get(attribute.name, ())))
        if attribute.kind == "flag":
            return not value
        if attribute.kind == "key":
            return value is None or value not in excluded.get(attribute.name, ())
        start, until = value or (None, None)
        at = context.get(attribute.name, NOW if attribute.now else math.nan)
        if math.isnan(at):
            return start is None and until is None
        return (start is None or start <= at) and (until is None or at < until)

    @staticmethod
    def _some(rng: np.random.Generator, attribute: Attribute, count: int) -> list[Any]:
        chosen = rng.choice(len(KEYS), size=count, replace=False)
        return [KEYS[n] if attribute.type == "string" else int(n) for n in chosen]


class _World:
    """The index under test beside the rules."""

    def __init__(self, exported: Exported, rng: np.random.Generator) -> None:
        self.bundle = Bundle.open(exported.bundle)
        if not self.bundle.schema.eligibility or self.bundle.records is None:
            raise DataError(
                f"{exported.path}: no eligibility attributes or no records, expected both to test"
            )
        self._rng = rng
        self.schema = self.bundle.schema
        self._tower = OnnxItemTower(exported.path / "item_tower.onnx")
        files = [exported.path / f"{graph.signature.stem}.onnx" for graph in exported.graphs[2:]]
        self.scorer = self.bundle.scorer(OnnxRunner(exported.path / "user_tower.onnx", files))
        self.known = self.bundle.index.item_ids.tolist()
        self._features = dict(zip(self.known, range(len(self.known))))
        self.rules = Rules(self.schema, self.known)
        for item in self.known:
            self.rules.rows[item] = self.rules.draw(rng)
        corpus = self.bundle.corpus
        attributes = self._attributes(self.known)
        self.live = LiveIndex(
            self.schema, self.bundle.transform, replace(corpus, attributes=attributes), self._tower
        )
        self._next = FIRST_NEW

    def change(self, tally: Tally) -> None:
        """A batch of updates: known items that change or come back, new ones, deletes."""
        rng = self._rng
        count, gone = int(rng.integers(0, 40)), int(rng.integers(0, 40))
        chosen = rng.choice(self.known, size=count + gone, replace=False).tolist()
        upserts, deletes = chosen[:count], chosen[count:]
        for _ in range(int(rng.integers(0, 10))):
            upserts.append(self._next)
            self._features[self._next] = int(rng.integers(0, len(self.known)))
            self._next += 1
        added = [item for item in self.rules.rows if item >= FIRST_NEW]
        if len(added) > 300:  # what comes must go, or the known items drown
            deletes += added[:200]
        for item in deletes:
            self.rules.rows.pop(item, None)
        for item in upserts:
            self.rules.rows[item] = self.rules.draw(rng)
        records = self.bundle.records
        assert records is not None
        rows = np.array([self._features[item] for item in upserts], dtype=np.int64)
        self.live.apply(
            np.array(upserts, dtype=np.int64),
            Encoded(records.features.dense[rows], records.features.ids[rows]),
            self._attributes(upserts),
            np.array(deletes, dtype=np.int64),
            self.live.state.log_position + 1,
        )
        tally.updates += len(upserts)
        tally.deletes += len(deletes)
        if rng.random() < COMPACTED:
            corpus = self.live.compact()
            self.live = LiveIndex(self.schema, self.bundle.transform, corpus, self._tower)
            tally.compactions += 1

    def ask(self, users: Encoded, tally: Tally) -> None:
        """One batch of requests, and the check of every item that comes back."""
        rng, state = self._rng, self.live.state
        asked = [self.rules.draw_context(rng) for _ in range(len(users))]
        pool = list(self.rules.rows)
        excluded = [
            [pool[n] for n in rng.integers(0, len(pool), size=int(rng.integers(0, 10)))] for _ in asked
        ]
        context = Context.from_rows(
            self.schema, [one for one, _ in asked], NOW, excluded=[other for _, other in asked]
        )
        places = [state.view.find(np.array(items, dtype=np.int64)) for items in excluded]
        allowed = TargetingFilter(state.view, len(users), state.attributes, context, places)
        widths = [WIDTH] * (self.bundle.index.layers - 1)
        scorer = self.scorer.over(state.view, state.i2if, state.embeddings)
        found = search(state.view, scorer, users, widths, K, self.schema.rank, allowed)
        tally.queries += len(users)
        for user, ((given, others), without) in enumerate(zip(asked, excluded)):
            items = found.item_ids[user, : found.valid[user]].tolist()
            tally.items += len(items)
            for item in items:
                if item in without or not self.rules.may_get(item, given, others):
                    tally.wrong.append(f"item {item} for {given}, without {others} and {without}")
            if len(set(items)) != len(items):
                tally.wrong.append(f"{items} holds an item twice")
        if rng.random() >= COUNTED:
            return
        # Counting what a request may get reads every item.
        tally.counted += 1
        user = int(rng.integers(0, len(users)))
        given, others = asked[user]
        due = sum(
            item not in excluded[user] and self.rules.may_get(item, given, others) for item in self.rules.rows
        )
        if found.valid[user] != min(K, due):
            tally.short.append(f"{found.valid[user]} items of {min(K, due)} for {given}")

    def _attributes(self, items: Sequence[int]) -> ItemAttributes:
        return ItemAttributes.from_rows(self.schema, [self.rules.rows[item] for item in items])


def run_filtering(run_dir: Path, queries: int, seed: int, users: Encoded, progress: bool = True) -> Tally:
    """At least ``queries`` requests by ``users`` in turn, a change of the items before every batch."""
    rng = np.random.default_rng(seed)
    world, tally = _World(open_export(run_dir), rng), Tally()
    with tqdm(total=queries, desc="requests", unit="request", unit_scale=True, disable=not progress) as bar:
        while tally.queries < queries:
            world.change(tally)
            rows = rng.integers(0, len(users), size=USERS)
            world.ask(Encoded(users.dense[rows], users.ids[rows]), tally)
            bar.update(USERS)
    return tally


def report(tally: Tally, command: str, name: str, seed: int, results: Path) -> Path:
    """Write filtering-NAME.json and .md under ``results``; returns the .md."""
    results.mkdir(parents=True, exist_ok=True)
    stem = results / f"filtering-{name}"
    found = {
        "command": command, "commit": commit(), "machine": machine(), "date": date.today().isoformat(), "seed": seed,
        "queries": tally.queries, "items_returned": tally.items, "updates": tally.updates, "deletes": tally.deletes,
        "compactions": tally.compactions, "counted": tally.counted,
        "ineligible_returned": len(tally.wrong), "short": len(tally.short),
        "examples": (tally.wrong + tally.short)[:10],
    }  # fmt: skip
    write_json(stem.with_suffix(".json"), found)
    text = "\n".join([
        f"# Items that must not be returned: {name}",
        "",
        f"`{command}` at commit {found['commit']}, {found['machine']}, {found['date']}, seed {seed}.",
        "",
        f"{tally.queries:,} requests with random context and exclusions, over {tally.updates:,} upserts, "
        f"{tally.deletes:,} deletes and {tally.compactions:,} compactions; {tally.items:,} items came back.",
        "",
        f"- deleted, ineligible, excluded or repeated items among them: **{len(tally.wrong)}**",
        f"- requests that got fewer than min({K}, all they may get), of {tally.counted:,} that were counted: "
        f"**{len(tally.short)}**",
    ])  # fmt: skip
    write_bytes(stem.with_suffix(".md"), (text + "\n").encode())
    return stem.with_suffix(".md")
