"""Moments of the inputs of batch norm layers, and their distances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean and biased variance by channel, (C,) or, of several, (n, C)."""

    mean: Tensor
    var: Tensor

    def split(self, channels: Sequence[int]) -> list[Moments]:
        """Split the last dimension into layers of so many channels."""
        sizes = list(channels)
        parts = zip(self.mean.split(sizes, -1), self.var.split(sizes, -1), strict=True)
        return [Moments(m, v) for m, v in parts]


def pool_moments(parts: Moments, counts: Tensor) -> Moments:
    """Moments (C,) float64 of the union of parts, in closed form.

        mean = sum_i n_i mean_i / n,    var = sum_i n_i (var_i + (mean_i - mean)^2) / n    (law of total variance)

    Exact for images that are seen in evaluation mode, whose inputs of a layer do not depend on the rest of a batch.

    Args:
        parts: (P, C) moments of images or of groups of images.
        counts: (P,) images of each.
    """
    share = (counts.double() / counts.sum())[:, None]
    mean, var = parts.mean.double(), parts.var.double()
    total = (share * mean).sum(0)
    return Moments(total, (share * (var + (mean - total).square())).sum(0))


def gps(moments: Sequence[Moments], reference: Sequence[Moments], *, beta: float = 1.0, eps: float = 1e-6) -> Tensor:
    """Difficulty (n,) of images by their distance to running statistics (PSM, arXiv 2609.34299).

        GPS(x) = mean_l [ |mu_l(x) - m_l|_2 + beta |log((s_l(x) + eps) / (v_l + eps))|_2 ] / sqrt(C_l)

    Args:
        moments: of each layer l: mean mu_l and variance s_l (n, C_l) over the pixels of each image.
        reference: of each layer: m_l and v_l (C_l,), the running statistics.
        beta: weight of the variances.
        eps: added to variances.
    """
    terms = []
    for image, running in zip(moments, reference, strict=True):
        shift = torch.linalg.vector_norm(image.mean - running.mean, dim=1)
        scale = torch.linalg.vector_norm(torch.log((image.var + eps) / (running.var + eps)), dim=1)
        terms.append((shift + beta * scale) / math.sqrt(image.mean.shape[1]))
    return torch.stack(terms).mean(0)
