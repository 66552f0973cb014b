"""The shipped recipes on the real data, where it lies beside the project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from hsnn_core.errors import DataError
from hsnn_core.schema import Schema
from hsnn_train.data.adapters import _trending, adapt, globo, ml_100k
from hsnn_train.data.dataset import Dataset, load_dataset
from hsnn_train.data.requests import evaluation_requests

ROOT = Path(__file__).resolve().parents[2]
REAL = ["ml-100k", "beauty", "toys", "globo", "completejourney", "gowalla"]
# Impressions to train on (for Gowalla some of them are kept for valid) and to test on, where the data's own description
# gives them.
PUBLISHED = {"beauty": (198_502 - 2 * 22_363, 22_363), "gowalla": (810_128, 217_242)}


def recipe_of(name: str) -> tuple[Schema, dict[str, Any], dict[str, Any]]:
    raw = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    return Schema.from_dict(raw["schema"]), raw["data"], raw["split"]


def load(name: str) -> Dataset:
    schema, data, split = recipe_of(name)
    if not (ROOT / data["path"]).is_dir():
        pytest.skip(f"{name}: its data is not at {data['path']}")
    if name == "globo":
        data["options"]["last_days"] = 3
    return load_dataset(schema, data, split, ROOT, seed=1, progress=False)


@pytest.mark.parametrize("name", REAL)
def test_real_data(name: str) -> None:
    data = load(name)
    assert len(data.train)
    assert len(data.test)
    assert not data.simulated
    users, wanted = data.relevant("test", 50)
    assert len(users) == len(wanted) == 50
    assert all(len(rows) for rows in wanted)
    requests = evaluation_requests(data, "test", "seen_before" if name == "globo" else "new", 50)
    assert requests.asked == 50
    assert len(requests) > 40
    allowed = requests.eligible(slice(None))
    assert allowed is not None
    assert 0.5 < allowed.mean() < 1
    assert all(row[rows].all() for row, rows in zip(allowed, requests.wanted))
    # a history exists in most requests, and never an id outside the item space
    history = next(s for s in data.schema.layout("user").slots if s.feature.name == "history")
    ids = data.test.users.ids[:, history.start : history.stop]
    assert (ids[:, 0] > 1).mean() > 0.5
    assert ids.max() < data.transform.cardinality("item")
    # most feature values of the test split were learnt: encodings and types in the recipe are right
    for slot in data.schema.layout("user").slots:
        values = data.test.users.ids[:, slot.start : slot.stop]
        assert (values == 1).mean() < 0.1, slot.feature.name
    for slot in data.schema.layout("item").slots:
        values = data.items.ids[:, slot.start : slot.stop]
        assert (values > 1).any(), slot.feature.name
        assert (values == 1).mean() < 0.05, slot.feature.name
    given = len(data.train) + (len(data.valid) if name == "gowalla" else 0)
    assert name not in PUBLISHED or (given, len(data.test)) == PUBLISHED[name]
    if name == "gowalla":
        assert len(data.item_keys) == 40_981
    if name == "ml-100k":
        parts = (data.train, data.valid, data.test)
        assert sum(map(len, parts)) == 100_000
        rates = sum(part.labels.sum(0) for part in parts) / 100_000
        np.testing.assert_allclose(rates, [0.55375, 0.21201, 1.0], atol=1e-5)


def test_ml_100k_by_hand(tmp_path: Path) -> None:
    columns = {"user_id": [1, 1], "item_id": [7, 8], "rating": [4, 5], "timestamp": [3, 2]}
    pq.write_table(pa.table(columns), tmp_path / "ratings.parquet")
    pq.write_table(pa.table({"user_id": [1], "zip_code": ["85711"]}), tmp_path / "users.parquet")
    movies = pa.table({"item_id": [7, 8], "release_year": ["1995", "unkonwn"]})
    pq.write_table(movies, tmp_path / "items.parquet")
    raw = ml_100k(tmp_path)
    assert raw.impressions.column("impression").to_pylist() == [1, 1]
    assert raw.impressions.column("click").to_pylist() == [1, 1]
    assert raw.impressions.column("conversion").to_pylist() == [0, 1]
    assert raw.users is not None
    assert raw.users.column("zip_area").to_pylist() == ["8"]
    assert raw.items.column("year").to_pylist() == [1995.0, None]


def test_globo_by_hand(tmp_path: Path) -> None:
    hour = 3_600_000
    monday = 1_506_902_400_000  # 2017-10-02T00:00Z
    time = [monday, monday + 24 * hour - 1, monday + 25 * hour, monday + 26 * hour, monday + 99 * hour]
    columns = {
        "user_id": [1, 1, 2, 2, 2],
        "session_id": [1, 1, 2, 2, 2],
        "session_start": [monday, monday, monday + 26 * hour, monday + 26 * hour, monday],
        "click_article_id": [5, 1006, 5, 2007, 8],
        "click_timestamp": time,
        **{
            f"click_{name}": [1] * 5
            for name in ("environment", "deviceGroup", "os", "country", "region", "referrer_type")
        },
    }
    pq.write_table(pa.table(columns), tmp_path / "clicks.parquet")
    whole, last = globo(tmp_path), globo(tmp_path, last_days=1)
    assert whole.impressions.column("hour").to_pylist() == [0, 23, 1, 2]
    assert whole.impressions.column("weekday").to_pylist() == [0, 0, 1, 1]
    assert whole.items.column("article_id").to_pylist() == [5, 1006, 2007]
    # to the hour: the article's first click does not have the article's time as its own
    np.testing.assert_allclose(whole.items.column("first_seen").to_numpy(), [0, 23 / 24, 26 / 24], rtol=1e-6)
    assert whole.items.column("first_hour").to_pylist() == [0, 23, 2]
    assert whole.items.column("block").to_pylist() == [0, 1, 2]
    assert last.impressions.column("article_id").to_pylist() == [1006, 5, 2007]
    assert last.items.column("first_seen").to_pylist()[0] == 0.0  # known from before the kept days
    assert whole.notes == ("1 of 5 clicks are outside the chosen days",)


def test_trending_weighs_the_clicks_before_the_last_full_five_minutes_by_their_age() -> None:
    minute = 60_000
    keys = np.array([50, 60, 70])
    time = np.array([0, 1, 4, 5, 9, 36, 2, 300]) * minute  # in the log's order, which is not that of time
    article = np.array([0, 1, 1, 2, 0, 2, 0, 0])
    found = _trending(time, article, keys).to_pylist()
    assert found[0] == found[1] == found[2] == found[6] == []  # nobody had clicked before the log began
    assert found[3] == [
        50,
        60,
    ]  # two clicks each by minute 5, the second article's later; the click at 5 is no past
    assert found[4] == found[3]
    assert found[5] == [70, 60, 50]  # at 35 three old clicks (.40 + .32 + .30), two (.34 + .31), one (.35)
    assert found[7] == []  # 264 minutes and 13 halves later


def test_trending_keeps_the_most_clicked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsnn_train.data.adapters.TRENDING", 2)
    time = np.array([0, 0, 0, 0, 0, 0, 300_000])
    found = _trending(time, np.array([0, 1, 1, 2, 2, 2, 0]), np.array([5, 6, 7]))
    assert found.to_pylist()[-1] == [6, 7]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"adapter": "movies"},
            "data.adapter: got 'movies', expected one of synthetic, ml-100k, s3rec, globo, completejourney, "
            "gowalla",
        ),
        ({"adapter": "globo"}, "data.path: missing; expected the folder of globo's tables"),
        ({"adapter": "globo", "file": 1}, "data.file: unknown key, expected one of adapter, path, options,"),
        ({"adapter": "globo", "path": "nowhere"}, "data.path: no such folder: "),
        (
            {"adapter": "globo", "options": {"days": 3}},
            "data.options.days: unknown option of globo, expected one of last_days",
        ),
        (
            {"adapter": "globo", "options": {"last_days": "3"}},
            "data.options.last_days: got '3', expected int, e.g. 0",
        ),
        ({"adapter": "s3rec", "options": {"x": 3}}, "data.options.x: unknown option of s3rec, expected none"),
        ({"adapter": "s3rec", "path": "."}, "data.path: "),
    ],
)  # fmt: skip
def test_bad_data_sections(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    schema, _, _ = recipe_of("globo")
    with pytest.raises(DataError) as error:
        adapt(schema, section, tmp_path)
    assert str(error.value).startswith(message)
