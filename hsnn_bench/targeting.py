"""What targeting costs and what it finds: filtered searches beside an unfiltered one, over one large corpus.

Every request is searched with each filter in turn, the next request after that, so a machine that slows down slows all
alike. Recall is against the exhaustive top K of the items that the filter lets through, by the same scores.

Filters of a wanted selectivity let an item through by a draw of its own, so they say nothing of what the user likes;
those of the world's own attributes do. Times include making the filter of the request.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from export.exported import open_export
from hsnn_cli.provenance import commit, machine
from hsnn_cli.tables import table
from hsnn_core.bundle import Bundle
from hsnn_core.eligibility import Context
from hsnn_core.features import Encoded
from hsnn_core.files import write_bytes
from hsnn_core.item_attributes import ItemAttributes, Sets
from hsnn_core.keys import KEY_MISSING, stable_key
from hsnn_core.live_attributes import AttributeState, GrowingAttributes
from hsnn_core.live_index import LiveState
from hsnn_core.onnx_runner import OnnxRunner
from hsnn_core.schema import Schema
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import search
from hsnn_core.targeting import TargetingFilter
from hsnn_train.checkpoint import load_run, write_json

from .oracle import item_scores, top_positions
from .orchestrator import Spread, Wire
from .plots import targeting_of_selectivities
from .scale import build

#: shares of the items that the drawn filters let through
SELECTIVITIES = (1.0, 0.5, 0.1, 0.01, 0.001)
PLACEMENT = "feed"


class Variant:
    """A filter of the bench: ``attributes`` of the items, and the context of a request by its number."""

    def __init__(self, name: str, attributes: AttributeState | None, contexts: Sequence[Context]) -> None:
        self.name, self.attributes, self.contexts = name, attributes, contexts

    def filter(self, state: LiveState, number: int) -> TargetingFilter | None:
        """The filter of a request, as the orchestrator makes it; None without one."""
        if self.attributes is None:
            return None
        nobody = [np.empty(0, dtype=np.int64)]
        return TargetingFilter(state.view, 1, self.attributes, self.contexts[number], nobody)

    def mask(self, number: int, items: int) -> np.ndarray:
        """(V,) bool: the items that it lets through."""
        if self.attributes is None:
            return np.ones(items, dtype=bool)
        bits = self.attributes.base.matching(self.contexts[number], 0)
        return np.unpackbits(bits, bitorder="little")[:items].astype(bool)


def measure(
    run_dir: str | Path,
    items: int,
    wire: Wire,
    widths: Sequence[int],
    work: Path,
    k: int,
    now: float,
    progress: bool = True,
) -> dict[str, Any]:
    """Build the corpus of ``items`` ads under ``work`` unless it is there, and measure. ``wire``: the raw wire tensors
    of R requests; ``now``: the clock of the context, seconds. Returns plain JSON values."""
    run, exported = load_run(run_dir), open_export(Path(run_dir))
    build(run, exported, items, work, progress)
    bundle = Bundle.open(work / f"bundle-{items}", verify=False)
    runner = OnnxRunner(
        exported.path / exported.graphs[0].file, [exported.path / graph.file for graph in exported.graphs[2:]]
    )
    users = run.transform.encode_users(dict(wire))
    variants = [Variant("none", None, ()), *_variants(bundle, wire, len(users), now)]
    state = LiveState.of(bundle.corpus, None, 0)
    scorer = bundle.scorer(runner).over(state.view, state.i2if, state.embeddings)
    rows = _rows(bundle, state, scorer, users, variants, widths, k, progress)
    return {"items": items, "k": k, "widths": list(widths), "requests": len(users), "filters": rows}


def _variants(bundle: Bundle, wire: Wire, users: int, now: float) -> list[Variant]:
    """The world's own attributes, and drawn ones of every selectivity."""
    schema, attributes = bundle.schema, bundle.attributes
    if attributes is None:
        raise ValueError(f"{bundle.path}: the schema has no eligibility section, expected one to measure")
    own = GrowingAttributes(bundle.index, attributes).state
    placement = np.array([[stable_key(PLACEMENT), KEY_MISSING]], dtype=np.int64)
    contexts = [
        Context.from_wire(
            schema,
            {"context_country": wire["country"][row : row + 1], "context_placement": placement},
            1,
            now,
        )
        for row in range(users)
    ]
    found = [Variant("the world's own", own, contexts)]
    keys = np.random.default_rng(1).random(bundle.index.items)
    for share in SELECTIVITIES:
        drawn = GrowingAttributes(bundle.index, _drawn(schema, keys < share)).state
        asked = {"context_country": np.array([[1]], dtype=np.int64)}
        context = Context.from_wire(schema, asked, 1, now)
        found.append(Variant(f"drawn, {share:.1%}", drawn, [context] * users))
    return found


