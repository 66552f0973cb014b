"""hsnn bench rollouts: answers that are nobody's are found, and the page says what was counted."""

from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from hsnn_bench.rollouts_load import _HEAD, Expected, check
from hsnn_bench.rollouts_report import render, write_report


def expected(offset: float) -> Expected:
    """Two requests, three items, one task; the second request has two items."""
    items = np.array([[10, 11, 12], [20, 21, 0]])
    probabilities = np.array([[[0.9], [0.5], [0.4]], [[0.8], [0.3], [0.0]]]) - offset
    return Expected(items, probabilities.astype(np.float32), np.array([3, 2]))


def answer(version: int, items: list[int], probabilities: list[float]) -> bytes:
    message = service_pb2.ModelInferResponse(model_name="hsnn_retrieve", model_version=str(version))
    tensors = {
        "item_ids": ("INT64", np.array([items], np.int64)),
        "probabilities": ("FP32", np.array(probabilities, np.float32)[None, :, None]),
        "rank_score": ("FP32", np.zeros((1, len(items)), np.float32)),
        "valid": ("INT32", np.array([[len(items)]], np.int32)),
    }
    for name, (datatype, values) in tensors.items():
        message.outputs.add(name=name, datatype=datatype, shape=values.shape)
        message.raw_output_contents.append(values.tobytes())
    return message.SerializeToString()


def test_every_answer_is_its_versions_own_or_counted(tmp_path: Path) -> None:
    answers = [
        (0, answer(1, [10, 11, 12], [0.9, 0.5, 0.4])),
        (3, answer(1, [20, 21], [0.8, 0.3])),  # the second request again
        (4, answer(2, [10, 11, 12], [0.8, 0.4, 0.3])),
        (6, answer(2, [10, 11, 12], [0.9, 0.5, 0.4])),  # the other's
        (8, answer(2, [10, 11, 12], [0.8, 0.5, 0.4])),  # one score of each
        (10, answer(1, [10, 11], [0.9, 0.5])),  # one is missing
        (12, answer(1, [10, 11, 77], [0.9, 0.5, 0.4])),  # ties with the last
    ]
    with (tmp_path / "spool").open("wb") as file:
        for number, message in answers:
            file.write(_HEAD.pack(number, len(message)) + message)
    one, two = expected(0.0), expected(0.1)
    found = check(tmp_path / "spool", 2, {1: "a", 2: "b"}, {"a": one, "b": two})
    assert (found.own, found.foreign, found.mixed) == (4, 1, 2)
    assert found.by_version == {1: 4, 2: 3}
    assert found.worst < 1e-6
    assert one.apart(two) == pytest.approx([0.1, 0.1])


def test_the_page(tmp_path: Path) -> None:
    asked = {"seconds": 60.0, "deadline_ms": 2000.0, "sent": 6000, "answered": 5997, "refused": 2, "expired": 1,
             "failed": 0, "not_answered": 3, "p50_ms": 10.0, "p99_ms": 50.0, "most_ms": 300.0,
             "failures": ["X: y"]}  # fmt: skip
    answers = {"own": 5996, "foreign": 1, "mixed": 0, "worst": 0.0, "tolerance": 1e-4, "distinct_requests": 500,
               "by_version": {1: 10, 2: 5987}, "apart": {"median": 0.05, "least": 0.01, "alike": 0}}  # fmt: skip
    report = {
        "recipe": "shop", "simulated": True, "command": "hsnn bench rollouts run", "commit": "abc", "machine": "m",
        "date": "d", "items": 200, "k": 100, "mode": "bls", "workers": 2, "queue": 512, "capacity": 100.0, "load": 0.7,
        "rollouts": 2, "rollbacks": 1, "requests": asked, "answers": answers,
        "steps": [{"kind": "rollout", "version": 3, "publish": 2.0, "promote": 1.0},
                  {"kind": "rollback", "version": 2, "rollback": 3.0}],
        "to_serving": {"load": 1.0, "export": 5.0, "publish": 2.0, "promote": 1.0, "total": 9.0},
    }  # fmt: skip
    page = render(report)
    assert "| requests without an answer (refused 2, expired 1, failed 0) | 0 | 3 |" in page
    assert "| answers that are not the named snapshot's own | 0 | 1 |" in page
    assert "2 versions answered between 10 and 5,987 requests each" in page
    assert "at 0.7 of a closed-loop throughput of 100.0 requests/s" in page
    assert "The data are simulated" in page and "- `X: y`" in page
    assert [path.name for path in write_report(report, tmp_path / "new")] == ["rollouts.json", "rollouts.md"]
