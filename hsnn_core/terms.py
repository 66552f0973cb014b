"""A user's terms in an interaction, and what they weigh.

A term weighs as often as the user has it; in an interaction that fades, its occurrences lose weight with age. Via lists
the r-th term of a list weighs 1/√r of the first, and of several lists that name a term the weights add up. All weights
are whole numbers, so that sums do not depend on their order. Letters: B users, S ids of a user, L terms of a list.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .schema import ID_PADDING

#: what a sequence's most recent occurrence weighs where the interaction fades
FRESH = 256
#: what the first term in the list of the most recent item weighs
LIST_FIRST = 4096


class Terms(NamedTuple):
    """The users' terms in one interaction: ``terms`` (B, M) int32 ascending and different within a user, 0
    beyond; ``weights`` (B, M) int32 of their occurrences, summed; ``totals`` (B,) int64."""

    terms: np.ndarray
    weights: np.ndarray
    totals: np.ndarray


def occurrence_weights(ids: np.ndarray, fade: float) -> np.ndarray:
    """(B, S) int32: what every position of ids (B, S), padded at the end, weighs; 1 without fading, else at least 1 and
    `FRESH` times fade to the power of the age, which is 0 at the last position."""
    if fade == 1.0:
        return np.ones(ids.shape, np.int32)
    by_age = np.maximum(1, np.round(FRESH * fade ** np.arange(ids.shape[1]))).astype(np.int32)
    return by_age[_ages(ids)]


def place_weights(length: int) -> np.ndarray:
    """(L,) float64: what the terms of a list weigh by their places, 1 the first."""
    weights: np.ndarray = 1 / np.sqrt(1 + np.arange(length))
    return weights


def list_weights(ids: np.ndarray, fade: float, length: int) -> np.ndarray:
    """(B, S, L) int32: what the terms of every position's list of ``length`` weigh, at least 1: `LIST_FIRST` times fade
    to the power of the position's age, by the root of the place."""
    by_age = fade ** np.arange(ids.shape[1])
    weights = np.round(LIST_FIRST * by_age[:, None] * place_weights(length))
    weights = np.maximum(1, weights).astype(np.int32)
    return weights[_ages(ids)]


def _ages(ids: np.ndarray) -> np.ndarray:
    """(B, S): 0 at the last position of ids (B, S), padded at the end, 1 before it, and so on."""
    length = (ids != ID_PADDING).sum(axis=1, keepdims=True)
    return np.maximum(length - 1 - np.arange(ids.shape[1]), 0)


def summed(terms: np.ndarray, weights: np.ndarray) -> Terms:
    """terms (B, n) with zeros anywhere, weights (B, n) -> each user's different terms and their summed weights."""
    batch, width = terms.shape
    # A term and its weight in one number, which sorts faster than an order of the terms is found. Stable, because
    # quicksort takes four times as long where most are padding.
    packed = terms.astype(np.int64)
    packed <<= 32
    packed |= weights
    packed.sort(axis=1, kind="stable")
    ordered = (packed >> 32).astype(np.int32)
    running = np.zeros((batch, width + 1), np.int32)
    np.cumsum(packed.astype(np.int32), axis=1, out=running[:, 1:])
    first = ordered > ID_PADDING
    first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    user, column = np.nonzero(first)
    # A run of equal terms ends where the next one starts, the last of a user at the end of the row.
    last = np.ones(len(user), dtype=bool)
    last[:-1] = user[1:] != user[:-1]
    ends = np.where(last, width, np.append(column[1:], width)[: len(column)])
    different = first.sum(axis=1)
    place = np.arange(len(user)) - (different.cumsum() - different)[user]
    shape = (batch, int(different.max(initial=0)))
    found, sums = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    found[user, place] = ordered[user, column]
    sums[user, place] = running[user, ends] - running[user, column]
    return Terms(found, sums, sums.sum(axis=1, dtype=np.int64))


def most_list_weight(positions: int, length: int) -> float:
    """The most that a term can weigh via lists of ``length``, of a user of so many ``positions``."""
    return LIST_FIRST * positions * float(place_weights(length).sum())
