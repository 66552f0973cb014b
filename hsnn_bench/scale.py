"""Cost over the size of the corpus: one model, corpora of a hundred thousand to ten million ads, recall beside latency.

Every corpus is built by the exported item tower and the trained codebooks, file by file (`export.stream_index`),
written as a bundle, opened again as a server opens it, and given the fewest nodes per layer that reach the wanted
recall on validation requests (`width_search`). Then test requests are searched whole, with their encoding and filter
(`orchestrator.BareLoop`), in blocks of one corpus after another, in an order drawn for each round, so a machine that
slows down slows all alike. A request's exhaustive top K is the dear part, and is kept under the work folder.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
from hsnn_core.errors import DataError
from hsnn_core.features import Encoded
from hsnn_core.targeting import TargetingFilter
from hsnn_train.checkpoint import Run, load_run, write_json

from .corpora import PART, corpus_files
from .kept_tops import KeptTops
from .orchestrator import WARM_UP, BareLoop, Spread, Wire
from .plots import cost_over_size
from .report_files import write_report
from .width_search import Point, find, measure, narrowed

TOWER_BATCHES = 40  # of the bare item tower, to compare the build's rate with
BLOCK = 10  # requests of a corpus before another one's turn
NARROWED = 3  # points of the grid that are made narrower, the cheapest ones
_SEED = 1  # of the orders


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
    staged = [path for path in files if (work / "tower" / path.name).exists()]
    items_staged = sum(len(read_items(path)[1]) for path in staged)
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
        "files_staged_before": len(staged),
        "items_staged_before": items_staged,
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
    batch by batch, now the one first and now the other."""
    from hsnn_core.index import assign_paths

    path = exported.path / "item_tower.onnx"
    last = f"item_l{run.model.layers}"
    whole, lean = OnnxItemTower(path), OnnxItemTower(path, [last, "index"])
    items, _ = read_items(files[0])
    codebooks, seconds = run.model.codebooks(), np.zeros(2)
    sides: tuple[Callable[[dict[str, np.ndarray]], object], ...] = (
        whole,
        lambda inputs: assign_paths(codebooks, lean(inputs)["index"]),
    )
    batches = min(TOWER_BATCHES, max(1, len(items) // BATCH))
    for number in range(batches + 1):
        part = slice(number % batches * BATCH, (number % batches + 1) * BATCH)
        inputs = Encoded(items.dense[part], items.ids[part]).tensors("item")
        for side in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            sides[side](inputs)
            if number:  # the first one warms up
                seconds[side] += time.perf_counter() - began
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
    choosing: Wire,
    asked: Wire,
    work: Path,
    *,
    k: int,
    target_recall: float,
    recall_requests: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Build, tune and measure every size, ascending. Raw wire tensors: ``choosing`` of the requests that widths are
    chosen on, ``asked`` of those that are timed, the first ``recall_requests`` of which recall is taken on. Returns
    plain JSON values. Raises DataError without requests of both kinds."""
    run, exported = load_run(run_dir), open_export(Path(run_dir))
    work.mkdir(parents=True, exist_ok=True)
    tuned_on, requests = _requests(choosing), _requests(asked)
    if not tuned_on or not requests:
        raise DataError(
            f"{len(tuned_on)} requests to choose widths on and {len(requests)} to time, expected at least one of each; "
            "change the recipe's split"
        )
    rows, loops = [], []
    for items in sizes:
        built = build(run, exported, items, work, progress)
        folder = work / f"bundle-{items}"
        bundle = Bundle.open(folder, verify=False)
        loop = BareLoop(exported, bundle, bundle.manifest["widths"], min(k, items))
        tops = KeptTops(work / f"tops-{items}", exported, bundle, loop)
        chosen, points = _chosen(bundle, loop, tops, tuned_on, target_recall, progress)
        loop.widths = chosen.widths
        shares = tops.shares(requests[:recall_requests], progress)
        loops.append(loop)
        rows.append({
            "items": items,
            "nodes": [bundle.index.nodes(layer) for layer in range(1, bundle.index.layers + 1)],
            "widths": list(chosen.widths),
            "recall_chosen_on": chosen.recall,
            "search_recall": float(np.mean(shares)),
            "recall_error": float(np.std(shares, ddof=1) / len(shares) ** 0.5) if len(shares) > 1 else None,
            "points": [asdict(point) for point in points],
            "build": built,
            "load_seconds": load_seconds(folder),
            "record_bytes_per_item": record_bytes(bundle.corpus) / items,
            "embeddings": str(bundle.embeddings[-1].dtype),
        })  # fmt: skip
    taken, candidates = _measured(loops, requests, progress)
    for row, times, counts in zip(rows, taken, candidates):
        ratios = np.median(times / taken[0], axis=0)
        row["candidates"] = counts.mean(axis=0).tolist()
        row["microseconds"], row["cpu_microseconds"] = (asdict(Spread.of(side)) for side in times.T)
        row["ratio"], row["cpu_ratio"] = map(float, ratios)
    files = corpus_files(run, sizes[0], work / "items", progress=False)
    return {"k": k, "target_recall": target_recall, "requests": len(requests), "tuned_on": len(tuned_on),
            "recall_requests": len(requests[:recall_requests]), "block": BLOCK,
            "rates": rates(run, exported, files), "sizes": rows}  # fmt: skip


def _requests(wire: Wire) -> list[Wire]:
    """Each request's raw wire tensors."""
    count = len(next(iter(wire.values()))) if wire else 0
    return [{name: value[row : row + 1] for name, value in wire.items()} for row in range(count)]


def _chosen(
    bundle: Bundle, loop: BareLoop, tops: KeptTops, requests: Sequence[Wire], target: float, progress: bool
) -> tuple[Point, list[Point]]:
    """The cheapest widths that reach the ``target``, and all points that were measured: a grid of powers of two, then
    the cheapest of it with every width bisected down, beside each other."""
    users = [loop.encode(wire) for wire in requests]
    together = Encoded(np.concatenate([u.dense for u in users]), np.concatenate([u.ids for u in users]))
    best = tops.of(requests, progress)
    index, scorer, k, rank = bundle.index, loop.scorer, loop.k, bundle.schema.rank

    def new_filter() -> TargetingFilter | None:
        return loop.targeting.filter(1)

    _, points = find(index, scorer, together, k, rank, target, None, progress, best, new_filter)
    good = [point.widths for point in points if point.recall >= target][:NARROWED]
    narrow = dict.fromkeys(
        narrowed(index, scorer, together, best, k, rank, widths, target, new_filter) for widths in good
    )
    final = measure(index, scorer, together, best, k, rank, list(narrow), progress, new_filter)
    return min(final, key=lambda point: point.ms), [*points, *final]


def _measured(
    loops: Sequence[BareLoop], requests: Sequence[Wire], progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(sizes, R, 2) microseconds of whole requests, by the clock and of this thread's CPU time; (sizes, R, N)
    candidates per layer."""
    taken = np.empty((len(loops), len(requests), 2))
    candidates = np.empty((len(loops), len(requests), len(loops[0].widths) + 1))
    for loop in loops:
        for wire in requests[:WARM_UP]:
            loop.search(wire)
    rng = np.random.default_rng(_SEED)
    with tqdm(total=taken[..., 0].size, desc="measure", unit="request", disable=not progress) as bar:
        for start in range(0, len(requests), BLOCK):
            for place in rng.permutation(len(loops)):
                for number, wire in enumerate(requests[start : start + BLOCK], start):
                    clock, cpu = time.perf_counter_ns(), time.thread_time_ns()
                    found = loops[place].search(wire)
                    cpu, clock = time.thread_time_ns() - cpu, time.perf_counter_ns() - clock
                    taken[place, number] = clock / 1000, cpu / 1000
                    candidates[place, number] = [layer.candidates[0] for layer in found.layers]
                    bar.update()
    return taken, candidates


def report(found: dict[str, Any], command: str, name: str, results: Path) -> Path:
    """Write scale-NAME.json, .md and .png under ``results``; returns the .md."""
    return write_report(
        found, results / f"scale-{name}", command, True, lambda shown: page(shown, name), cost_over_size
    )


def page(found: dict[str, Any], name: str) -> str:
    """The report as Markdown."""
    cost, built = [], []
    for row in found["sizes"]:
        build_ = row["build"]
        error = "" if row["recall_error"] is None else f" ± {row['recall_error']:.4f}"
        cost.append([f"{row['items']:,}", ", ".join(f"{n:,}" for n in row["nodes"][:-1]),
                     ", ".join(map(str, row["widths"])), ", ".join(f"{count:,.0f}" for count in row["candidates"]),
                     f"{row['recall_chosen_on']:.4f}", f"{row['search_recall']:.4f}{error}",
                     Spread(**row["microseconds"]).text(), f"{row['ratio']:.2f}",
                     f"{row['cpu_microseconds']['median']:,.0f}", f"{row['cpu_ratio']:.2f}"])  # fmt: skip
        built.append([f"{row['items']:,}", f"{build_['seconds']:.0f}", str(build_["files_staged_before"]),
                      _build_rate(row["items"], build_), f"{build_['peak_rss_bytes'] / 2**30:.2f}",
                      f"{build_['index_bytes_per_item']:.1f}", f"{row['record_bytes_per_item']:.1f}",
                      f"{build_['bundle_bytes'] / 2**30:.2f}", f"{row['load_seconds']:.1f}"])  # fmt: skip
    rate = found["rates"]
    share = rate["build_items_per_second"] / rate["tower_items_per_second"]
    return "\n".join([
        f"# Cost over the size of the corpus: {name}",
        "",
        "Simulated data.",
        "",
        f"`{found['command']}` at commit {found['commit']}, {found['machine']}, {found['date']}, one "
        f"thread. K = {found['k']}. Widths: the cheapest measured ones with search recall of at least "
        f"{found['target_recall']} of the exhaustive top K on {found['tuned_on']} validation requests, each width "
        f"bisected between powers of two; recall: on {found['recall_requests']} test requests, ± the standard error. "
        f"Times are of the bare loop (encoding, filter, search) over {found['requests']} test requests, a block of "
        f"{found['block']} of one corpus and then of another, in an order drawn for each round; a ratio is the median "
        "over requests of the same request's ratio to the first corpus.",
        "",
        "```",
        table(["items", "nodes", "widths", "scored", "recall chosen on", "recall",
               "microseconds, median (p10 to p90)", "ratio", "of CPU", "ratio"], cost),
        "```",
        "",
        "Building, streamed. Seconds are of the item tower, assignment and ordering, less the files that were staged "
        "before; items/s is all of that per item that was not (≥: of a build that did not count them). Bytes per item "
        "are the index's beyond the items' own features and embeddings (which are "
        f"{found['sizes'][0]['embeddings']}), and those of the records, which only changes of the items read. Loading "
        "verifies every byte.",
        "",
        "```",
        table(["items", "seconds", "files staged before", "items/s", "peak GiB", "bytes per item", "of records",
               "bundle GiB", "load s"], built),
        "```",
        "",
        f"Item tower as published in ONNX Runtime: {rate['tower_items_per_second']:,.0f} items/s; the build's pass "
        "over the items alone (the outputs it needs, and the assignment), batch by batch beside it: "
        f"{rate['build_items_per_second']:,.0f} items/s, {share:.2f} of it.",
    ])  # fmt: skip


def _build_rate(items: int, built: Mapping[str, Any]) -> str:
    """Items per second of the whole build, those that were staged before left out."""
    bound = "items_staged_before" not in built and built["files_staged_before"] > 0
    staged = PART * built["files_staged_before"] if bound else built.get("items_staged_before", 0)
    return f"{'≥ ' if bound else ''}{(items - staged) / built['seconds']:,.0f}" if items > staged else "–"


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found
