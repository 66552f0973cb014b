"""From the raw tables of known data sets to the three tables of a log.

An adapter reads a folder that the caller names and changes nothing there. Sets of positives only have label 1
throughout; training draws the negatives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from hsnn_core.errors import DataError
from hsnn_core.schema import Schema

from .synthetic import WorldConfig, simulate
from .tables import LogTables

DAY_MS = 86_400_000
HOUR_MS = 3_600_000
GLOBO_BLOCK = 1000  # article ids per block: 352 blocks in the log
TRENDING = 200  # articles of Globo's trending list
TRENDING_EVERY_MS, TRENDING_HALF_MS = 5 * 60_000, 20 * 60_000
TRENDING_LEAST = 1e-3  # below it a click of some hours ago is forgotten


class Raw(NamedTuple):
    """What an adapter gives: the three tables and notes on how they were made; ``unordered``: see `LogTables`."""

    impressions: pa.Table
    users: pa.Table | None
    items: pa.Table
    notes: tuple[str, ...] = ()
    unordered: bool = False


def adapt(schema: Schema, section: Mapping[str, Any], base_dir: Path) -> LogTables:
    """The tables of a `data: {adapter, path, options, unknown_items, history_by}` section.

    Raises DataError for an unknown adapter, key or option, and for a folder or file that is not there.
    """
    known = ("adapter", "path", "options", "unknown_items", "history_by")
    for key in section:
        if key not in known:
            raise DataError(f"data.{key}: unknown key, expected one of {', '.join(known)}")
    name = section["adapter"]
    if name not in ADAPTERS:
        raise DataError(f"data.adapter: got {name!r}, expected one of {', '.join(ADAPTERS)}")
    adapter = ADAPTERS[name]
    options = dict(section.get("options") or {})
    accepted = {k: p.default for k, p in inspect.signature(adapter).parameters.items() if k != "folder"}
    for key, value in options.items():
        if key not in accepted:
            raise DataError(
                f"data.options.{key}: unknown option of {name}, expected "
                f"{'one of ' + ', '.join(accepted) if accepted else 'none'}"
            )
        if type(value) is not type(accepted[key]):
            wanted = type(accepted[key]).__name__
            raise DataError(f"data.options.{key}: got {value!r}, expected {wanted}, e.g. {accepted[key]!r}")
    if "folder" in inspect.signature(adapter).parameters:
        if not section.get("path"):
            raise DataError(f"data.path: missing; expected the folder of {name}'s tables")
        folder = base_dir / section["path"]
        if not folder.is_dir():
            raise DataError(f"data.path: no such folder: {folder}; expected that of {name}'s tables")
        options["folder"] = folder
    raw = adapter(**options)
    return LogTables(
        schema,
        raw.impressions,
        raw.users,
        raw.items,
        section.get("unknown_items", "refuse"),
        section.get("history_by"),
        notes=raw.notes,
        unordered=raw.unordered,
    )


def synthetic(
    users: int = 12_000,
    ads: int = 6_000,
    impressions: int = 300_000,
    days: int = 14,
    seed: int = 7,
    targeted: float = 0.5,
) -> Raw:
    """A simulated ads world (`synthetic.simulate`)."""
    config = WorldConfig(
        users=users, ads=ads, impressions=impressions, days=days, seed=seed, targeted=targeted
    )
    simulation = simulate(config)
    note = f"simulated: no figure made from this data says anything about a real system (seed {seed})"
    return Raw(simulation.impressions, simulation.users, simulation.ads, (note,))


def ml_100k(folder: Path) -> Raw:
    """MovieLens 100K: any rating is an impression, of 4 or 5 a click, of 5 a conversion."""
    ratings = _read(folder, "ratings")
    stars = ratings.column("rating")
    impressions = pa.table(
        {
            "user_id": ratings.column("user_id"),
            "item_id": ratings.column("item_id"),
            "timestamp": ratings.column("timestamp"),
            "click": pc.cast(pc.greater_equal(stars, 4), pa.int8()),
            "conversion": pc.cast(pc.equal(stars, 5), pa.int8()),
        }
    )
    people = _read(folder, "users")
    people = people.append_column("zip_area", pc.utf8_slice_codeunits(people.column("zip_code"), 0, 1))
    movies = _read(folder, "items")
    year = movies.column("release_year")
    known = pc.match_substring_regex(year, "^[0-9]{4}$")
    year = pc.cast(pc.if_else(known, year, pa.scalar(None, year.type)), pa.float32())
    return Raw(_with_ones(impressions, "impression"), people, movies.append_column("year", year))


def s3rec(folder: Path) -> Raw:
    """Amazon reviews, one ordered sequence per user: the position in it stands for the time."""
    reviews = _read(folder, "interactions")
    return Raw(_with_ones(reviews, "review"), None, _read(folder, "items"))


def globo(folder: Path, last_days: int = 0) -> Raw:
    """News clicks of Globo.com; ``last_days`` > 0 keeps only that many days before the end.

    The end is the start of the last session: the few clicks after it trail over four weeks. Added are hour
    and weekday of a click, ``day`` (days since the log began) and, of an article, ``first_seen``: the hour of
    its first click, in days since the log began, and that hour's place in its day, ``first_hour``. The exact time would
    tell the first click from all others. ``block``: the article's id in thousands, for ids run by
    topic (docs/log.md), and articles without clicks in train differ by little else.
    ``trending``: what the site's readers were clicking when the request came, the `TRENDING` articles of the most
    clicks, the most clicked last, where a click loses half its weight in twenty minutes; made anew every five
    minutes, of what was clicked before.
    """
    clicks = _read(folder, "clicks")
    time = clicks.column("click_timestamp").to_numpy()
    end = int(pc.max(clicks.column("session_start")).as_py())
    begin = int(time.min())
    start = end - last_days * DAY_MS if last_days else begin
    kept = (time <= end) & (time >= start)
    seen, article = np.unique(clicks.column("click_article_id").to_numpy(), return_inverse=True)
    first = np.full(len(seen), np.iinfo(np.int64).max)
    np.minimum.at(first, article, time)
    live = np.bincount(article[kept], minlength=len(seen)) > 0
    first = first[live]
    items = pa.table(
        {
            "article_id": seen[live],
            "first_seen": ((first - begin) // HOUR_MS / np.float32(24)).astype(np.float32),
            "first_hour": first // HOUR_MS % 24,
            "block": seen[live] // GLOBO_BLOCK,
        }
    )

    trending = _trending(time, article, seen)
    time = time[kept]
    clicks = clicks.filter(pa.array(kept))
    renamed = {
        "user_id": "user_id",
        "session_id": "session_id",
        "click_article_id": "article_id",
        "click_timestamp": "timestamp",
        "click_environment": "environment",
        "click_deviceGroup": "device",
        "click_os": "os",
        "click_country": "country",
        "click_region": "region",
        "click_referrer_type": "referrer",
    }
    impressions = clicks.select(list(renamed)).rename_columns(list(renamed.values()))
    for name, values in (
        ("hour", (time // HOUR_MS % 24).astype(np.int64)),
        ("weekday", (time // DAY_MS + 3) % 7),  # 1970-01-01 was a Thursday; 0 is Monday
        ("day", ((time - begin) / DAY_MS).astype(np.float32)),
    ):
        impressions = impressions.append_column(name, pa.array(values))
    impressions = impressions.append_column("trending", trending.filter(pa.array(kept)))
    return Raw(
        _with_ones(impressions, "click"),
        None,
        items,
        (f"{len(kept) - len(time)} of {len(kept)} clicks are outside the chosen days",),
    )


def _trending(time: np.ndarray, article: np.ndarray, keys: np.ndarray) -> pa.DictionaryArray:
    """Per click the list of `globo`'s trending articles then, from its time (S,) int64 in ms and its article (S,), a
    row of ``keys``. Articles of equal weight stand by key, the smaller the later."""
    moments, of = np.unique(time // TRENDING_EVERY_MS, return_inverse=True)
    order = np.argsort(time, kind="stable")
    time, article = time[order], article[order]
    weight = np.zeros(len(keys))
    lists = []
    past, begin = 0, 0
    for now, stop in zip(moments * TRENDING_EVERY_MS, np.searchsorted(time, moments * TRENDING_EVERY_MS)):
        weight *= 0.5 ** ((now - past) / TRENDING_HALF_MS)
        np.add.at(weight, article[begin:stop], 0.5 ** ((now - time[begin:stop]) / TRENDING_HALF_MS))
        rows = np.flatnonzero(weight > TRENDING_LEAST)
        lists.append(keys[rows[np.lexsort((rows, -weight[rows]))[:TRENDING]][::-1]])
        past, begin = now, stop
    ends = np.cumsum([0, *map(len, lists)])
    distinct = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(np.concatenate(lists)))
    return pa.DictionaryArray.from_arrays(pa.array(of, pa.int32()), distinct)


def completejourney(folder: Path) -> Raw:
    """Grocery purchases, household demographics and a product hierarchy; those never bought are items too."""
    bought = _read(folder, "transactions_sample")
    stamp = pc.strptime(bought.column("transaction_timestamp"), format="%Y-%m-%dT%H:%M:%S", unit="s")
    impressions = pa.table(
        {
            "household_id": bought.column("household_id"),
            "product_id": bought.column("product_id"),
            "timestamp": pc.cast(stamp, pa.int64()),
            "store_id": bought.column("store_id"),
            "week": bought.column("week"),
        }
    )
    products = _read(folder, "products")
    number = pc.cast(products.column("product_id"), pa.int64())
    products = products.set_column(products.column_names.index("product_id"), "product_id", number)
    return Raw(_with_ones(impressions, "purchase"), _read(folder, "demographics"), products)


def gowalla(folder: Path) -> Raw:
    """Check-ins without time, divided as published in column `split`. A user's stand there by item id, which says
    nothing of their order."""
    visits = _read(folder, "interactions")
    items = pa.table({"item_id": pc.unique(visits.column("item_id")).sort()})
    return Raw(_with_ones(visits, "visit"), None, items, unordered=True)


ADAPTERS: dict[str, Callable[..., Raw]] = {
    "synthetic": synthetic,
    "ml-100k": ml_100k,
    "s3rec": s3rec,
    "globo": globo,
    "completejourney": completejourney,
    "gowalla": gowalla,
}


def _read(folder: Path, name: str) -> pa.Table:
    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise DataError(f"data.path: {folder} has no {path.name}; is it the folder of this data set?")
    return pyarrow.parquet.read_table(path)


def _with_ones(table: pa.Table, label: str) -> pa.Table:
    return table.append_column(label, pa.array(np.ones(table.num_rows, np.int8)))
