"""Tuning with Optuna on validation requests; the same budget for every method.

A method's study is a file, `runs/tune/<data>/<method>.db`, that a later call goes on with; the trials are those of
an uninterrupted one, because trial n is sampled by a sampler seeded with (seed, n). The best parameters of all
methods of a data set stand in one file, `docs/results/tuned-<data>.json`.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from tqdm import tqdm

from hsnn_cli.commands_training import load_data
from hsnn_cli.provenance import commit, machine
from hsnn_core.errors import DataError, HsnnError
from hsnn_train.checkpoint import write_json
from hsnn_train.data.dataset import Dataset
from hsnn_train.recipe import Recipe, load_recipe
from hsnn_train.trainer import Interrupted

from . import ours
from .implicit_models import MODELS
from .requests import load_requests, measure, metric
from .spaces import Choice, Knob, Method, Real, around, method, methods_for

RESULTS = Path("docs/results")
STARTUP = 5  # trials drawn at random before TPE has something to go by

#: parameters -> figure to maximise; raises HsnnError for a trial that came to nothing
Objective = Callable[[dict[str, Any]], float]


class Best(NamedTuple):
    """The best trial of a study. ``trials``: those done, failed ones included; ``minutes`` they took."""

    params: dict[str, Any]
    value: float
    trials: int
    failed: int
    minutes: float


def tune(
    space: Method, objective: Objective, storage: Path, name: str, seed: int, trials: int, minutes: float
) -> Best:
    """Go on with the study ``name`` in the file ``storage`` until it has ``trials`` trials, or they took ``minutes``.

    The trial that runs when the minutes are over is finished. One that raises HsnnError (a training that
    diverged) or gives no finite number counts as failed. Raises DataError when not one trial succeeded.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{storage}", study_name=name, direction="maximize", load_if_exists=True
    )
    if not space.knobs:
        trials = 1  # nothing to choose
    done = _finished(study)
    with tqdm(total=trials, initial=min(len(done), trials), desc=f"tune {storage.stem}", unit="trial") as bar:
        while len(done) < trials and _minutes(done) < minutes:
            drawn = int(np.random.SeedSequence([seed, len(done)]).generate_state(1)[0])
            study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=drawn)
            if not done and not study.get_trials(states=[optuna.trial.TrialState.WAITING]):
                study.enqueue_trial(dict(space.start))
            trial = study.ask()
            params = {key: _suggest(trial, key, knob) for key, knob in space.knobs.items()}
            value = _value(objective, params, bar)
            if math.isfinite(value):
                study.tell(trial, value)
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            done = _finished(study)
            bar.update(1)
    good = [trial for trial in done if trial.state == optuna.trial.TrialState.COMPLETE]
    if not good:
        raise DataError(f"tuning: all {len(done)} trials in {storage} failed; nothing to choose from")
    best = max(good, key=lambda trial: trial.value or -math.inf)  # the first of equals
    assert best.value is not None
    return Best(dict(best.params), best.value, len(done), len(done) - len(good), _minutes(done))


def _value(objective: Objective, params: dict[str, Any], bar: Any) -> float:
    try:
        value = objective(params)
    except Interrupted:
        raise
    except HsnnError as error:
        bar.write(f"{params}: failed: {error}")
        return math.nan
    bar.write(f"{params}: {value:.4f}")
    return value


