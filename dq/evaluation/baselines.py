"""Real images to compare with: a random subset of equal size."""

from __future__ import annotations

import numpy as np
import torch

from dq.dist import generator
from dq.errors import InputError


def random_rows(labels: np.ndarray, ipc: int, seed: int) -> np.ndarray:
    """Rows of a stratified random subset, drawn without replacement: `ipc` of every class, in class order.

    A class with fewer than `ipc` images gives all that it has, as a distilled set of that size does. Another seed
    draws another subset; the draw within a class depends on nothing but the seed, the class and its size.

    Args:
        labels: (n,) class indices.
        ipc: images per class.
        seed: of the draw.

    Returns:
        (rows,) int64, ascending within each class.
    """
    if ipc < 1:
        raise InputError(f"a random subset needs at least 1 image per class, not {ipc}")
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        order = torch.randperm(len(rows), generator=generator(seed, "random rows", int(label)))
        chosen.append(np.sort(rows[order[:ipc].numpy()]))
    return np.concatenate(chosen).astype(np.int64)
