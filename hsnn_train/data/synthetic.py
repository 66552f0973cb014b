"""A simulated ads world with a known truth: who clicks and buys what, with which probability.

Creator groups hold creators, who run campaigns of ads. Each lies near its parent in a latent space of topics,
so both the given hierarchy and a learnt one can be right. A logging policy that knows a little shows the ads;
clicks follow a nonlinear probability, conversions another one, only after a click. All of it is a function of
the seed, and none of it says anything about a real system: the tables carry a mark, and figures made from
them are labelled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from hsnn_core.errors import DataError
from hsnn_core.files import written_aside

from .tables import SIMULATED
from .targeting import DAY, targeting_columns

LOG_BEGIN = 1_700_000_000 // 86_400 * 86_400  # seconds since 1970, a midnight
GENDERS = ("female", "male", "other")
COUNTRIES = ("US", "BR", "IN", "DE", "FR", "JP", "MX", "GB", "ID", "CA", "ES", "IT")
DEVICES = ("phone", "tablet", "desktop")
FORMATS = ("image", "video", "carousel", "story")
FIRST_AD, FIRST_USER = 1000, 1  # ids of row 0
THEMES, TOPICS, DIMS, AGE_BANDS = 6, 24, 16, 6
POLICY_CHUNK = 1 << 15


@dataclass(frozen=True)
class WorldConfig:
    """Sizes of the world; rates are what the log's means are set to (conversions: per click).

    choices: ads that the logging policy picks one of for an impression; targeted: see `targeting.targeting_columns`.
    """

    users: int = 12_000
    ads: int = 6_000
    impressions: int = 300_000
    days: int = 14
    click_rate: float = 0.1
    conversion_rate: float = 0.15
    choices: int = 12
    seed: int = 7
    targeted: float = 0.5

    def __post_init__(self) -> None:
        for name in ("users", "ads", "impressions", "days", "choices"):
            if getattr(self, name) < 1:
                raise DataError(f"synthetic.{name}: got {getattr(self, name)}, expected at least 1")
        if not 0 <= self.targeted <= 1:
            raise DataError(f"synthetic.targeted: got {self.targeted}, expected a share from 0 to 1")

    @property
    def groups(self) -> int:
        return max(4, self.ads // 200)

    @property
    def creators(self) -> int:
        return max(8, self.ads // 20)

    @property
    def campaigns(self) -> int:
        return max(16, self.ads // 5)


@dataclass(frozen=True)
class World:
    """The truth. Arrays of ads (A,) are ordered by creation; vectors are of length 1."""

    user_vector: np.ndarray  # (U, DIMS)
    user_age: np.ndarray
    user_gender: np.ndarray
    user_country: np.ndarray
    user_income: np.ndarray
    user_activity: np.ndarray
    user_topics: np.ndarray  # (U, TOPICS) weights, rows sum to 1
    topic_vector: np.ndarray  # (TOPICS, DIMS)
    ad_vector: np.ndarray  # (A, DIMS)
    ad_campaign: np.ndarray
    ad_creator: np.ndarray
    ad_group: np.ndarray
    ad_theme: np.ndarray
    ad_format: np.ndarray
    ad_country: np.ndarray  # the country it is made for
    ad_price: np.ndarray  # logarithm, standardised
    ad_quality: np.ndarray
    ad_trust: np.ndarray
    ad_created: np.ndarray  # days since the log began, ascending
    ad_budget: np.ndarray
    taste: np.ndarray  # (AGE_BANDS, THEMES)
    daytime: np.ndarray  # (24, THEMES)
    fit_of_format: np.ndarray  # (devices, formats)
    campaign_vector: np.ndarray  # (campaigns, DIMS)
    campaign_creator: np.ndarray
    creator_group: np.ndarray
    creator_trust: np.ndarray
    theme_price: np.ndarray  # (THEMES,)
    intercepts: tuple[float, float]

    def probabilities(
        self, user: np.ndarray, ad: np.ndarray, day: np.ndarray, device: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """P(click) and P(conversion | click) of showing ``ad`` (R,) to ``user`` (R,), rows of this world, at
        ``day`` (R,) (days since the log began) on ``device`` (R,) (place in DEVICES)."""
        click, conversion = self._logits(user, ad, day, device)
        return _sigmoid(click + self.intercepts[0]), _sigmoid(conversion + self.intercepts[1])

    def affinity(self, user: np.ndarray, ad: np.ndarray) -> np.ndarray:
        """Cosine of user (R,) or (R, 1) and ad (R,) or (R, C)."""
        found: np.ndarray = np.einsum("...d,...d->...", self.user_vector[user], self.ad_vector[ad])
        return found

    def _logits(
        self, user: np.ndarray, ad: np.ndarray, day: np.ndarray, device: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        affinity = self.affinity(user, ad)
        band = np.minimum((self.user_age[user] - 18) // 10, AGE_BANDS - 1)
        theme = self.ad_theme[ad]
        too_dear = np.logaddexp(0.0, self.ad_price[ad] - self.user_income[user])
        click = (
            3.0 * np.tanh(2.5 * affinity)
            + 0.6 * self.ad_quality[ad]
            + self.taste[band, theme]
            + self.daytime[(day % 1 * 24).astype(np.int64), theme]
            + self.fit_of_format[device, self.ad_format[ad]]
            + 0.5 * (self.ad_country[ad] == self.user_country[user])
            + 0.7 * np.exp(-np.maximum(day - self.ad_created[ad], 0.0) / 4.0)
            - 0.4 * too_dear
        )
        conversion = (
            2.5 * np.maximum(affinity, 0.0) ** 2
            + 0.8 * self.ad_trust[ad]
            + 0.4 * self.ad_quality[ad]
            - 1.0 * too_dear
        )
        return click, conversion


class Simulation(NamedTuple):
    """The world, its tables, and per impression the true ``click``, P(click), and ``conversion``,
    P(conversion | click), both (S,) float64 in row order."""

    world: World
    impressions: pa.Table
    users: pa.Table
    ads: pa.Table
    click: np.ndarray
    conversion: np.ndarray


def simulate(config: WorldConfig) -> Simulation:
    """A world and its log. The same configuration gives the same bytes."""
    world = _make_world(config, np.random.default_rng([config.seed, 0]))
    rng = np.random.default_rng([config.seed, 1])
    activity = np.cumsum(world.user_activity) / world.user_activity.sum()
    user = np.minimum(np.searchsorted(activity, rng.random(config.impressions)), config.users - 1)
    second = np.sort(rng.integers(0, config.days * 86_400, config.impressions))
    day = second / 86_400
    device = (rng.random(len(user)) + 0.3 * (user % 3)).astype(np.int64) + (rng.random(len(user)) < 0.1)
    device = np.minimum(device, len(DEVICES) - 1)
    ad = np.concatenate([
        _choose(world, user[part], day[part], config.choices, rng)
        for part in (slice(s, s + POLICY_CHUNK) for s in range(0, len(user), POLICY_CHUNK))
    ])  # fmt: skip
    world = _with_rates(world, config, world._logits(user, ad, day, device))
    click, conversion = world.probabilities(user, ad, day, device)
    clicked = rng.random(len(user)) < click
    converted = clicked & (rng.random(len(user)) < conversion)
    impressions = pa.table(
        {
            "user_id": user + FIRST_USER,
            "ad_id": ad + FIRST_AD,
            "timestamp": second + LOG_BEGIN,
            "day": day.astype(np.float32),
            "hour": second // 3600 % 24,
            "device": pa.array(np.array(DEVICES)[device]),
            "click": clicked.astype(np.int8),
            "conversion": converted.astype(np.int8),
        }
    )
    users, ads = _user_table(world, rng), _ad_table(world, config, rng)
    return Simulation(world, _marked(impressions), _marked(users), _marked(ads), click, conversion)


def write_synthetic(out: Path, config: WorldConfig) -> dict[str, Path]:
    """Write a simulation as impressions, users and items .parquet under ``out``; the paths by table."""
    simulation = simulate(config)
    out.mkdir(parents=True, exist_ok=True)
    tables = {"impressions": simulation.impressions, "users": simulation.users, "items": simulation.ads}
    return {name: _write(table, out / f"{name}.parquet") for name, table in tables.items()}


def _write(table: pa.Table, path: Path) -> Path:
    with written_aside(path) as file:
        pyarrow.parquet.write_table(table, file, compression="zstd")
    return path


def _make_world(config: WorldConfig, rng: np.random.Generator) -> World:
    theme_of_topic = np.arange(TOPICS) % THEMES
    theme = _unit(rng.normal(size=(THEMES, DIMS)))
    topic = _near(theme[theme_of_topic], 0.8, rng)

    group = _near(topic[rng.integers(0, TOPICS, config.groups)], 0.5, rng)
    group_of_creator = _children(config.creators, config.groups, rng)
    creator = _near(group[group_of_creator], 0.4, rng)
    trust = rng.normal(size=config.creators)
    creator_of_campaign = _children(config.campaigns, config.creators, rng)
    campaign = _near(creator[creator_of_campaign], 0.3, rng)
    campaign_of_ad = _children(config.ads, config.campaigns, rng)
    ad = _near(campaign[campaign_of_ad], 0.25, rng)
    creator_of_ad = creator_of_campaign[campaign_of_ad]
    theme_of_ad = theme_of_topic[np.argmax(ad @ topic.T, axis=1)]

    count = config.users
    weights = rng.dirichlet(np.full(TOPICS, 0.08), count)
    age = np.minimum(18 + rng.gamma(2.2, 9.0, count).astype(np.int64), 80)
    gender = rng.choice(len(GENDERS), count, p=[0.49, 0.49, 0.02])
    of_age_and_gender = rng.normal(size=(AGE_BANDS, len(GENDERS), DIMS)) / np.sqrt(DIMS)
    band = np.minimum((age - 18) // 10, AGE_BANDS - 1)
    leaning = weights @ topic + 0.35 * of_age_and_gender[band, gender]
    share = 1.0 / np.arange(1, len(COUNTRIES) + 1)
    share /= share.sum()
    return World(
        user_vector=_near(_unit(leaning), 0.25, rng),
        user_age=age,
        user_gender=gender,
        user_country=rng.choice(len(COUNTRIES), count, p=share),
        user_income=0.02 * (age - 38) + rng.normal(size=count),
        user_activity=rng.lognormal(0.0, 1.0, count),
        user_topics=weights,
        topic_vector=topic,
        ad_vector=ad,
        ad_campaign=campaign_of_ad,
        ad_creator=creator_of_ad,
        ad_group=group_of_creator[creator_of_ad],
        ad_theme=theme_of_ad,
        ad_format=rng.integers(0, len(FORMATS), config.ads),
        ad_country=rng.choice(len(COUNTRIES), config.ads, p=share),
        ad_price=0.5 * (theme_price := rng.normal(size=THEMES))[theme_of_ad]
        + 0.9 * rng.normal(size=config.ads),
        ad_quality=0.4 * trust[creator_of_ad] + 0.8 * rng.normal(size=config.ads),
        ad_trust=trust[creator_of_ad],
        ad_created=np.sort(rng.uniform(-1.5 * config.days, 0.9 * config.days, config.ads)),
        ad_budget=rng.lognormal(0.0, 1.0, config.campaigns)[campaign_of_ad],
        taste=0.6 * rng.normal(size=(AGE_BANDS, THEMES)),
        daytime=0.3 * rng.normal(size=(24, THEMES)),
        fit_of_format=0.4 * rng.normal(size=(len(DEVICES), len(FORMATS))),
        campaign_vector=campaign,
        campaign_creator=creator_of_campaign,
        creator_group=group_of_creator,
        creator_trust=trust,
        theme_price=theme_price,
        intercepts=(0.0, 0.0),
    )


def grown_ads(world: World, config: WorldConfig, part: int, count: int) -> pa.Table:
    """``count`` further ads, of campaigns that are all as likely, as an item table; their ids begin behind the world's
    own ads, at ``part * count``. The same part and count give the same bytes, whatever came before."""
    rng = np.random.default_rng([config.seed, 2, part])
    share = 1.0 / np.arange(1, len(COUNTRIES) + 1)
    campaign = rng.integers(0, len(world.campaign_vector), count)
    creator = world.campaign_creator[campaign]
    vector = _near(world.campaign_vector[campaign], 0.25, rng)
    theme = (np.arange(TOPICS) % THEMES)[np.argmax(vector @ world.topic_vector.T, axis=1)]
    trust = world.creator_trust[creator]
    ads = replace(
        world,
        ad_vector=vector,
        ad_campaign=campaign,
        ad_creator=creator,
        ad_group=world.creator_group[creator],
        ad_theme=theme,
        ad_format=rng.integers(0, len(FORMATS), count),
        ad_country=rng.choice(len(COUNTRIES), count, p=share / share.sum()),
        ad_price=0.5 * world.theme_price[theme] + 0.9 * rng.normal(size=count),
        ad_quality=0.4 * trust + 0.8 * rng.normal(size=count),
        ad_trust=trust,
        ad_created=rng.uniform(-1.5 * config.days, 0.9 * config.days, count),
    )
    return _marked(_ad_table(ads, config, rng, config.ads + part * count))


def world_of(config: WorldConfig) -> World:
    """The world of `simulate`, without its log; the rates of its probabilities are not set."""
    return _make_world(config, np.random.default_rng([config.seed, 0]))


def _choose(
    world: World, user: np.ndarray, day: np.ndarray, choices: int, rng: np.random.Generator
) -> np.ndarray:
    """The logging policy: of some ads that exist by then, drawn by budget, the one that looks best through
    noise."""
    budget = np.cumsum(world.ad_budget)
    alive = np.maximum(np.searchsorted(world.ad_created, day, side="right"), 1)
    drawn = rng.random((len(user), choices)) * budget[alive - 1][:, None]
    ads = np.minimum(np.searchsorted(budget, drawn), (alive - 1)[:, None])  # (R, choices)
    score = (
        2.0 * world.affinity(user[:, None], ads) + 0.4 * world.ad_quality[ads] + rng.gumbel(size=ads.shape)
    )
    return np.take_along_axis(ads, np.argmax(score, axis=1)[:, None], axis=1)[:, 0]


def _with_rates(world: World, config: WorldConfig, logits: tuple[np.ndarray, np.ndarray]) -> World:
    click, conversion = logits
    first = _intercept(click, np.ones(len(click)), config.click_rate)
    second = _intercept(conversion, _sigmoid(click + first), config.conversion_rate)
    return replace(world, intercepts=(first, second))


def _intercept(logits: np.ndarray, weights: np.ndarray, rate: float) -> float:
    """The constant that makes the weighted mean probability equal ``rate``, by bisection."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        if np.average(_sigmoid(logits + middle), weights=weights) < rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _user_table(world: World, rng: np.random.Generator) -> pa.Table:
    """What the platform knows: interests are declared, not the true weights; income is a noisy estimate."""
    weights = world.user_topics
    declared = (weights > 0.1) & (rng.random(weights.shape) < 0.75)
    declared |= rng.random(weights.shape) < 0.01
    return pa.table(
        {
            "user_id": np.arange(len(weights)) + FIRST_USER,
            "age": world.user_age.astype(np.float32),
            "gender": pa.array(np.array(GENDERS)[world.user_gender]),
            "country": pa.array(np.array(COUNTRIES)[world.user_country]),
            "income": (world.user_income + 0.4 * rng.normal(size=len(weights))).astype(np.float32),
            "interests": _id_lists(declared),
        }
    )