def _drawn(schema: Schema, passes: np.ndarray) -> ItemAttributes:
    """Attributes of V items of which those with ``passes`` (V,) bool are for country 1, the others for country 2."""
    count = len(passes)
    every = np.arange(count + 1, dtype=np.int64)
    open_to_all = Sets(np.zeros(count + 1, np.int64), np.empty(0, np.int64))
    by_kind: Mapping[str, list[str]] = {
        kind: [a.name for a in schema.eligibility if a.kind == kind]
        for kind in ("set", "range", "flag", "key")
    }
    sets = dict.fromkeys(by_kind["set"], open_to_all)
    sets["country"] = Sets(every, np.where(passes, 1, 2).astype(np.int64))
    unbounded = np.tile(np.array([-np.inf, np.inf]), (count, 1))
    return ItemAttributes(
        schema,
        sets,
        dict.fromkeys(by_kind["range"], unbounded),
        dict.fromkeys(by_kind["flag"], np.zeros(count, dtype=bool)),
        dict.fromkeys(by_kind["key"], np.full(count, KEY_MISSING)),
        np.ones(count, dtype=np.float32),
    )


def _rows(
    bundle: Bundle,
    state: LiveState,
    scorer: LayerScorer,
    users: Encoded,
    variants: Sequence[Variant],
    widths: Sequence[int],
    k: int,
    progress: bool,
) -> list[dict[str, Any]]:
    requests, layers = len(users), bundle.index.layers
    rank = bundle.schema.rank
    seconds = np.empty((len(variants), requests))
    making = np.empty_like(seconds)
    recall, passed = np.empty_like(seconds), np.empty_like(seconds)
    candidates = np.empty((len(variants), requests, layers))
    returned = np.empty_like(seconds)
    for number in tqdm(range(requests), desc="measure", unit="request", disable=not progress):
        user = Encoded(users.dense[number : number + 1], users.ids[number : number + 1])
        scores = item_scores(bundle.index, scorer, user, rank)
        for place, variant in enumerate(variants):
            variant.filter(state, number)  # what is cached between requests of one context is
            began = time.perf_counter()
            allowed = variant.filter(state, number)
            made = time.perf_counter()
            found = search(state.view, scorer, user, widths, k, rank, allowed)
            seconds[place, number] = time.perf_counter() - began
            making[place, number] = made - began
            mask = variant.mask(number, bundle.index.items)
            best = top_positions(np.where(mask, scores, -np.inf), k)
            got = found.positions[0, : found.valid[0]]
            recall[place, number] = np.isin(best, got).mean() if len(best) else 1.0
            due = min(k, int(mask.sum()))
            returned[place, number] = len(got) / due if due else 1.0
            passed[place, number] = mask.mean()
            candidates[place, number] = [layer.candidates[0] for layer in found.layers]
            if not mask[got].all():
                raise AssertionError(
                    f"{variant.name}, request {number}: an item came back that does not match"
                )
    return [
        {
            "filter": variant.name,
            "passed": float(passed[place].mean()),
            "recall": float(recall[place].mean()),
            "returned": float(returned[place].min()),
            "microseconds": asdict(Spread.of(1e6 * seconds[place])),
            "filter_microseconds": float(1e6 * np.median(making[place])),
            "ratio": float(np.median(seconds[place] / seconds[0])),
            "candidates": candidates[place].mean(axis=0).tolist(),
        }
        for place, variant in enumerate(variants)
    ]


def report(found: dict[str, Any], command: str, name: str, results: Path) -> Path:
    """Write targeting-NAME.json, .md and .png under ``results``; returns the .md."""
    results.mkdir(parents=True, exist_ok=True)
    found = {
        "command": command, "commit": commit(), "machine": machine(), "date": date.today().isoformat(),
        "simulated": True, **found,
    }  # fmt: skip
    stem = results / f"targeting-{name}"
    write_json(stem.with_suffix(".json"), found)
    write_bytes(stem.with_suffix(".md"), (page(found, name) + "\n").encode())
    targeting_of_selectivities(found, stem.with_suffix(".png"))
    return stem.with_suffix(".md")


def page(found: dict[str, Any], name: str) -> str:
    """The report as Markdown."""
    rows = [
        [row["filter"], f"{row['passed']:.2%}", f"{row['recall']:.4f}", f"{row['returned']:.3f}",
         Spread(**row["microseconds"]).text(), f"{row['ratio']:.2f}", f"{row['filter_microseconds']:,.0f}",
         ", ".join(f"{count:,.0f}" for count in row["candidates"])]
        for row in found["filters"]
    ]  # fmt: skip
    return "\n".join([
        f"# Targeting over {found['items']:,} items: {name}",
        "",
        "Simulated data.",
        "",
        f"`{found['command']}` at commit {found['commit']}, {found['machine']}, {found['date']}, one thread. K = "
        f"{found['k']}, widths {', '.join(map(str, found['widths']))}, {found['requests']} requests, each through all "
        "filters before the next.",
        "",
        "```",
        table(["filter", "items passed", "recall", "returned", "microseconds, median (p10 to p90)", "ratio",
               "of these making it", "candidates per layer"], rows),
        "```",
        "",
        f"![recall and cost over selectivity](targeting-{name}.png)",
        "",
        "- Recall: of the exhaustive top K among the items that pass, by the same scores. Returned: the least share, "
        "over the requests, of min(K, items that pass) that came back.",
        "- Ratio: the median over requests of this filter's time to the unfiltered time of the same request.",
        "- The world's own attributes are countries, placements, running times, a paused flag and an advertiser. A "
        "drawn filter has the same five, of which one decides, by a draw per item.",
    ])  # fmt: skip
