"""Figures of paper §4: normalised entropy, calibration, Recall@K."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean log loss of logits (S,) against labels (S,) in 0..1, computed from logits so that it never
    overflows."""
    logits = logits.astype(np.float64)
    return float(np.mean(np.maximum(logits, 0) - logits * labels + np.log1p(np.exp(-np.abs(logits)))))


def normalised_entropy(logits: np.ndarray, labels: np.ndarray, base_rate: float) -> float:
    """NE (paper §4): mean log loss over the log loss of always predicting ``base_rate``, the *training* set's.

    Raises ValueError for a base rate that is not strictly between 0 and 1: NE is undefined there.
    """
    if not 0.0 < base_rate < 1.0:
        raise ValueError(f"normalised entropy: base rate {base_rate} is not between 0 and 1")
    y = labels.astype(np.float64)
    reference = -np.mean(y * np.log(base_rate) + (1 - y) * np.log1p(-base_rate))
    return log_loss(logits, labels) / float(reference)


def calibration(logits: np.ndarray, labels: np.ndarray) -> float:
    """Predicted mean over observed mean; 1 is calibrated, above 1 over-predicts. NaN without positives."""
    observed = float(np.mean(labels, dtype=np.float64))
    predicted = float(np.mean(1.0 / (1.0 + np.exp(-logits.astype(np.float64)))))
    return predicted / observed if observed > 0 else float("nan")


def recall_at(retrieved: np.ndarray, valid: np.ndarray, relevant: Sequence[np.ndarray], k: int) -> float:
    """Recall@K over the whole corpus: per request the share of its relevant items among its first k, averaged
    over requests that have any.

    retrieved (B, K) item ids or rows, valid (B,) rows that count, relevant: per request an array of ids.
    """
    shares = [
        len(np.intersect1d(row[: min(k, n)], wanted)) / len(np.unique(wanted))
        for row, n, wanted in zip(retrieved, valid, relevant)
        if len(wanted)
    ]
    return float(np.mean(shares)) if shares else float("nan")


def ndcg_at(retrieved: np.ndarray, valid: np.ndarray, relevant: Sequence[np.ndarray], k: int) -> float:
    """NDCG@K with binary relevance, ideal DCG over min(k, relevant) items, averaged over requests."""
    gains = 1.0 / np.log2(np.arange(2, k + 2))
    scores = []
    for row, n, wanted in zip(retrieved, valid, relevant):
        if not len(wanted):
            continue
        hits = np.isin(row[: min(k, n)], wanted)
        scores.append(
            float((gains[: len(hits)] * hits).sum() / gains[: min(k, len(np.unique(wanted)))].sum())
        )
    return float(np.mean(scores)) if scores else float("nan")


def search_recall(
    found: np.ndarray, found_valid: np.ndarray, exact: np.ndarray, exact_valid: np.ndarray
) -> float:
    """Share of the exhaustive top-K that the layer-wise search returned, averaged over requests."""
    shares = [
        len(np.intersect1d(f[:fn], e[:en])) / en
        for f, fn, e, en in zip(found, found_valid, exact, exact_valid)
        if en
    ]
    return float(np.mean(shares)) if shares else float("nan")
