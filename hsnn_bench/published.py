"""Figures as others printed them, full ranking over all items on the same splits; nothing here was run by us."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A model's printed figures, by names like "recall@10" (HR@10 where every request has one relevant item)."""

    model: str
    figures: Mapping[str, float]
    source: str


def _ten(hit_rate: float, ndcg: float) -> dict[str, float]:
    return {"recall@10": hit_rate, "ndcg@10": ndcg}


S3REC = "Zhou et al., S3-Rec, CIKM 2020"

PUBLISHED: dict[str, tuple[Published, ...]] = {
    "beauty": (
        Published("SASRec", _ten(0.0605, 0.0318), S3REC),
        Published("S3-Rec", _ten(0.0647, 0.0327), S3REC),
        Published("TIGER", _ten(0.0648, 0.0384), "Rajput et al., NeurIPS 2023"),
        Published("ActionPiece", _ten(0.0775, 0.0424), "Hou et al., ICML 2025; HR@10 rounded"),
        Published("SASRec, full cross-entropy", _ten(0.0821, 0.0405), "a public run, issue LETTER#20"),
    ),
    "toys": (
        Published("SASRec", _ten(0.0675, 0.0374), S3REC),
        Published("S3-Rec", _ten(0.0700, 0.0376), S3REC),
    ),
    "gowalla": (
        Published("LightGCN, 3 layers", {"recall@20": 0.1824, "ndcg@20": 0.1547}, "He et al., SIGIR 2020"),
    ),
}
