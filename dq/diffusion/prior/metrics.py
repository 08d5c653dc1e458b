"""Distances between sets of features, coverage, and near copies.

Functions take arrays of features (n, d) and compute in float64. Distances of features are Euclidean and exact to about
1e-8 of the features' norm. (torchmetrics and torch-fidelity have the first two of these distances with features of
Inception's network, which they fetch, and torchvision.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq.core.errors import InputError
from dq.core.seeds import generator

MM = "use_mm_for_euclid_dist"
ROWS = 1024  # rows of each side whose distances are in memory at once
PERCENTILE = 1.0  # of test-to-train distances: a sample nearer than that is as near as the nearest of the test images


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared Fréchet distance of Gaussians with the moments of two sets.

    Of features (n, d) and (m, d), by Heusel et al. (2017, equation 6):

        |m_x - m_y|^2 + Tr(S_x + S_y - 2 (S_x S_y)^(1/2)).

    With S_x = X'X for the centered rows X over sqrt(n - 1), the last trace is the sum of the singular values of XY'.
    So no root of a matrix is taken, and sets with fewer rows than dimensions need no special case. There the
    covariance is singular and the distance is still defined. It is biased upwards, the more the fewer rows (Chong &
    Forsyth 2020): compare values of equal n only, and with that of real images of the same n.

    Raises:
        InputError: for fewer than two rows, unequal dimensions, or values that are not finite.
    """
    x, y = _checked(x, y, at_least=2)
    mx, my = x.mean(0), y.mean(0)
    a, b = ((v - m) / (len(v) - 1) ** 0.5 for v, m in ((x, mx), (y, my)))
    spread = a.square().sum() + b.square().sum()
    # an orthogonal factor does not change singular values
    overlap = torch.linalg.svdvals(_triangle(a) @ _triangle(b).T).sum()
    return max(0.0, float((mx - my).square().sum() + spread - 2 * overlap))


def kernel_distance(
    x: Tensor, y: Tensor, *, subsets: int = 100, size: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance (Binkowski et al. 2018) of two sets of features.

    The unbiased squared maximum mean discrepancy of (n, d) and (m, d) under the kernel (x.y / d + 1)^3, mean and
    standard deviation over seeded subsets without replacement. `size` is the number of rows of a subset of either set;
    None: half of the smaller set, at most 1,000.

    Being unbiased it may be negative. Subsets of one set overlap: the deviation is that of a subset of this size, not
    the error of the mean.

    Raises:
        InputError: if `size` is below 2 or above the smaller set.
    """
    x, y = _checked(x, y, at_least=2)
    n = min(len(x), len(y))
    size = max(2, min(1000, n // 2)) if size is None else size
    if not 2 <= size <= n or subsets < 1:
        raise InputError(f"{subsets} subsets of {size} rows cannot be drawn from {n}; choose 2 to {n} rows")
    distances = []
    for s in range(subsets):
        g = generator(seed, "kernel distance", s)
        a, b = (v[torch.randperm(len(v), generator=g)[:size]] for v in (x, y))
        pairs = size * (size - 1)
        inner = sum((k.sum() - k.diagonal().sum()) / pairs for k in (_cubic(a, a), _cubic(b, b)))
        distances.append(inner - 2 * _cubic(a, b).mean())
    values = torch.stack(distances)
    return float(values.mean()), float(values.std(correction=0))


def density_coverage(real: Tensor, fake: Tensor, k: int = 5, *, rows: int = ROWS) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, equations 4 and 5).

    Of real features (n, d) and fake ones (m, d). Around every real row lies the ball that reaches its k-th nearest
    real neighbor. Density is the number of balls that hold a fake row, over k, in the mean over fake rows: about 1 for
    the same distribution, and not bounded by it. Coverage is the share of balls that hold any fake row, in [0, 1].
    `rows` of each side have their distances in memory at once (8 rows^2 bytes).

    Raises:
        InputError: if there are not more than k real rows.
    """
    real, fake = _checked(real, fake, at_least=1)
    if len(real) <= k:
        raise InputError(f"{len(real)} real images have no {k} neighbors each; give more, or fewer neighbors")
    inside, covered = 0, 0
    radii = nearest(real, real, k + 1, rows=rows)[0][:, k]  # the nearest of all is the row itself
    for ball, radius in zip(real.split(rows), radii.split(rows), strict=True):
        held = torch.zeros(len(ball), dtype=torch.bool)
        for part in fake.split(rows):
            within = torch.cdist(ball, part, compute_mode=MM) < radius[:, None]
            inside += int(within.sum())
            held |= within.any(1)
        covered += int(held.sum())
    return inside / (k * len(fake)), covered / len(real)


def nearest(x: Tensor, y: Tensor, k: int = 1, *, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """The k nearest rows of y for every row of x.

    For x (n, d) and y (m, d) distances (n, k) float64, ascending, and indices (n, k).

    Raises:
        InputError: if y has fewer than k rows.
    """
    if len(y) < k:
        raise InputError(f"{len(y)} rows have no {k} nearest; give more, or fewer neighbors")
    distances, indices = [], []
    for part in x.split(rows):
        part = part.double()
        d, i = part.new_empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.int64)
        for first in range(0, len(y), rows):
            block = torch.cdist(part, y[first : first + rows].double(), compute_mode=MM)
            d = torch.cat([d, block], 1)
            i = torch.cat([i, torch.arange(first, first + block.shape[1]).expand(len(part), -1)], 1)
            d, order = d.topk(min(k, d.shape[1]), largest=False)
            i = i.gather(1, order)
        distances.append(d)
        indices.append(i)
    return torch.cat(distances), torch.cat(indices)


def nearest_ratio(distances: Tensor, usual: Tensor, percentile: float = PERCENTILE) -> tuple[float, float]:
    """Whether samples lie nearer to train images than test images do.

    Args:
        distances: (n,) of every sample to its nearest train image.
        usual: (m,) of every test image to its nearest train image.
        percentile: of `usual`, below which a sample counts as near.

    Returns:
        The share of samples that are near, `percentile` / 100 for samples like test images; and the median of
        `distances` over that of `usual`, 1 for those, 0 for copies.

    Raises:
        InputError: if half of the test images are themselves copies of train images.
    """
    median = float(usual.double().median())
    if median == 0:
        raise InputError("most test images are train images; name another split with --set source.test_split=NAME")
    near = distances.double() < torch.quantile(usual.double(), percentile / 100)
    return float(near.double().mean()), float(distances.double().median()) / median


def least_rmse(images: Tensor, candidates: Tensor) -> Tensor:
    """Smallest root mean square difference to the candidates of an image.

    In gray levels (0 to 255) of images (n, 3, S, S) uint8 to candidates (n, k, 3, S, S) uint8: (n,), 0 for an exact
    copy.
    """
    return (candidates.float() - images[:, None].float()).square().mean((2, 3, 4)).sqrt().amin(1)


def _checked(x: Tensor, y: Tensor, *, at_least: int) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise InputError(f"features must be (n, d) and (m, d), not {tuple(x.shape)} and {tuple(y.shape)}")
    if min(len(x), len(y)) < at_least:
        raise InputError(f"{min(len(x), len(y))} rows of features are too few; give at least {at_least} of each set")
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise InputError("some features are NaN or infinite; check the teacher and its images")
    return x.detach().cpu().double(), y.detach().cpu().double()


def _triangle(a: Tensor) -> Tensor:
    """R with R'R = a'a and as few rows as possible."""
    return torch.linalg.qr(a, mode="r").R if len(a) > a.shape[1] else a


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3
