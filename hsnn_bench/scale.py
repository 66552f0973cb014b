"""Cost over the size of the corpus: one model, corpora of a hundred thousand to ten million ads, recall beside latency.

Every corpus is built by the exported item tower and the trained codebooks, file by file (`export.stream_index`),
written as a bundle, opened again as a server opens it, given the widths that reach the wanted recall (`width_search`),
and searched. At the end one request goes through all corpora before the next, so a machine that slows down slows all
alike.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from export.build_index import OnnxItemTower
from export.compaction import smoke_over
from export.exported import BUNDLE_DIR, EXPORT_FILE, Exported, open_export
from export.stream_index import BATCH, read_items, stream_index
from hsnn_cli.tables import table
from hsnn_core.bundle import Bundle, write_bundle
from hsnn_core.corpus import Corpus
from hsnn_core.features import Encoded
from hsnn_core.onnx_runner import OnnxRunner
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import search
from hsnn_train.checkpoint import Run, load_run, write_json

from .corpora import corpus_files
from .orchestrator import Spread, Wire
from .plots import cost_over_size
from .report_files import write_report
from .width_search import find

TOWER_BATCHES = 40  # of the bare item tower, to compare the build's rate with


def build(
    run: Run, exported: Exported, items: int, work: Path, progress: bool = True, ads: Path | None = None
) -> dict[str, Any]:
    """Build the bundle of ``items`` ads under ``work`` unless it is there; returns what was measured on the way, as it
    was when the bundle was built. ``ads``: where the encoded ads lie (default: under ``work``)."""
    folder = work / f"bundle-{items}"
    kept = work / f"built-{items}.json"
    if folder.exists() and kept.exists():
        return _read(kept)
    shutil.rmtree(folder, ignore_errors=True)
    files = corpus_files(run, items, work / "items" if ads is None else ads, progress)
    staged_before = len(list((work / "tower").glob("*"))) if (work / "tower").exists() else 0
    began = time.perf_counter()
    corpus = stream_index(
        run.schema, run.transform, files, exported.path / "item_tower.onnx", run.model.codebooks(),
        run.model.codeword_projection(), work / "tower", progress,
    )  # fmt: skip
    built = time.perf_counter() - began
    began = time.perf_counter()
    settings = run.recipe.search
    trained = Bundle.open(exported.bundle, verify=False)
    corpus = corpus.with_embeddings(trained.embeddings[-1].dtype)
    write_bundle(
        folder, run.schema, run.transform, corpus, smoke_over(trained, exported, corpus),
        widths=settings.widths, k=settings.k, max_k=settings.max_k, buckets=[[] for _ in corpus.embeddings],
        engine=exported.engine.name, models=trained.manifest["models"],
        item_tower=exported.path / "item_tower.onnx",
    )  # fmt: skip
    found = {
        "seconds": built,
        "files_staged_before": staged_before,
        "write_seconds": time.perf_counter() - began,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "index_bytes_per_item": index_bytes(corpus) / items,
        "bundle_bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }
    write_json(kept, found)
    return found


def export_over(exported: Exported, items: int, work: Path) -> Path:
    """An export folder of the networks over the corpus of ``items`` ads that `build` made, to be published."""
    folder = work / f"export-{items}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / BUNDLE_DIR).mkdir(parents=True)
    for path in exported.path.iterdir():
        if path.is_file() and path.name != EXPORT_FILE:
            os.link(path, folder / path.name)
    for path in (work / f"bundle-{items}").iterdir():
        os.link(path, folder / BUNDLE_DIR / path.name)
    replace(exported, path=folder).write()
    return folder


def index_bytes(corpus: Corpus) -> int:
    """Bytes of everything in the index file that is not an item's own features or embedding: ids, order, tree, nodes'
    embeddings, codebooks, and the table of positions by id."""
    total = sum(array.nbytes for array in corpus.index.to_arrays().values())
    total += sum(table.nbytes for table in (*corpus.embeddings[:-1], *corpus.codebooks))
    return total + (corpus.i2if.position_of_id.positions().nbytes if corpus.i2if is not None else 0)


def record_bytes(corpus: Corpus) -> int:
    """Bytes of what only changes of the items read, beside their features: distances, and positions by id."""
    records = corpus.records
    return 0 if records is None else records.distances.nbytes + records.by_id.nbytes


def rates(run: Run, exported: Exported, files: Sequence[Path]) -> dict[str, float]:
    """Items per second of the bare item tower as published, and of the build's pass over the same items, interleaved
    batch by batch."""
    from hsnn_core.index import assign_paths

    path = exported.path / "item_tower.onnx"
    last = f"item_l{run.model.layers}"
    whole, lean = OnnxItemTower(path), OnnxItemTower(path, [last, "index"])
    items, _ = read_items(files[0])
    codebooks, seconds = run.model.codebooks(), np.zeros(2)
    batches = min(TOWER_BATCHES, max(1, len(items) // BATCH))
    for number in range(batches + 1):
        part = slice(number % batches * BATCH, (number % batches + 1) * BATCH)
        inputs = Encoded(items.dense[part], items.ids[part]).tensors("item")
        began = time.perf_counter()
        whole(inputs)
        middle = time.perf_counter()
        assign_paths(codebooks, lean(inputs)["index"])
        if number:  # the first one warms up
            seconds += [middle - began, time.perf_counter() - middle]
    done = min(batches * BATCH, len(items))
    return {"tower_items_per_second": done / seconds[0], "build_items_per_second": done / seconds[1]}


def load_seconds(folder: Path) -> float:
    """Seconds to open a bundle and verify every byte of it, in a process of its own."""
    program = (
        "import sys, time; from hsnn_core.bundle import Bundle; began = time.perf_counter(); "
        "Bundle.open(sys.argv[1]); print(time.perf_counter() - began)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def run_scale(
    run_dir: str | Path,
    sizes: Sequence[int],
    wire: Wire,
    work: Path,
    *,
    k: int,
    target_recall: float,
    tuned_on: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Build, tune and measure every size. ``wire``: R requests' raw wire tensors; widths are tuned on the first
    ``tuned_on`` of them. Returns plain JSON values."""
    run, exported = load_run(run_dir), open_export(Path(run_dir))
    work.mkdir(parents=True, exist_ok=True)
    users = run.transform.encode_users(dict(wire))
    few = Encoded(users.dense[:tuned_on], users.ids[:tuned_on])
    runner = OnnxRunner(
        exported.path / exported.graphs[0].file, [exported.path / graph.file for graph in exported.graphs[2:]]
    )
    rows, bundles = [], []
    for items in sizes:
        built = build(run, exported, items, work, progress)
        folder = work / f"bundle-{items}"
        bundle = Bundle.open(folder, verify=False)
        bundles.append(bundle)
        chosen, points = find(
            bundle.index, bundle.scorer(runner), few, min(k, items), run.schema.rank, target_recall,
            progress=progress,
        )  # fmt: skip
        rows.append({
            "items": items,
            "nodes": [bundle.index.nodes(layer) for layer in range(1, bundle.index.layers + 1)],
            "widths": list(chosen.widths),
            "search_recall": chosen.recall,
            "candidates": list(chosen.candidates),
            "points": [asdict(point) for point in points],
            "build": built,
            "load_seconds": load_seconds(folder),
            "record_bytes_per_item": record_bytes(bundle.corpus) / items,
            "embeddings": str(bundle.embeddings[-1].dtype),
        })  # fmt: skip
    scorers = [bundle.scorer(runner) for bundle in bundles]
    for row, spread in zip(rows, _latencies(bundles, scorers, rows, users, k, progress)):
        row["microseconds"] = asdict(spread)
    files = corpus_files(run, sizes[0], work / "items", progress=False)
    return {"k": k, "target_recall": target_recall, "requests": len(users), "tuned_on": len(few),
            "rates": rates(run, exported, files), "sizes": rows}  # fmt: skip