def _ad_table(world: World, config: WorldConfig, rng: np.random.Generator, first: int = 0) -> pa.Table:
    """What the platform knows of the ads, which have the numbers from ``first`` on; topics are the nearest one and
    others almost as near, at most 3. The advertiser is the creator."""
    near = world.ad_vector @ world.topic_vector.T
    best = np.sort(near, axis=1)
    count = len(near)
    number = np.arange(count) + first
    columns = {
        "ad_id": number + FIRST_AD,
        "campaign_id": world.ad_campaign,
        "creator_id": world.ad_creator,
        "creator_group": world.ad_group,
        "topics": _id_lists((near >= best[:, -3:-2]) & (near >= best[:, -1:] - 0.15)),
        "format": pa.array(np.array(FORMATS)[world.ad_format]),
        "made_for": pa.array(np.array(COUNTRIES)[world.ad_country]),
        "price": np.exp(world.ad_price).astype(np.float32),
        "quality": (world.ad_quality + 0.4 * rng.normal(size=count)).astype(np.float32),
        "created": world.ad_created.astype(np.float32),
        "advertiser": world.ad_creator,
    }
    start, end = LOG_BEGIN + np.floor(DAY * world.ad_created), LOG_BEGIN + DAY * config.days
    targeting = targeting_columns(
        number, config.seed, config.targeted, world.ad_country, COUNTRIES, start, end
    )
    return pa.table(columns | targeting)


def _id_lists(chosen: np.ndarray) -> pa.Array:
    """Lists of the columns that are set, per row of chosen (R, n) bool."""
    ends = np.concatenate([[0], np.cumsum(chosen.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.nonzero(chosen)[1]))


def _marked(table: pa.Table) -> pa.Table:
    return table.replace_schema_metadata({SIMULATED: b"true"})


def _children(count: int, parents: int, rng: np.random.Generator) -> np.ndarray:
    """A parent for each of ``count`` children, families of very different sizes."""
    weight = rng.lognormal(0.0, 0.7, parents)
    return rng.choice(parents, count, p=weight / weight.sum())


def _near(centre: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors around unit vectors (R, DIMS)."""
    return _unit(centre + noise * rng.normal(size=centre.shape) / np.sqrt(DIMS))


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / lengths


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-values))
