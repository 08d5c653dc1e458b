"""The space in which the images of a class are clustered.

k-means in another space than that of the latents groups images by other similarities; its prototypes stay latents, the
means of the cells (`dq.cluster.prototypes`).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from dq.cluster.inputs import as_points, as_rows
from dq.config.schema import ClusterConfig
from dq.core.errors import InputError
from dq.core.numbers import whole_number

DIMS = 64  # principal directions where `dims` is None
RIDGE = 1e-6  # added to every variance before whitening, in units of the largest


def embed(latents: object, features: Any, config: ClusterConfig) -> Tensor:
    """Embed the images of one class as points (n, d) in the space of k-means.

    float32, but float64 where latents or features that are not rescaled are float64. With rows z_i of the latents and
    f_i of the features, s_z^2 and s_f^2 their total variances (the mean squared distance to the mean), `config.space`
    is
        latents   z
        pca       <z - mean, v_j> for the `dims` leading principal directions v_j of the class
        whitened  the same over sqrt(var_j + RIDGE var_1)
        features  f as the teacher gives it: neither centered, which k-means does not see, nor l2-normalized
        joint     [(z - mean) / s_z, sqrt(feature_weight) (f - mean) / s_f]

    Args:
        latents: (n, C, h, w) or (n, d), of any float type.
        features: (n, D) on the same device, rows as those of the latents; None where the space has no use for them.
        config: names the space.

    Raises:
        InputError: if the space needs features and there are none, or not as many as latents.
    """
    z = as_rows(latents, "latents")
    if config.space == "latents":
        return z
    if config.space in ("pca", "whitened"):
        return principal_coordinates(z, config.dims, whiten=config.space == "whitened")
    if features is None or len(features) != len(z):
        count = "none" if features is None else len(features)
        raise InputError(
            f"cluster.space={config.space} compares {len(z)} images by their features, of which there are {count}; "
            "give those of a teacher, a row for each image"
        )
    f = as_rows(features, "features").to(z.device)
    if config.space == "features":
        return f
    return torch.cat([_unit_variance(z), math.sqrt(config.feature_weight) * _unit_variance(f)], 1)


def principal_coordinates(x: object, dims: int | None = None, *, whiten: bool = False) -> Tensor:
    """Coordinates (n, r) float32 of x (n, d) along its principal directions.

    Largest variance first. Exact: an eigendecomposition in float64 of the d x d or the n x n products, whichever is
    smaller. Every direction points to where its entry of largest size is positive.

    Args:
        x: (n, d) finite points.
        dims: number of directions; None: 64. There are never more than the rank of the centered x, and one (of zeros)
            where all points are equal.
        whiten: divide each coordinate by its standard deviation. With as many directions as points less one that
            puts all points at one distance, and a warning says so.
    """
    x = as_points(x, "x", finite=True)
    dims = DIMS if dims is None else whole_number(dims, "dims")
    n, d = x.shape
    shifted = x.double() - x[0].double()  # equal points become exact zeros
    centered = shifted - shifted.mean(0)
    values, vectors = torch.linalg.eigh(centered @ centered.T if n < d else centered.T @ centered)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = int((values > max(n, d) * torch.finfo(torch.float64).eps * values[0]).sum())
    r = min(rank, dims)
    if not r:
        return x.new_zeros(n, 1, dtype=torch.float32)
    values, vectors = values[:r], vectors[:, :r]
    if n < d:
        coordinates, directions = vectors * values.sqrt(), centered.T @ vectors
    else:
        coordinates, directions = centered @ vectors, vectors
    size = directions.abs()
    pivot = (size >= (1 - 1e-6) * size.amax(0)).int().argmax(0)  # the first of those that rounding could exchange
    coordinates = coordinates * directions.gather(0, pivot[None]).sign()
    if whiten:
        if r >= n - 1 and n > 2:
            sentence = f"whitening {n} images in {r} directions puts all of them at one distance"
            warnings.warn(f"{sentence}; set cluster.dims far below {n}", stacklevel=3)
        variances = values / n
        coordinates = coordinates / (variances + RIDGE * variances[0]).sqrt()
    return coordinates.float()


def _unit_variance(x: Tensor) -> Tensor:
    """Standardize x (n, d) to total variance 1; zeros for equal points."""
    centered = x - x.mean(0)
    variance = centered.double().square().sum() / len(x)
    return (centered / variance.sqrt().clamp(min=1e-30)).float()
