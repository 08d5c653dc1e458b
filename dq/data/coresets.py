"""Selection rules on features: random, herding, k-center."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dq.core.errors import InputError
from dq.core.seeds import generator


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


def herding_rows(features: Tensor, labels: np.ndarray, ipc: int) -> np.ndarray:
    """Rows of a greedy coreset whose mean follows the class mean (herding, Welling 2009; as in iCaRL, without
    replacement).

    Pick t of a class minimises |mu - (f_1 + ... + f_{t-1} + f) / t| over the points f not yet picked; ties go to the
    lowest row. A class with fewer than `ipc` images gives all that it has.

    Args:
        features: (n, d) float, the space in which images are compared.
        labels: (n,) class indices.
        ipc: images per class.

    Returns:
        (rows,) int64 in class order, within a class in the order of picking.
    """
    chosen = []
    for _, rows, x in _centred_classes(features, labels, ipc):
        square = x.square().sum(1)
        total = torch.zeros_like(x[0])
        free = torch.zeros_like(square)  # infinite where a point is taken
        for _ in range(min(ipc, len(rows))):
            # x is centred, so |mu - (total + f) / t| is |total + f| / t; |total|^2 is the same for all
            pick = int((square + 2 * (x @ total) + free).argmin())
            free[pick] = torch.inf
            total = total + x[pick]
            chosen.append(rows[pick])
    return np.array(chosen, np.int64)


def k_center_rows(features: Tensor, labels: np.ndarray, ipc: int) -> np.ndarray:
    """Rows of the greedy solution of the k-centre problem in every class (Gonzalez 1985; for coresets Sener & Savarese
    2018): its covering radius is at most twice the smallest possible one.

    The first centre is the point nearest to the class mean, every further one the point farthest from the centres so
    far; ties go to the lowest row. Arguments and result as for `herding_rows`.
    """
    chosen = []
    for _, rows, x in _centred_classes(features, labels, ipc):
        pick = int(x.square().sum(1).argmin())
        distance = torch.full_like(x[:, 0], torch.inf)
        for _ in range(min(ipc, len(rows))):
            chosen.append(rows[pick])
            # a centre is below every distance, so that copies of it are picked before it is picked again
            distance = torch.minimum(distance, (x - x[pick]).square().sum(1))
            distance[pick] = -1
            pick = int(distance.argmax())
    return np.array(chosen, np.int64)


def _centred_classes(features: Tensor, labels: np.ndarray, ipc: int) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """Of every class: its index, its rows, and its features (n, d) as float64 with mean zero."""
    if ipc < 1:
        raise InputError(f"a selection needs at least 1 image per class, not {ipc}")
    if features.ndim != 2 or len(features) != len(labels):
        raise InputError(f"features must be ({len(labels)}, d), a row per label, not {tuple(features.shape)}")
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        x = features[torch.from_numpy(rows)].detach().cpu().double()
        bad = (~torch.isfinite(x)).any(1).nonzero()
        if len(bad):
            raise InputError(
                f"features have NaN or infinite values, first in row {rows[int(bad[0])]}; make them again"
            )
        yield int(label), rows, x - x.mean(0)
