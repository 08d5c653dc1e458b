"""Storage format of the logits of one epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from dq.config.students import RelabelConfig


def pack(logits: Tensor, relabel: RelabelConfig) -> dict[str, Tensor]:
    """Pack logits (N, C) of one epoch for storage.

    16 bits: float16. 8 bits: 256 even steps from the least to the largest of the epoch. top_k: the k largest of each
    row as distances above the mean of the others; softmax does not depend on the constant that is lost.
    """
    if relabel.top_k is None:
        if relabel.bits == 16:
            return {"logits": logits.half()}
        low, high = logits.min(), logits.max()
        steps = (logits - low) / (high - low).clamp(min=1e-12) * 255
        return {"logits": steps.round().to(torch.uint8), "range": torch.stack([low, high])}
    values, index = logits.topk(relabel.top_k, dim=1)
    mean_of_others = (logits.sum(1) - values.sum(1)) / (logits.shape[1] - relabel.top_k)
    above = values - mean_of_others[:, None]
    packed = {"index": index.to(torch.uint8 if logits.shape[1] <= 256 else torch.int16)}
    if relabel.bits == 16:
        return {**packed, "above": above.half()}
    high = above.max()
    steps = (above / high.clamp(min=1e-12) * 255).round().to(torch.uint8)
    return {**packed, "above": steps, "range": torch.stack([torch.zeros_like(high), high])}


def unpack(packed: dict[str, Tensor], classes: int) -> Tensor:
    """Unpack logits (N, C) float32; with top_k up to a constant in each row."""
    values = packed["logits"] if "logits" in packed else packed["above"]
    if "range" in packed:
        low, high = packed["range"].float()
        values = values.float() / 255 * (high - low) + low
    values = values.float()
    if "index" not in packed:
        return values
    return torch.zeros(len(values), classes).scatter_(1, packed["index"].long(), values)
