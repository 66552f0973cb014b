"""Jobs: what a folder is named after, what is done, what runs, fails and is interrupted."""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from halves_world import SCHEMA

from hsnn_bench import workers
from hsnn_bench.jobs import (
    AFTER_TRAINING,
    DONE,
    JOB,
    LOG,
    METRICS,
    Job,
    evaluation_key,
    expected_minutes,
    key,
)
from hsnn_bench.model_flops import model_flops
from hsnn_bench.ours import changed
from hsnn_train.checkpoint import write_json
from hsnn_train.ensemble import CALIBRATION
from hsnn_train.recipe import recipe_from_dict
from hsnn_train.trainer import Trainer

RAW = {
    "schema": SCHEMA,
    "data": {"impressions": "impressions.parquet", "items": "items.parquet"},
    "model": {"layers": ["small", "two_tower_xs"], "codebooks": [4]},
    "train": {"max_steps": 4, "batch_size": 32, "negatives": 2, "unlabelled": 0},
    "search": {"widths": [2], "k": 5, "max_k": 24, "requests": 10},
}

# Stands in for hsnn_bench.worker: fails with seed 2, waits for Ctrl-C with seed 3, else is done at once.
FAKE = """
import hashlib, json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
seed = job["train"]["seed"]
if seed == 2:
    print("loading\\rloading more\\nboom: the disk is full")
    sys.exit(1)
if seed == 3:
    try:
        (folder / "started").touch()
        time.sleep(60)
    except KeyboardInterrupt:
        (folder / "stopped").touch()
        sys.exit(130)
job["base"] = os.path.relpath(job["base"], folder.parents[1])
del job["train"]["order"]
key = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:12]
(folder / "metrics.json").write_text("{}")
(folder / "done.json").write_text(json.dumps({"evaluated": key + "-CALIBRATION", "commit": "abc", "minutes": 1.0}))
""".replace("CALIBRATION", str(CALIBRATION))


@pytest.fixture
def recipe(tmp_path):
    return recipe_from_dict(RAW, "halves", tmp_path)


@pytest.fixture
def fake_worker(tmp_path, monkeypatch):
    script = tmp_path / "fake_worker.py"
    script.write_text(FAKE)
    monkeypatch.setattr(workers, "WORKER", (sys.executable, str(script)))


def jobs_of(recipe, tmp_path, *seeds):
    return [Job(changed(recipe, {"train.seed": seed}), tmp_path / "work", f"row s{seed}") for seed in seeds]


def test_the_key_is_the_same_for_the_same_recipe_and_another_for_any_change(recipe, tmp_path):
    again = recipe_from_dict(json.loads(json.dumps(recipe.to_dict())), "halves", tmp_path)
    assert key(again, tmp_path) == key(recipe, tmp_path)
    keys = {key(recipe, tmp_path)}
    for change in (
        {"train.lr": 0.1}, {"train.seed": 2}, {"train.balance": 0.0}, {"model.index": "kmeans"},
        {"model.codebooks": [5]}, {"model.layers": ["small", "small"]}, {"data.items": "other.parquet"},
        {"search.widths": [3]}, {"search.requests": 11},
    ):  # fmt: skip
        keys.add(key(changed(recipe, change), tmp_path))
    assert len(keys) == 10


def test_a_checkout_that_moves_keeps_what_it_trained(tmp_path):
    def folder(base, work, teacher=""):
        changes = {"train.teacher": teacher, "train.distil": 0.5, "train.unlabelled": 2}
        recipe = changed(recipe_from_dict(RAW, "halves", tmp_path / base), changes)
        return Job(recipe, tmp_path / work, "row").folder.name

    assert folder("here", "here/runs") == folder("there", "there/runs")
    assert folder("here", "here/runs") != folder("there", "here/runs"), "other data"
    teachers = [str(tmp_path / place / "runs" / "teacher") for place in ("here", "there")]
    assert folder("here", "here/runs", teachers[0]) == folder("there", "there/runs", teachers[1])
    assert folder("here", "here/runs", teachers[0]) != folder("here", "here/runs")


