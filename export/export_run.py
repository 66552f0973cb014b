"""From a trained run to what is published: graphs, index, smoke request, and the gates that all of it must
pass."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from export.build_index import OnnxItemTower, build_index, candidate_buckets
from export.engines import DEFAULT_ENGINE, Engine, engine_named
from export.exported import BUNDLE_DIR, Exported, ExportedGraph, exported_graph
from export.graphs import EMBEDDINGS, ServingGraph, ServingModel, example_inputs, serving_graphs
from export.onnx_files import export_graph
from export.parity import ParityReport, ParityRow, graph_rows, manifest_rows, search_rows
from export.pbtxt import INDEX
from export.sample_users import padded_at_the_end, sample_users
from hsnn_core.bundle import NO_LOG, Bundle, LogPosition, Smoke, write_bundle
from hsnn_core.corpus import Corpus
from hsnn_core.errors import PublishError
from hsnn_core.features import Encoded, FeatureTransform
from hsnn_core.item_attributes import ItemAttributes
from hsnn_core.item_log import LogReader
from hsnn_core.onnx_runner import OnnxRunner
from hsnn_core.schema import Schema
from hsnn_core.scorer import LayerScorer, Runner
from hsnn_core.search import search

if TYPE_CHECKING:
    from hsnn_train.checkpoint import Run

PARITY_USERS = 64
SMOKE_USERS = 4
_PARITY_ITEMS = 256
_PARITY_PAIRS = 4096


@dataclass(frozen=True)
class Source:
    """What an export needs of a trained model. `items` (V rows) and `item_ids` (V,) are the corpus, `attributes` its
    eligibility and bids by row, None where the schema declares none; `paths` (V, N-1) replace the codebooks where the
    hierarchy came with the data."""

    schema: Schema
    transform: FeatureTransform
    model: ServingModel
    runner: Runner
    items: Encoded
    item_ids: np.ndarray
    codebooks: Sequence[np.ndarray]
    codeword_projection: Sequence[tuple[np.ndarray, np.ndarray]]
    paths: np.ndarray | None
    widths: tuple[int, ...]
    k: int
    max_k: int
    attributes: ItemAttributes | None = None
    log: LogPosition = NO_LOG


def export_run(
    run_dir: str | Path,
    engine: str = DEFAULT_ENGINE,
    targets: Sequence[str] = (),
    users: Mapping[str, np.ndarray] | None = None,
    progress: bool = True,
    contains_log: str | Path | None = None,
    embeddings: str = "float32",
) -> Exported:
    """Export a trained run into its `export` folder, replacing an earlier export only once all gates passed.

    `engine`: see `engines.ENGINES`; `targets`: compute capabilities for tensorrt-rtx; `users`: raw wire
    tensors of real users for the gates and the smoke request (default: real keys in random combinations);
    `contains_log`: an item log whose updates, all of them by now, are in the run's item table already; `embeddings`:
    float32 or float16, how those of nodes and items are stored.

    Raises PublishError naming graph, output, difference and tolerance when a gate fails, LogError when the log is of
    another schema or cannot be read."""
    from hsnn_train.checkpoint import load_run

    source = source_of(load_run(run_dir))
    if contains_log is not None:
        source = dataclasses.replace(source, log=_newest(contains_log, source.schema))
    return export_source(source, Path(run_dir) / "export", engine, targets, users, progress, embeddings)


def source_of(run: Run) -> Source:
    """What an export needs of a loaded run; it sees what becomes of `run.model`."""
    from hsnn_train.runner import TorchRunner

    model, settings = run.model, run.recipe.search
    return Source(
        schema=run.schema,
        transform=run.transform,
        model=model,
        runner=TorchRunner(model),
        items=run.items,
        item_ids=run.item_ids,
        codebooks=model.codebooks(),
        codeword_projection=model.codeword_projection(),
        paths=run.index.paths if model.index.method == "hierarchy" else None,
        widths=settings.widths[: model.layers - 1],
        k=min(settings.k, settings.max_k),
        max_k=settings.max_k,
        attributes=run.attributes,
    )


def _newest(log: str | Path, schema: Schema) -> LogPosition:
    with LogReader(log, schema.hash) as reader:
        return LogPosition(reader.position(), reader.identity())


def export_source(
    source: Source,
    directory: Path,
    engine: str = DEFAULT_ENGINE,
    targets: Sequence[str] = (),
    users: Mapping[str, np.ndarray] | None = None,
    progress: bool = True,
    embeddings: str = "float32",
) -> Exported:
    """`export_run` for a model in memory, into `directory`."""
    chosen = engine_named(engine)
    if embeddings not in EMBEDDINGS:
        raise PublishError(f"embeddings {embeddings!r} are unknown, expected one of: {', '.join(EMBEDDINGS)}")
    if chosen.library is not None and embeddings != "float32":
        raise PublishError(
            f"embeddings {embeddings} with engine {engine}: expected float32, plans are built and checked for these "
            f"alone; leave --embeddings out, or use engine {DEFAULT_ENGINE}"
        )
    aside = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        exported = _export(source, aside, chosen, targets, users, progress, embeddings)
        _replace(aside, directory)
    except OSError as error:
        raise PublishError(
            f"{directory}: {error}; nothing was exported, an earlier export is kept"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return dataclasses.replace(exported, path=directory)


def _export(
    source: Source,
    directory: Path,
    engine: Engine,
    targets: Sequence[str],
    users: Mapping[str, np.ndarray] | None,
    progress: bool,
    embeddings: str,
) -> Exported:
    graphs = serving_graphs(source.model, EMBEDDINGS[embeddings])
    files = [directory / f"{graph.signature.stem}.onnx" for graph in graphs]
    for graph, file in zip(tqdm(graphs, desc="graphs", disable=not progress), files):
        export_graph(graph, file)

    corpus = build_index(
        source.schema, source.transform, source.items, source.item_ids, OnnxItemTower(files[1]),
        source.codebooks, source.codeword_projection, source.paths, progress,
    ).with_attributes(source.attributes).with_embeddings(np.dtype(embeddings))  # fmt: skip
    buckets: list[list[int]] = [[] for _ in files[2:]]  # any candidate count: nothing to pad for
    if engine.library is not None:
        codewords = [len(codebook) for codebook in source.codebooks]
        buckets = candidate_buckets(corpus.index, source.widths, codewords)
    built = _build_engine(graphs, files, engine, targets, buckets, progress)

    raw = dict(users) if users else sample_users(source.schema, source.transform, PARITY_USERS, seed=1)
    onnx = LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, OnnxRunner(files[0], files[2:]), buckets)
    write_bundle(
        directory / BUNDLE_DIR, source.schema, source.transform, corpus, _smoke(source, corpus, onnx, raw),
        widths=source.widths, k=source.k, max_k=source.max_k, buckets=buckets, engine=engine.name,
        models={
            "user_tower": graphs[0].signature.model_name,
            "item_tower": graphs[1].signature.model_name,
            "scorers": [graph.signature.model_name for graph in graphs[2:]],
            "index": INDEX,
        },
        item_tower=files[1],
        log=source.log,
    )  # fmt: skip
    report = ParityReport(tuple(_gates(source, corpus, graphs, files, onnx, raw, directory / BUNDLE_DIR)))
    report.require()
    exported = Exported(directory, engine, built, report)
    exported.write()
    return exported


def _build_engine(
    graphs: Sequence[ServingGraph],
    files: Sequence[Path],
    engine: Engine,
    targets: Sequence[str],
    buckets: Sequence[Sequence[int]],
    progress: bool,
) -> tuple[ExportedGraph, ...]:
    built = []
    todo = list(zip(graphs, files, [(), (), *buckets]))
    for graph, file, sizes in tqdm(todo, desc=engine.name, disable=not progress or engine.library is None):
        target = file.with_name(engine.file_for(file.stem))
        engine.build(file, target, graph.signature, sizes, targets)
        built.append(exported_graph(target, graph.signature, sizes))
    return tuple(built)


def _smoke(source: Source, corpus: Corpus, scorer: LayerScorer, raw: Mapping[str, np.ndarray]) -> Smoke:
    users = {name: value[:SMOKE_USERS] for name, value in raw.items()}
    encoded = source.transform.encode_users(users)
    found = search(corpus.index, scorer, encoded, source.widths, source.k, source.schema.rank)
    return Smoke(users, found.item_ids, found.probabilities)


def _gates(
    source: Source,
    corpus: Corpus,
    graphs: Sequence[ServingGraph],
    files: Sequence[Path],
    onnx: LayerScorer,
    raw: Mapping[str, np.ndarray],
    bundle: Path,
) -> list[ParityRow]:
    users = source.transform.encode_users({name: value[:PARITY_USERS] for name, value in raw.items()})
    recorder = _Recorder(source.runner)
    torch = LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, recorder)
    widths, rank = source.widths, source.schema.rank
    searched = search_rows(corpus.index, torch, onnx, users, widths, source.k, rank)
    items = Encoded(source.items.dense[:_PARITY_ITEMS], source.items.ids[:_PARITY_ITEMS])
    real = {"user_tower": users.tensors("user"), "item_tower": items.tensors("item"), **recorder.inputs}
    rng = np.random.default_rng(0)
    limits = id_limits(source.schema, source.transform)
    rows = []
    for graph, file in zip(graphs, files):
        cases = {}
        for batch, candidates in ((1, 1), (5, 33)):
            drawn = example_inputs(graph.signature, batch, candidates, rng, limits)
            cases[f"random {batch}x{candidates}"] = padded_at_the_end(source.schema, drawn)
        cases["real"] = real[graph.signature.stem]
        rows += graph_rows(graph, file, cases)
    signatures = [graph.signature for graph in graphs]
    return [*rows, *searched, *manifest_rows(Bundle.open(bundle), signatures)]


class _Recorder:
    """A runner that keeps one real input of every scorer, cut to a size that is quick to compare."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.inputs: dict[str, dict[str, np.ndarray]] = {}

    def user_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._runner.user_tower(inputs)

    def score(self, layer: int, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        most = max(1, _PARITY_PAIRS // len(inputs["user"]))
        cut = {name: value if value.ndim == 2 else value[:, :most] for name, value in inputs.items()}
        self.inputs.setdefault(f"scorer_l{layer}", cut)
        return self._runner.score(layer, inputs)


def id_limits(schema: Schema, transform: FeatureTransform) -> dict[str, np.ndarray]:
    """Cardinality per column of user_ids, item_ids and cross_ids: what random ids must stay below."""
    limits = {
        f"{owner}_ids": np.concatenate(
            [
                np.full(s.stop - s.start, transform.cardinality(s.feature.space))
                for s in schema.layout(owner).slots
            ]
            or [np.empty(0, np.int64)]
        )
        for owner in ("user", "item")
    }
    crossed = [
        np.full(spec.matches, transform.cardinality(schema.feature(spec.item).space))
        for spec in schema.interactions
    ]
    return {**limits, "cross_ids": np.concatenate(crossed or [np.empty(0, np.int64)])}


def _replace(aside: Path, directory: Path) -> None:
    """Put the finished folder in place of an earlier one; only a crash between two renames leaves neither."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.rename(directory, old)
    try:
        os.rename(aside, directory)
    except OSError:
        if old.exists():
            os.rename(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
