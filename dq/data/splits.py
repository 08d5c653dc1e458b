"""Validation rows, and images at another side."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dq.core.seeds import generator


def resized(images: Tensor, side: int, *, bounded: bool = True) -> Tensor:
    """Resize images (N, 3, S, S) to `side` px, bicubic and antialiased.

    Returns the same tensor if they have that size.
    """
    if images.shape[-1] == side:
        return images
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True)
    x = x.clamp(0, 1) if bounded else x
    return (x * 255).round().to(torch.uint8) if images.dtype == torch.uint8 else x


def validation_rows(labels: np.ndarray, total: int) -> np.ndarray:
    """Return rows of a stratified part of train.

    About `total` images, at most a fifth of a class. The same for every evaluation of a data set, so that sets are
    compared on the same images.
    """
    classes = np.unique(labels)
    chosen = []
    for label in classes:
        rows = np.flatnonzero(labels == label)
        count = min(max(1, round(total / len(classes))), len(rows) // 5)
        order = torch.randperm(len(rows), generator=generator("validation", int(label)))
        chosen.append(rows[order[:count].numpy()])
    return np.sort(np.concatenate(chosen))
