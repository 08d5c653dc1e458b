"""Measures of images before and after a refinement."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dq.core.plain import PlainDict
from dq.networks.teacher import Teacher


def measure(
    images: Tensor, labels: Tensor, anchor: Tensor, teachers: Sequence[Teacher], validation_teachers: Sequence[Teacher]
) -> PlainDict:
    """Sum hits, cross-entropy, total variation and distance over a batch.

    Of float images (B, 3, S, S) in [0, 1]: hits and cross-entropy of every teacher and validation teacher, total
    variation, and root mean squared distance to the anchor, both in gray levels.
    """

    def measured(t: Teacher) -> PlainDict:
        logits = t.logits(images)
        hits = int((logits.argmax(1) == labels).sum())
        return {"name": t.name, "hits": hits, "cross_entropy": float(F.cross_entropy(logits, labels, reduction="sum"))}

    distance = (images - anchor).square().mean((1, 2, 3)).sqrt() * 255
    return {
        "teachers": [measured(t) for t in teachers],
        "validation_teachers": [measured(t) for t in validation_teachers],
        "variation": float(total_variation(images).sum()),
        "anchor_distance": float(distance.sum()),
    }


def summarize(records: Sequence[PlainDict]) -> PlainDict:
    """Means before and after of the measures of all batches."""
    total = sum(r["images"] for r in records)
    summary: PlainDict = {"images": total, "batches": len(records)}
    for when in ("before", "after"):
        sums = [r[when] for r in records]
        summary[when] = {k: round(sum(s[k] for s in sums) / total, 4) for k in ("variation", "anchor_distance")}
        for group in ("teachers", "validation_teachers"):
            summary[when][group] = [
                {
                    "name": sums[0][group][i]["name"],
                    "accuracy": round(sum(s[group][i]["hits"] for s in sums) / total, 5),
                    "cross_entropy": round(sum(s[group][i]["cross_entropy"] for s in sums) / total, 5),
                }
                for i in range(len(sums[0][group]))
            ]
    return summary


def sentence(summary: PlainDict) -> str:
    """One line on a stage, for a log."""

    def mean(when: str, group: str) -> str:
        values = [t["accuracy"] for t in summary[when][group]]
        return f"{100 * sum(values) / len(values):.1f} %"

    parts = [
        f"{group.replace('_', ' ')} {mean('before', group)} -> {mean('after', group)}"
        for group in ("teachers", "validation_teachers")
        if summary["after"][group]
    ]
    return ", ".join([*parts, f"{summary['after']['anchor_distance']:.1f} gray levels from the anchors"])


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference (N,) of neighboring pixels, in gray levels.

    Of images (N, 3, S, S), uint8 or float in [0, 1].
    """
    x = images.float() if images.dtype == torch.uint8 else images * 255
    down, right = (x[:, :, 1:] - x[:, :, :-1]).abs(), (x[..., 1:] - x[..., :-1]).abs()
    return (down.mean((1, 2, 3)) + right.mean((1, 2, 3))) / 2
