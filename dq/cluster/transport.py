"""Optimal transport between a class and its prototypes: W2 and Wasserstein barycenters."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dq.cluster.inputs import as_points, as_tensor, as_weights
from dq.cluster.lloyd import cell_sums
from dq.core.errors import InputError
from dq.core.numbers import whole_number
from dq.core.sinkhorn import sinkhorn


def squared_cost(x: object, y: object) -> Tensor:
    """Squared distances (..., n, k) of x (..., n, d) and y (..., k, d), never negative.

    In float32 unless one of the two is float64. Both are shifted by the mean of x first, as the product loses digits
    under large offsets.
    """
    x, y = _pair(x, y)
    shift = x.mean(-2, keepdim=True)
    x, y = x - shift, y - shift
    xx, yy = x.square().sum(-1, keepdim=True), y.square().sum(-1).unsqueeze(-2)
    return (xx + yy - 2 * x @ y.transpose(-1, -2)).clamp_(min=0)


def _pair(x: object, y: object) -> tuple[Tensor, Tensor]:
    """Convert points to the more precise of their dtypes on one device."""
    x, y = as_tensor(x, "x"), as_tensor(y, "y")
    if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1] or not (x.shape[-2] and y.shape[-2]):
        raise InputError(
            f"x and y must be (n, d) and (k, d) with one d and a point each, not {tuple(x.shape)} and {tuple(y.shape)}"
        )
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    return x.to(dtype), y.to(x.device, dtype)


def _costs(cost: object, axes: int) -> Tensor:
    """A cost matrix, or a batch of them, of finite floats."""
    cost = as_tensor(cost, "cost")
    if cost.ndim != axes or not cost.numel() or not torch.isfinite(cost).all():
        shape = "(n, k)" if axes == 2 else "(B, n, k)"
        raise InputError(f"cost must be {shape}, finite and not empty, not {cost.dtype} {tuple(cost.shape)}")
    return cost if cost.is_floating_point() else cost.double()


class ExactTransport(NamedTuple):
    """A solved transport problem between masses a (n,) and b (k,)."""

    plan: Tensor  # (n, k) float64, sums to 1
    value: float  # sum of plan times cost
    potentials: Tensor  # (k,) float64, an optimal dual solution on the side of b


def exact_transport(cost: object, a: object = None, b: object = None) -> ExactTransport:
    """Solve optimal transport for a cost (n, k) by POT's network simplex.

    In float64, for non-negative masses a (n,) and b (k,), scaled to sum to 1; None: uniform.
    """
    import ot

    cost = _costs(cost, 2)
    n, k = cost.shape
    weight_a = np.full(n, 1 / n) if a is None else _shares(as_weights(a, n, "masses a"))
    weight_b = np.full(k, 1 / k) if b is None else _shares(as_weights(b, k, "masses b"))
    plan, log = ot.emd(weight_a, weight_b, cost.double().cpu().numpy(), numItermax=10_000_000, log=True)
    if log["warning"]:
        raise RuntimeError(f"the transport solver did not finish on a {n} x {k} problem: {log['warning']}")
    return ExactTransport(torch.from_numpy(plan), float(log["cost"]), torch.from_numpy(np.asarray(log["v"])))


def exact_plan(cost: object, a: object = None, b: object = None) -> Tensor:
    """Optimal transport plan (n, k) float64; see `exact_transport`."""
    return exact_transport(cost, a, b).plan


def _shares(weights: Tensor) -> np.ndarray:
    return (weights.double() / weights.double().sum()).cpu().numpy()


def sinkhorn_plan(cost: object, *, entropy: float, n_iter: int = 1000, tol: float = 1e-6) -> Tensor:
    """Entropic transport plans for costs (B, n, k) and uniform weights.

    See `dq.core.sinkhorn`. `entropy` is in units of the mean cost of each problem. Every column sums to exactly 1/k;
    rows are off by `tol` at most unless `n_iter` ran out.
    """
    cost = _costs(cost, 3)
    n_iter = whole_number(n_iter, "n_iter")
    if not entropy > 0:
        raise InputError(f"entropy must be more than 0, not {entropy!r}; for no entropy use exact_plan")
    scaled = -cost / (entropy * cost.mean((1, 2), keepdim=True).clamp(min=1e-30))
    return sinkhorn(scaled, log_a=-math.log(cost.shape[1]), log_b=-math.log(cost.shape[2]), n_iter=n_iter, tol=tol)


def balanced_labels(plan: Tensor) -> Tensor:
    """Prototype (..., n) to which each point sends most of its mass."""
    return plan.argmax(-1)


def uniform_w2(x: object, centroids: object, weights: object = None) -> float:
    """Exact W2 between x (n, d) with weights and uniform centroids (k, d).

    `weights` (n,) are masses of x; None: uniform.
    """
    x = as_points(x, "x", finite=True)
    cost = squared_cost(x.double(), as_points(centroids, "centroids", finite=True))
    plan = exact_plan(cost, weights)
    return math.sqrt(max(0.0, float((plan * cost.cpu()).sum())))


class Barycenter(NamedTuple):
    """Points of equal masses that are near to a measure in W2."""

    points: Tensor  # (k, d)
    labels: Tensor  # (n,) balanced cells
    n_iter: int
    converged: bool  # whether the relative change of the cost fell below `tol`


def barycenter(
    x: object,
    start: object,
    *,
    transport: Literal["exact", "entropic"] = "exact",
    entropy: float = 0.01,
    n_iter: int = 100,
    tol: float = 1e-5,
) -> Barycenter:
    """Free-support Wasserstein barycenter of one measure.

    The minimum over k points of W2(uniform on x, uniform on the points) (Cuturi & Doucet 2014, alg. 2 with one input
    measure and step 1), which D4M is said to compute.

    Alternates the balanced transport plan P (n x k, columns sum to 1/k) and x_k = k * sum_i P_ik z_i; the cost falls
    with an exact plan. Works on centered points, in float64 where x or start are.

    Args:
        x: (n, d) points.
        start: (k, d) first support points. With `entropic`, equal ones stay equal.
        transport: how the plan is found.
        entropy: of an entropic plan, in units of the mean cost.
        n_iter: most rounds.
        tol: relative change of the cost at which rounds end.

    Raises:
        InputError: for points of two spaces, non-finite ones, another `transport`, or n_iter < 1.
    """
    if transport not in ("exact", "entropic"):
        raise InputError(f"transport must be 'exact' or 'entropic', not {transport!r}")
    n_iter = whole_number(n_iter, "n_iter")
    x, points = _pair(as_points(x, "x", finite=True), as_points(start, "start", finite=True))
    mean = x.mean(0)
    x, points = x - mean, points - mean
    k = len(points)
    previous = math.inf
    used, converged = 0, False
    plan = None
    for r in range(n_iter):
        cost = squared_cost(x, points)
        plan = exact_plan(cost).to(x) if transport == "exact" else sinkhorn_plan(cost[None], entropy=entropy)[0]
        value = float((plan * cost).sum())
        points = k * plan.T @ x
        used = r + 1
        if abs(previous - value) <= tol * max(value, 1e-30):
            converged = True
            break
        previous = value
    assert plan is not None
    labels = balanced_labels(plan)
    if transport == "entropic":
        # entropy pulls the points together; the means of the balanced cells undo that
        sums, mass = cell_sums(x[None], labels[None], x.new_ones(1, len(x)), k)
        points = torch.where(mass[0, :, None] > 0, sums[0] / mass[0, :, None].clamp(min=1), points)
    return Barycenter(points + mean, labels, used, converged)