def _suggest(trial: optuna.Trial, key: str, knob: Knob) -> Any:
    if isinstance(knob, Choice):
        return trial.suggest_categorical(key, knob.values)
    if isinstance(knob, Real):
        return trial.suggest_float(key, knob.low, knob.high, log=knob.log)
    return trial.suggest_int(key, knob.low, knob.high, log=knob.log)


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials with an end; one that was interrupted has none, and its place is taken again."""
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL)
    return study.get_trials(deepcopy=False, states=states)


def _minutes(trials: Sequence[optuna.trial.FrozenTrial]) -> float:
    return sum(trial.duration.total_seconds() for trial in trials if trial.duration is not None) / 60


def implicit_objective(
    name: str, dataset: Dataset, candidates: str, limit: int, seed: int, figure: str
) -> Objective:
    """Fit a model of `implicit` on train, recommend for the validation requests."""
    requests = load_requests(dataset, "valid", candidates, limit)
    depth = metric(figure)[1]

    def objective(params: dict[str, Any]) -> float:
        model = MODELS[name]().fit(dataset, params, seed)
        found, valid = model.recommend(requests, depth)
        return measure(found, valid, requests.wanted, (figure,))[figure]

    return objective


def recipe_objective(recipe: Recipe, dataset: Dataset, folder: Path, figure: str) -> Objective:
    """Train a recipe, search for the validation requests; the run is removed."""

    def objective(params: dict[str, Any]) -> float:
        trial = ours.changed(recipe, params)
        shutil.rmtree(folder, ignore_errors=True)  # of a trial that was interrupted
        found = ours.retrieved(ours.trained(trial, dataset, folder), trial, dataset, "valid")["search"]
        shutil.rmtree(folder)
        if figure not in found:
            raise DataError(f"metric {figure}: the search reports {', '.join(found)}")
        value: float = found[figure]
        return value

    return objective


def run_tuning(
    data: str,
    methods: Sequence[str] | None = None,
    trials: int = 12,
    minutes: float = 30.0,
    seed: int = 1,
    figure: str = "recall@100",
    requests: int = 1000,
    candidates: str | None = None,
    work: Path = Path("runs/tune"),
    results: Path = RESULTS,
) -> dict[str, Any]:
    """Tune methods on a recipe's validation split; returns, and merges into ``tuned-<data>.json``, per method its
    params, value, trials, minutes, and how they were got.

    Args:
        data: a shipped recipe's name or a YAML file.
        methods: names of `spaces.METHODS`; None for those that the requests allow.
        trials, minutes: the budget of every method.
        figure: what is maximised, recall@K or ndcg@K over ``requests`` requests of valid.
        candidates: as `search.candidates` of a recipe; None: the recipe's.
        work: folder of the studies. results: folder of the file.

    Raises DataError for an unknown method or figure, SchemaError for the recipe.
    """
    metric(figure)
    recipe = load_recipe(data)
    candidates = candidates or recipe.search.candidates
    chosen = {name: method(name) for name in (methods_for(candidates) if methods is None else methods)}
    dataset = load_data(recipe)
    if not (dataset.valid.labels[:, 0] > 0).any():
        raise DataError(
            "tuning: the split has no positives in valid; change the recipe's split: to one that has, for example "
            "{by: time, fractions: [0.8, 0.1, 0.1]}, or add valid_share to one by column"
        )
    for name, space in chosen.items():
        if space.ours:
            search = {"search.requests": requests, "search.candidates": candidates}
            changes = {**space.recipe, **search, "train.seed": seed}
            own = ours.variant(recipe, changes)
            space = replace(
                around(space, own.train), recipe={**recipe.changes_for(own.model.layers), **space.recipe}
            )
            objective = recipe_objective(own, dataset, work / recipe.name / f"{name}-trial", figure)
        else:
            objective = implicit_objective(name, dataset, candidates, requests, seed, figure)
        asked = f"{figure} of {requests} requests, {candidates} items, seed {seed}"
        study = f"{asked}, space {_digest(space)}"
        best = tune(space, objective, work / recipe.name / f"{name}.db", study, seed, trials, minutes)
        entry = best._asdict() | {
            "figure": asked, "budget": {"trials": trials, "minutes": minutes}, "date": date.today().isoformat(),
            "commit": commit(), "machine": machine(),
        }  # fmt: skip
        keep(results / f"tuned-{recipe.name}.json", name, entry)
    return tuned(recipe.name, results)


def _digest(space: Method) -> str:
    """Trials of another space are another study: Optuna cannot mix them."""
    said = repr((sorted(space.knobs.items()), sorted(space.start.items()), sorted(space.recipe.items())))
    return hashlib.sha256(said.encode()).hexdigest()[:8]


def keep(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Put one method's entry into the file, beside the others'."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = _read(path)
    entries[name] = dict(entry)
    write_json(path, dict(sorted(entries.items())))


def tuned(data: str, results: Path = RESULTS) -> dict[str, Any]:
    """Entries of ``tuned-<data>.json`` by method; empty without the file. Raises DataError when it is damaged."""
    return _read(results / f"tuned-{data}.json")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}") from error
    if not isinstance(entries, dict) or not all(
        isinstance(e, dict) and "params" in e for e in entries.values()
    ):
        raise DataError(f"{path}: expected an object of methods, each with its params")
    return entries
