"""hsnn bench follow on a tiny simulated world: both models see the same, and the page says what it is."""

import pytest
import yaml

from hsnn_bench.follow import run_follow
from hsnn_core.errors import SchemaError
from hsnn_train.recipe import load_recipe


@pytest.fixture
def recipe(tmp_path):
    made = load_recipe("synthetic").to_dict()
    made |= {
        "name": "tiny-ads",
        "data": {
            "adapter": "synthetic",
            "options": {"users": 100, "ads": 80, "impressions": 1500, "days": 3},
        },
        "model": {"layers": ["small", "small"], "codebooks": [6]},
        "train": {"max_steps": 3, "batch_size": 128, "unlabelled": 0},
        "search": {"widths": [3], "k": 10, "max_k": 50},
    }
    path = tmp_path / "tiny-ads.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def test_the_rest_of_the_log_is_followed_file_by_file(recipe, tmp_path):
    report = run_follow(str(recipe), 2, 0.6, tmp_path / "results")
    assert [row["impressions"] for row in report["files"]] == [300, 300]
    first, second = report["files"]
    assert first["still"] == first["follows"]
    assert second["still"] != second["follows"]
    page = (tmp_path / "results" / "follow-tiny-ads.md").read_text()
    assert "# Following a stream: tiny-ads (simulated)" in page
    assert "after the first 900 impressions" in page
    for ending in ("json", "png"):
        assert (tmp_path / "results" / f"follow-tiny-ads.{ending}").stat().st_size > 0


def test_numbers_out_of_range_are_refused(recipe):
    with pytest.raises(
        SchemaError, match="--files, --share: got 0 and 1.5, expected at least 1 and a share between"
    ):
        run_follow(str(recipe), 0, 1.5)
