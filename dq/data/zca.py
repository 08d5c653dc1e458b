"""ZCA whitening of small images, as MTT and DATM use it on CIFAR in place of mean and std."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1000  # images at once


@dataclass(frozen=True)
class Zca:
    """x -> (x - mean) W with W = U diag((s + eps)^-1/2) U^T, where U diag(s) U^T is the covariance of the pixels."""

    mean: Tensor  # (D,) float32, D = 3 S S
    matrix: Tensor  # (D, D) float32, symmetric

    def __call__(self, images: Tensor) -> Tensor:
        """Whitened images (B, 3, S, S) float32 of images that are uint8 or float in [0, 1]."""
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        mean, matrix = self.mean.to(x.device), self.matrix.to(x.device)
        return ((x.flatten(1) - mean) @ matrix).view_as(x)


def fit_zca(images: Tensor, *, eps: float = 0.1) -> Zca:
    """Fit on train images (N, 3, S, S), not normalised, with eps = 0.1 as released (MTT, Cazenavette et al. 2022).

    Costs N D^2 + D^3 operations; meant for images of 32 px.
    """
    n, width = len(images), images[0].numel()
    total, square = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for chunk in images.split(CHUNK):
        x = (chunk.float() / 255 if chunk.dtype == torch.uint8 else chunk.float()).flatten(1).cpu()
        total += x.sum(0)
        square += x.T @ x
    mean = total / n
    covariance = square / n - mean[:, None] * mean
    values, vectors = torch.linalg.eigh(covariance)
    matrix = (vectors * (values.clamp(min=0) + eps).rsqrt()) @ vectors.T
    return Zca(mean.float(), matrix.float())
