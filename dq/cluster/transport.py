"""Optimal transport between a class and its prototypes: the W2 distance of uniformly weighted points, and the
free-support Wasserstein barycentre that such points should be."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dq.cluster.lloyd import cell_sums


def squared_cost(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 for x (..., n, d) and y (..., k, d): (..., n, k), never negative."""
    xx, yy = x.square().sum(-1, keepdim=True), y.square().sum(-1).unsqueeze(-2)
    return (xx + yy - 2 * x @ y.transpose(-1, -2)).clamp_(min=0)


def exact_plan(cost: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Optimal transport plan (n, k) float64 for a cost (n, k), by POT's network simplex. `None` is uniform."""
    import ot

    n, k = cost.shape
    weight_a = np.full(n, 1 / n) if a is None else (a.double() / a.double().sum()).cpu().numpy()
    weight_b = np.full(k, 1 / k) if b is None else (b.double() / b.double().sum()).cpu().numpy()
    plan, log = ot.emd(weight_a, weight_b, cost.double().cpu().numpy(), numItermax=10_000_000, log=True)
    if log["warning"]:
        raise RuntimeError(f"the transport solver did not finish on a {n} x {k} problem: {log['warning']}")
    return torch.from_numpy(plan)


def sinkhorn_plan(cost: Tensor, *, entropy: float, n_iter: int = 1000, tol: float = 1e-6) -> Tensor:
    """Entropic transport plans between uniform weights, for a batch of costs (B, n, k), in the log domain.

    `entropy` is in units of the mean cost of each problem. The last update is on the points' side, so that every
    column sums to exactly 1/k; rows are off by `tol` at most unless `n_iter` ran out.
    """
    B, n, k = cost.shape
    scaled = -cost / (entropy * cost.mean((1, 2), keepdim=True).clamp(min=1e-30))
    log_a, log_b = -math.log(n), -math.log(k)
    v = scaled.new_zeros(B, 1, k)
    for _ in range(n_iter):
        u = log_a - (scaled + v).logsumexp(2, keepdim=True)
        v_new = log_b - (scaled + u).logsumexp(1, keepdim=True)
        moved = (v_new - v).abs().amax()
        v = v_new
        if moved < tol:
            break
    return (scaled + u + v).exp()


def balanced_labels(plan: Tensor) -> Tensor:
    """The prototype to which each point sends most of its mass, (..., n)."""
    return plan.argmax(-1)


def uniform_w2(x: Tensor, centroids: Tensor) -> float:
    """W2 between the uniform law on x (n, d) and the uniform law on centroids (k, d), exact."""
    cost = squared_cost(x.double(), centroids.double())
    if len(centroids) == 1:
        return math.sqrt(float(cost.mean()))
    plan = exact_plan(cost)
    return math.sqrt(max(0.0, float((plan * cost.cpu()).sum())))


def barycentre(
    x: Tensor,
    start: Tensor,
    *,
    transport: Literal["exact", "entropic"] = "exact",
    entropy: float = 0.01,
    n_iter: int = 100,
    tol: float = 1e-5,
) -> tuple[Tensor, Tensor, int, bool]:
    """Free-support Wasserstein barycentre of one measure: min over points of W2(uniform on x, uniform on k points)
    (Cuturi & Doucet 2014, alg. 2 with one input measure and step 1). This is what D4M is said to compute.

    Alternates the balanced transport plan P (n x k, columns sum to 1/k) and x_k = k * sum_i P_ik z_i; the cost falls
    with an exact plan.

    Returns:
        points (k, d), balanced labels (n,), rounds, whether the relative change of the cost fell below `tol`.
    """
    points = start.clone()
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
    assert plan is not None  # n_iter >= 1 is checked at the door
    labels = balanced_labels(plan)
    if transport == "entropic":
        # entropy pulls the points together; the means of the balanced cells undo that
        sums, mass = cell_sums(x[None], labels[None], x.new_ones(1, len(x)), k)
        points = torch.where(mass[0, :, None] > 0, sums[0] / mass[0, :, None].clamp(min=1), points)
    return points, labels, used, converged
