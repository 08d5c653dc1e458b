"""ZCA whitening of small images: as MTT and DATM use it on CIFAR in place of mean and std, and as FRePo does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


ROOT_SHARE = 0.1  # of the mean eigenvalue, added to all (FRePo)


@dataclass(frozen=True)
class Whitening:
    """FRePo's preprocessing: channels to mean 0 and deviation 1, then (x - center) W, which can be inverted.

    W = U diag((s + 0.1 mean(s))^-1/2) U^T for the covariance U diag(s) U^T of standardized pixels.
    """

    mean: Tensor  # (3,) float32 of the channels
    std: Tensor  # (3,)
    center: Tensor | None = None  # (D,) float32, D = 3 S S; None: channels are standardized and that is all
    matrix: Tensor | None = None  # (D, D) W
    inverse: Tensor | None = None  # (D, D) W^-1

    def to(self, device: torch.device | str) -> Whitening:
        """The same on a device."""
        return Whitening(**{k: v.to(device) for k, v in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name, without those that are None."""
        fields = {k: getattr(self, k) for k in ("mean", "std", "center", "matrix", "inverse")}
        return {k: v for k, v in fields.items() if v is not None}

    def __call__(self, images: Tensor) -> Tensor:
        """Whitened images (B, 3, S, S) float32 of images that are uint8 or float, 1 being white."""
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        w = self.to(x.device)
        x = (x - w.mean.view(-1, 1, 1)) / w.std.view(-1, 1, 1)
        return x if w.center is None or w.matrix is None else ((x.flatten(1) - w.center) @ w.matrix).view_as(x)

    def invert(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) of whitened ones; pixels may leave [0, 1]."""
        w = self.to(x.device)
        if w.center is not None and w.inverse is not None:
            x = (x.flatten(1) @ w.inverse + w.center).view_as(x)
        return x * w.std.view(-1, 1, 1) + w.mean.view(-1, 1, 1)

    def summary(self) -> dict[str, Any]:
        """Numbers by which a whitening fitted on other images is told apart, as plain data."""
        facts: dict[str, Any] = {"recipe": "frepo" if self.matrix is not None else "standardize"}
        facts |= {"mean": self.mean.tolist(), "std": self.std.tolist()}
        if self.matrix is not None and self.center is not None:
            diagonal = self.matrix.diagonal()
            facts |= {"pixels": len(self.center), "diagonal": [float(diagonal.mean()), float(diagonal.std())]}
        return facts


def same_whitening(a: Mapping[str, Any], b: Mapping[str, Any], *, tolerance: float = 0.02) -> bool:
    """Whether two summaries of `Whitening` are of the same preprocessing, up to rounding and a few left-out images."""
    if a.get("recipe") != b.get("recipe") or a.get("pixels") != b.get("pixels"):
        return False
    rows = [(a[k], b[k]) for k in ("mean", "std", "diagonal") if k in a]
    return all(abs(x - y) <= tolerance * abs(y) for left, right in rows for x, y in zip(left, right))


def is_grey(images: Tensor) -> bool:
    """Whether the three channels of all images (N, 3, S, S) are equal."""
    return bool((images[:, :1] == images[:, 1:]).all())


def fit_whitening(images: Tensor, *, zca: bool | None = None) -> Whitening:
    """Fit FRePo's preprocessing on train images (N, 3, S, S), as released: the ridge of the covariance is a tenth of
    its mean eigenvalue, and with N < D the scalings beyond the N largest eigenvalues are 1.

    Channel means and deviations are measured here; the released code has constants for its data sets.

    Args:
        zca: whether to go on after the channels; None: unless the images are grey, as the released code does not
            whiten MNIST and Fashion-MNIST.
    """
    n = len(images)
    sums, squares = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for chunk in images.split(CHUNK):
        c = (chunk.double() / 255 if chunk.dtype == torch.uint8 else chunk.double()).cpu()
        sums += c.sum((0, 2, 3))
        squares += c.square().sum((0, 2, 3))
    mean = sums / (n * images[0, 0].numel())
    # a constant channel (white paper) would divide by zero
    std = (squares / (n * images[0, 0].numel()) - mean.square()).clamp(min=1e-4).sqrt()
    plain = Whitening(mean.float(), std.float())
    if not (not is_grey(images) if zca is None else zca):
        return plain
    width = images[0].numel()
    total, products = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for chunk in images.split(CHUNK):
        x = plain(chunk).flatten(1).cpu()
        total += x.sum(0)
        products += x.T @ x
    center = total / n
    values, vectors = torch.linalg.eigh(products / n - center[:, None] * center)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)  # largest first
    scaling = (values + ROOT_SHARE * values.mean()).rsqrt()
    scaling[n:] = 1.0
    matrix, inverse = (vectors * scaling) @ vectors.T, (vectors / scaling) @ vectors.T
    return Whitening(plain.mean, plain.std, center.float(), matrix.float(), inverse.float())
