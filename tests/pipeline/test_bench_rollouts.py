"""hsnn bench rollouts, a small one on a real Triton."""

import json

import pytest

from hsnn_cli.main import main


@pytest.mark.triton
def test_a_rollout_and_a_rollback_under_load(shop, tmp_path):
    command = [
        "bench",
        "rollouts",
        str(shop / "run"),
        "--rollouts",
        "1",
        "--rollbacks",
        "1",
        "--capacity",
        "20",
    ]
    options = ["--k", "20", "--requests", "40", "--latency-ms", "10000", "--results", str(tmp_path)]
    assert main([*command, *options]) == 0
    report = json.loads((tmp_path / "rollouts.json").read_text())
    assert report["requests"]["sent"] > 10 and report["requests"]["not_answered"] == 0
    answers = report["answers"]
    assert (answers["foreign"], answers["mixed"]) == (0, 0)
    assert answers["own"] == report["requests"]["sent"]
    assert answers["apart"]["alike"] < 4
    assert len(answers["by_version"]) == 2
    assert [step["kind"] for step in report["steps"]] == ["rollout", "rollback"]
    assert report["to_serving"]["total"] > 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ["--rollouts", "2", "--rollbacks", "3"],
            "--rollbacks: got 3, expected 0 to 2: each undoes a rollout",
        ),
        (["--load", "0"], "--load: got 0.0, expected a number > 0"),
        (["--k", "0"], "--k: got 0, expected at least 1"),
    ],
)
def test_what_it_refuses(options, text, capsys):
    assert main(["bench", "rollouts", "run", *options]) == 1
    assert text in capsys.readouterr().err