def test_what_only_evaluation_reads_keeps_the_folder_but_is_evaluated_anew(recipe, tmp_path):
    (job,) = jobs_of(recipe, tmp_path, 1)
    assert job.record() is None and job.metrics() is None
    job.prepare()
    (job.folder / METRICS).write_text('{"a": 1}')
    write_json(
        job.folder / DONE,
        {"evaluated": evaluation_key(job.recipe, job.work), "commit": "abc", "minutes": 2.0},
    )
    assert job.record() == {
        "evaluated": evaluation_key(job.recipe, job.work),
        "commit": "abc",
        "minutes": 2.0,
    }
    assert job.metrics() == {"a": 1}
    wider = Job(changed(job.recipe, {"search.widths": [4], "search.requests": 5}), job.work, "row")
    assert wider.folder == job.folder
    assert wider.record() is None and wider.metrics() is None
    pooled = changed(job.recipe, {"train.pool": 8})
    by_labels, by_requests = (
        Job(changed(pooled, {"train.order": order}), job.work, "row") for order in ("labels", "requests")
    )
    assert by_requests.folder == by_labels.folder
    assert evaluation_key(by_requests.recipe, job.work) == evaluation_key(pooled, job.work) + "-requests"
    # Where the catalogue grows, its candidates decide what is a negative.
    for change in ({"train.lr": 0.1}, {"search.candidates": "seen_before"}):
        assert Job(changed(job.recipe, change), job.work, "row").folder != job.folder


def test_training_never_reads_what_only_calibration_and_evaluation_read(recipe, halves, tmp_path):
    recipe = changed(recipe, {"train.pool": 8})
    other = {
        "train.order": "requests",
        "search.widths": [4],
        "search.k": 3,
        "search.max_k": 9,
        "search.requests": 5,
    }
    assert set(other) == set(AFTER_TRAINING)
    trained = [
        Trainer(changed(recipe, change), halves, tmp_path / name, progress=False).train().state_dict()
        for name, change in (("one", {}), ("two", other))
    ]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_the_expected_time_comes_from_other_seeds_or_from_a_scaled_prior(recipe, tmp_path):
    first, second = jobs_of(recipe, tmp_path, 1, 2)
    larger = Job(changed(recipe, {"model.layers": ["medium", "small"]}), tmp_path, "larger")
    assert larger.prior() > first.prior()
    assert expected_minutes([second], []) is None
    assert expected_minutes([second], [(first, 3.0)]) == [3.0]
    (guess,) = expected_minutes([larger], [(first, 3.0)])
    assert guess == pytest.approx(3.0 * larger.prior() / first.prior())


def test_flops_of_a_model_are_the_sum_of_its_layers(recipe):
    both = model_flops(recipe)
    flat = model_flops(changed(recipe, {"model.layers": ["two_tower_xs"], "model.codebooks": []}))
    assert len(both.pairs) == 2 and both.pairs[0] > both.pairs[1]
    assert flat.pair > 0 and both.pair == sum(both.pairs)
    assert both.user > flat.user and both.item > flat.item
    assert both.single == both.user + both.item + both.pair
    assert both.request((10, 20)) == both.user + 10 * both.pairs[0] + 20 * both.pairs[1]


@pytest.mark.usefixtures("fake_worker")
def test_a_failing_worker_is_reported_and_the_others_go_on(recipe, tmp_path):
    jobs = jobs_of(recipe, tmp_path, 1, 2, 4)
    (failure,) = workers.run_jobs([*jobs, jobs[0]], 2, progress=False)
    assert failure.job == jobs[1]
    assert failure.status == 1
    assert failure.tail.splitlines() == ["loading", "loading more", "boom: the disk is full"]
    assert "row s2: the worker ended with status 1" in workers.describe_failure(failure)
    assert str(jobs[1].folder / LOG) in workers.describe_failure(failure)
    assert [job.record() is not None for job in jobs] == [True, False, True]


@pytest.mark.usefixtures("fake_worker")
def test_what_is_done_is_not_run_again(recipe, tmp_path, monkeypatch):
    jobs = jobs_of(recipe, tmp_path, 1, 4)
    assert workers.run_jobs(jobs, 1, progress=False) == []
    monkeypatch.setattr(workers, "WORKER", (sys.executable, "-c", "raise SystemExit(1)"))
    assert workers.run_jobs(jobs, 1, progress=False) == []
    assert len(workers.run_jobs([*jobs, *jobs_of(recipe, tmp_path, 5)], 1, progress=False)) == 1


@pytest.mark.usefixtures("fake_worker")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_reaches_the_workers_and_leaves_none(recipe, tmp_path, number):
    (job,) = jobs_of(recipe, tmp_path, 3)

    def stop():
        while not (job.folder / "started").exists():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        workers.run_jobs([job], 1, progress=False)
    assert (job.folder / "stopped").exists()
    assert job.record() is None


def test_a_job_is_handed_over_as_its_recipe(recipe, tmp_path):
    (job,) = jobs_of(recipe, tmp_path, 1)
    job.prepare()
    raw = json.loads((job.folder / JOB).read_text())
    assert key(recipe_from_dict(raw, "x", Path()), job.work) == key(job.recipe, job.work)


@pytest.mark.parametrize(
    ("minutes", "text"),
    [(0.4, "under a minute"), (12.2, "12 min"), (59.7, "1 h 00 min"), (125, "2 h 05 min")],
)
def test_durations_are_words(minutes, text):
    assert workers.duration(minutes) == text
