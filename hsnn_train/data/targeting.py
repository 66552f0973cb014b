"""Who may get the ads of the simulated world, and what they bid: columns that follow from an ad's number and the seed.

Each number is a hash of ad, seed and purpose, not the next one of a generator: an ad has the same targeting in a
corpus of any size, and what the world drew before it was targeted stays as it was.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

PLACEMENTS = ("feed", "story", "search", "partner")
DAY = 86_400


def targeting_columns(
    number: np.ndarray,
    seed: int,
    targeted: float,
    country: np.ndarray,
    countries: tuple[str, ...],
    start_time: np.ndarray,
    log_end: int,
) -> dict[str, pa.Array]:
    """Columns of R ads with these numbers (R,), made for ``country`` (R,) (places in ``countries``) and created at
    ``start_time`` (R,) seconds.

    A share ``targeted`` of the ads names countries (its own and up to three others), half as many name placements (one
    or two), half as many ended within 30 days after ``log_end`` (seconds), and a quarter as many are paused; each of
    these apart from the others. Bids are log-normal around 1.
    """
    draw = _Draws(number, seed)
    share = 1.0 / np.arange(1, len(countries) + 1)
    taste = np.log(share) + np.stack([draw.gumbel(f"country {c}") for c in countries], axis=1)
    taste[np.arange(len(number)), country] = np.inf
    wanted = np.where(draw.uniform("countries") < targeted, 1 + (4 * draw.uniform("how many")).astype(int), 0)
    liked = np.stack([draw.uniform(f"placement {p}") for p in PLACEMENTS], axis=1)
    places = np.where(
        draw.uniform("placements") < targeted / 2, 1 + (2 * draw.uniform("how many places")).astype(int), 0
    )
    ended = draw.uniform("ended") < targeted / 2
    end = log_end + 30 * DAY * draw.uniform("end")
    normal = np.sqrt(-2 * np.log(draw.uniform("bid"))) * np.cos(2 * np.pi * draw.uniform("bid, angle"))
    return {
        "country": _best_names(taste, wanted, countries),
        "placement": _best_names(liked, places, PLACEMENTS),
        "start_time": pa.array(start_time),
        "end_time": pa.array(np.floor(end), mask=~ended),
        "paused": pa.array(draw.uniform("paused") < targeted / 4),
        "bid": pa.array(np.exp(0.5 * normal).astype(np.float32)),
    }


class _Draws:
    def __init__(self, number: np.ndarray, seed: int) -> None:
        self._number, self._seed = number.astype(np.uint64), seed

    def uniform(self, purpose: str) -> np.ndarray:
        """(R,) float64 above 0 and below 1."""
        begin = np.random.SeedSequence([self._seed, *purpose.encode()]).generate_state(1, np.uint64)[0]
        # The finaliser of splitmix64 (Steele, Lea and Flood 2014); its additions are to wrap.
        z = begin + self._number * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        return ((z >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52

    def gumbel(self, purpose: str) -> np.ndarray:
        return -np.log(-np.log(self.uniform(purpose)))


def _best_names(score: np.ndarray, count: np.ndarray, names: tuple[str, ...]) -> pa.Array:
    """Per row of score (R, n) the ``count`` (R,) names with the largest score, largest first; null for none."""
    order = np.argsort(-score, axis=1, kind="stable")
    chosen = np.arange(score.shape[1]) < count[:, None]
    ends = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
    values = pa.array(np.array(names)[order[chosen]])
    return pa.ListArray.from_arrays(pa.array(ends, mask=np.append(count == 0, False)), values)