def _latencies(
    bundles: Sequence[Bundle],
    scorers: Sequence[LayerScorer],
    rows: Sequence[dict[str, Any]],
    users: Encoded,
    k: int,
    progress: bool,
) -> list[Spread]:
    taken: list[list[float]] = [[] for _ in bundles]
    for number in tqdm(range(-2, len(users)), desc="measure", unit="request", disable=not progress):
        place = max(number, 0)
        user = Encoded(users.dense[place : place + 1], users.ids[place : place + 1])
        for bundle, scorer, row, times in zip(bundles, scorers, rows, taken):
            began = time.perf_counter()
            search(bundle.index, scorer, user, row["widths"], min(k, row["items"]), bundle.schema.rank)
            if number >= 0:
                times.append(1e6 * (time.perf_counter() - began))
    return [Spread.of(times) for times in taken]


def report(found: dict[str, Any], command: str, name: str, results: Path) -> Path:
    """Write scale-NAME.json, .md and .png under ``results``; returns the .md."""
    return write_report(
        found, results / f"scale-{name}", command, True, lambda shown: page(shown, name), cost_over_size
    )


def page(found: dict[str, Any], name: str) -> str:
    """The report as Markdown."""
    base = found["sizes"][0]["microseconds"]["median"]
    cost, built = [], []
    for row in found["sizes"]:
        spread, build_ = Spread(**row["microseconds"]), row["build"]
        scored = ", ".join(f"{count:,.0f}" for count in row["candidates"])
        cost.append([f"{row['items']:,}", ", ".join(f"{n:,}" for n in row["nodes"][:-1]),
                     ", ".join(map(str, row["widths"])), scored, f"{row['search_recall']:.4f}", spread.text(),
                     f"{spread.median / base:.2f}"])  # fmt: skip
        built.append([f"{row['items']:,}", f"{build_['seconds']:.0f}", str(build_["files_staged_before"]),
                      f"{build_['peak_rss_bytes'] / 2**30:.2f}", f"{build_['index_bytes_per_item']:.1f}",
                      f"{row['record_bytes_per_item']:.1f}", f"{build_['bundle_bytes'] / 2**30:.2f}",
                      f"{row['load_seconds']:.1f}"])  # fmt: skip
    rate = found["rates"]
    share = rate["build_items_per_second"] / rate["tower_items_per_second"]
    return "\n".join([
        f"# Cost over the size of the corpus: {name}",
        "",
        "Simulated data.",
        "",
        f"`{found['command']}` at commit {found['commit']}, {found['machine']}, {found['date']}, one "
        f"thread per search. K = {found['k']}, widths: the cheapest measured ones with search recall of at least "
        f"{found['target_recall']} of the exhaustive top K, tuned on {found['tuned_on']} requests; latency of the bare "
        f"loop over {found['requests']} requests, every one through all corpora before the next.",
        "",
        "```",
        table(["items", "nodes", "widths", "scored", "recall", "microseconds, median (p10 to p90)", "ratio"], cost),
        "```",
        "",
        "Building, streamed. Seconds are of the item tower, assignment and ordering, less the files that were staged "
        "before; bytes per item are the index's beyond the items' own features and embeddings (which are "
        f"{found['sizes'][0]['embeddings']}), and those of the records, which only changes of the items read. Loading "
        "verifies every byte.",
        "",
        "```",
        table(["items", "seconds", "files staged before", "peak GiB", "bytes per item", "of records", "bundle GiB",
               "load s"], built),
        "```",
        "",
        f"Item tower as published in ONNX Runtime: {rate['tower_items_per_second']:,.0f} items/s; the build's pass "
        "(the outputs it needs, and the assignment): "
        f"{rate['build_items_per_second']:,.0f} items/s, {share:.2f} of it.",
    ])  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(path.read_text())
    return found
