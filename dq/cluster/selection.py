"""Rules that select among candidate images of the prototypes of a class.

All rules are functions of a teacher's predictions for the candidates and, in the space of its features, of the real
images of the class. The pool of candidates is (N,), in any order; `numbers[k]` are kept of those of prototype k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dq.cluster.inputs import as_points, as_tensor, as_weights
from dq.cluster.transport import ExactTransport, exact_transport, squared_cost
from dq.core.errors import InputError
from dq.core.plain import PlainDict
from dq.data.coresets import facility_location

IMPROVEMENT = 1e-10  # relative; a smaller fall of the transport cost is rounding


@dataclass(frozen=True)
class Selection:
    """The selected candidates, and measurements of the rule."""

    rows: Tensor  # (M,) int64 into the pool, prototype by prototype, within one in the order of the pool
    facts: PlainDict


def nearest_of_cells(x: object, centroids: object, number: int) -> tuple[Tensor, Tensor]:
    """Points nearest to each centroid, among those of its cell.

    Args:
        x: (n, d).
        centroids: (K, d).
        number: at most so many for each centroid; cells with fewer points give all.

    Returns:
        Rows (M,) of x and the centroid (M,) of each, int64, centroid by centroid, the nearest first. No row is there
        twice.

    Raises:
        InputError: if a shape or value is another.
    """
    x, centroids = as_points(x, "x", finite=True), as_points(centroids, "centroids", finite=True)
    distance, cell = squared_cost(x, centroids).min(1)
    order = distance.argsort(stable=True)
    order = order[cell[order].argsort(stable=True)]
    sizes = torch.bincount(cell, minlength=len(centroids))
    rank = torch.arange(len(x), device=x.device) - (sizes.cumsum(0) - sizes)[cell[order]]
    near = order[rank < number]
    return near.cpu(), cell[near].cpu()


def select_correct(correct: object, probability: object, prototype: object, numbers: Sequence[int]) -> Selection:
    """Select the first correctly classified candidates (after CaO2, Wang et al. 2025).

    A prototype with too few of them is filled up with its most confident others.

    Args:
        correct: (N,) bool, whether the teacher's most probable class is that of the candidate.
        probability: (N,) the teacher's probability of the class.
        prototype: (N,) int64, of every candidate.
        numbers: candidates that every prototype keeps.

    Returns:
        The selection; `facts["lacking"]` is the number of prototypes with too few correct candidates.

    Raises:
        InputError: if a prototype has fewer candidates than it is to keep, or a shape or value is another.
    """
    prototype, numbers = _checked_pool(prototype, numbers)
    n = len(prototype)
    correct, p = _of_pool(correct, "correct", n).bool(), _of_pool(probability, "probability", n).double()
    rank_wrong = torch.empty(n, dtype=torch.int64)
    rank_wrong[(-p).argsort(stable=True)] = torch.arange(n)
    rows = _first_of_each(torch.where(correct, torch.arange(n), n + rank_wrong), prototype, numbers)
    right = torch.bincount(prototype[correct], minlength=len(numbers))
    return Selection(rows, {"lacking": int((right < torch.tensor(numbers)).sum())})


def select_confident(probability: object, prototype: object, numbers: Sequence[int]) -> Selection:
    """Select the candidates with the highest probability of the class.

    Ties go to the earlier one. Arguments, result and errors as for `select_correct`.
    """
    prototype, numbers = _checked_pool(prototype, numbers)
    p = _of_pool(probability, "probability", len(prototype)).double()
    return Selection(_first_of_each(-p, prototype, numbers), {})


def select_facility(
    real: object,
    candidates: object,
    prototype: object,
    numbers: Sequence[int],
    *,
    weights: object = None,
    one_per_prototype: bool = True,
) -> Selection:
    """Select by facility location over cosines of features, greedily.

    The candidates cover the real images of the class best; see `dq.data.coresets.facility_location`.

    Args:
        real: (n, d) features of the class's images.
        candidates: (N, d) those of the pool.
        prototype: (N,) int64, of every candidate.
        numbers: images of every prototype.
        weights: (n,) of the real images; None: uniform.
        one_per_prototype: every prototype keeps its number (greedy picks reach half of the optimum); False: any of the
            pool may be kept, as many as all prototypes have images, so that some have more and others none (1 - 1/e).

    Returns:
        The selection; facts `coverage` and `coverage_first`, the mean cosine of a real image to the nearest candidate
        that is kept, and to the nearest of the earliest ones, and the number of `unrepresented` prototypes.

    Raises:
        InputError: if a prototype has fewer candidates than it is to keep, or a shape or value is another.
    """
    prototype, numbers = _checked_pool(prototype, numbers)
    x, pool = _checked_features(real, candidates, len(prototype))
    w = x.new_ones(len(x)) if weights is None else as_weights(weights, len(x), "weights of real images")
    quotas = (prototype, numbers) if one_per_prototype else None
    picks = facility_location(x, sum(numbers), weights=w, candidates=pool, quotas=quotas, name="the class")
    rows = torch.from_numpy(picks)
    rows = rows[(prototype[rows] * len(pool) + rows).argsort()]
    first = _first_of_each(torch.arange(len(pool)), prototype, numbers)

    def coverage(selected: Tensor) -> float:
        a, b = (torch.nn.functional.normalize(v.double(), dim=1) for v in (x, pool[selected]))
        return float((w.double() * (a @ b.T).clamp(min=0).amax(1)).sum() / w.double().sum())

    absent = len(numbers) - len(prototype[rows].unique())
    return Selection(rows, {"coverage_first": coverage(first), "coverage": coverage(rows), "unrepresented": absent})


def select_transport(
    real: object,
    candidates: object,
    prototype: object,
    numbers: Sequence[int],
    masses: object,
    *,
    centers: object,
    weights: object = None,
) -> Selection:
    """Select candidates of least transport cost to the class in feature space.

    This is the objective of optimal quantization, over the images that were drawn: it minimizes
    W2^2(sum_x a_x delta(x), sum_i b_i delta(f_i)) over one candidate f_i for every image i, where the images of
    prototype k share its mass. Starts from the candidates nearest to `centers` and lets every image in turn take
    the candidate of its prototype that is best while the others stay (coordinate descent), until none changes. The
    cost never rises. At the end no change of a single image lowers it; several at once might, so that it need not be
    the least over all combinations (with one image it is).

    Every cost is exact. Candidates whose bound (see `lower_bounds`) is not below the best cost are not solved.

    Args:
        real: (n, d) features of the class's images.
        candidates: (N, d) those of the pool.
        prototype: (N,) int64, of every candidate.
        numbers: candidates that every prototype keeps.
        masses: (K,) positive, of the prototypes.
        centers: (K, d) mean features of the cells.
        weights: (n,) of the real images; None: uniform.

    Returns:
        The selection; facts `w2_start` and `w2`, roots of the cost before and after, `w2_first` that of the earliest
        candidates, and the number of `changes`.

    Raises:
        InputError: if a prototype has fewer candidates than it is to keep or has no mass, or a shape or value is
            another.
    """
    prototype, numbers = _checked_pool(prototype, numbers)
    masses = as_weights(masses, len(numbers), "masses of prototypes").double()
    if not (masses > 0).all():
        empty = int((masses <= 0).nonzero()[0])
        raise InputError(f"prototype {empty} has no mass, so no candidate can stand for it; leave it out")
    x, pool = (v.double() for v in _checked_features(real, candidates, len(prototype)))
    a = x.new_ones(len(x)) if weights is None else as_weights(weights, len(x), "weights of real images").double()
    number, distance = torch.tensor(numbers), _distance_to_center(pool, centers, prototype, len(numbers))
    b = (masses.cpu() / number.clamp(min=1)).repeat_interleave(number)
    search = _Search(squared_cost(x, pool).cpu(), prototype, (a / a.sum()).cpu(), b / b.sum())
    first = search.solved(_first_of_each(torch.arange(len(pool)), prototype, numbers))
    start = search.solved(_first_of_each(distance, prototype, numbers))
    end, changes = search.descend(start)
    facts = {"w2_first": _root(first.transport.value), "w2_start": _root(start.transport.value)}
    facts |= {"w2": _root(end.transport.value), "changes": changes}
    order = (prototype[end.rows] * len(pool) + end.rows).argsort()
    return Selection(end.rows[order], facts)


def _distance_to_center(pool: Tensor, centers: object, prototype: Tensor, prototypes: int) -> Tensor:
    """Squared distance (N,) of candidates (N, d) to their centers, on the CPU."""
    c = as_points(centers, "centers", finite=True).double().to(pool)
    if c.shape != (prototypes, pool.shape[1]):
        expected = (prototypes, pool.shape[1])
        raise InputError(f"centers must be {expected}, one for every prototype, not {tuple(c.shape)}")
    return (pool - c[prototype.to(pool.device)]).square().sum(1).cpu()


class _Solved(NamedTuple):
    """One candidate for every image, and the solved transport to them."""

    rows: Tensor  # (M,) into the pool
    transport: ExactTransport


@dataclass(frozen=True)
class _Search:
    """Coordinate descent over the candidates of all images."""

    cost: Tensor  # (n, N) between real images and the pool
    prototype: Tensor  # (N,)
    a: Tensor  # (n,) masses of the real images
    b: Tensor  # (M,) masses of the images

    def solved(self, rows: Tensor) -> _Solved:
        return _Solved(rows, exact_transport(self.cost[:, rows], self.a, self.b))

    def descend(self, state: _Solved) -> tuple[_Solved, int]:
        """Change single images until none improves; and the number of changes."""
        changes, unchanged, i = 0, 0, 0
        while unchanged < len(state.rows):
            better = self._best_change(state, i)
            unchanged += 1
            if better is not None:
                state = better
                changes, unchanged = changes + 1, 1
            i = (i + 1) % len(state.rows)
        return state, changes

    def _best_change(self, state: _Solved, i: int) -> _Solved | None:
        """The best candidate for image i, if it is not the present one."""
        free = self.prototype == self.prototype[state.rows[i]]
        free[state.rows] = False
        options = free.nonzero()[:, 0]
        bounds = lower_bounds(self.cost, state.rows, i, options, self.a, self.b, state.transport.potentials)
        best = None
        limit = state.transport.value * (1 - IMPROVEMENT)
        for j in bounds.argsort().tolist():
            if float(bounds[j]) >= limit:
                break
            rows = state.rows.clone()
            rows[i] = options[j]
            trial = self.solved(rows)
            if trial.transport.value < limit:
                best, limit = trial, trial.transport.value
        return best


def lower_bounds(
    cost: Tensor, rows: Tensor, i: int, options: Tensor, a: Tensor, b: Tensor, potentials: Tensor
) -> Tensor:
    """Lower bounds (O,) of the transport cost with other candidates for image i.

    By duality any v gives a bound sum_x a_x min_j (c_xj - v_j) + sum_j b_j v_j. Those of the other images stay; that
    of the new point is the one that makes the bound largest, a weighted quantile.

    Args:
        cost: (n, N) between real images and the pool.
        rows: (M,) the present images, into the pool.
        i: number of the image.
        options: (O,) candidates for image i, into the pool.
        a: (n,) masses of the real images, which sum to 1.
        b: (M,) masses of the images, which sum to 1.
        potentials: (M,) dual solution of the present images.
    """
    others = torch.arange(len(rows)) != i
    columns = cost[:, options]
    if not others.any():
        return a @ columns  # all mass goes to the one point
    v = potentials[others]
    f = (cost[:, rows[others]] - v).amin(1)
    gap, order = (columns - f[:, None]).sort(dim=0)
    reached = (a[order].cumsum(0) >= b[i]).int().argmax(0)
    t = gap.gather(0, reached[None])[0]
    return a @ torch.minimum(f[:, None], columns - t) + b[i] * t + b[others] @ v


def _checked_pool(prototype: object, numbers: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Prototypes (N,) of the pool, and numbers of candidates to keep."""
    prototype = _indices(prototype, "prototype").cpu()
    quotas = _indices(numbers, "numbers").tolist()
    if not sum(quotas):
        raise InputError("numbers must keep a candidate of at least one prototype; they are all 0")
    counts = torch.bincount(prototype, minlength=len(quotas)).tolist()
    short = next((k for k, n in enumerate(quotas) if counts[k] < n), None)
    if short is not None or len(counts) > len(quotas):
        k = len(quotas) if short is None else short
        quota = quotas[k] if k < len(quotas) else 0
        raise InputError(f"prototype {k} has {counts[k]} candidates and keeps {quota}; draw as many, or fewer others")
    return prototype, quotas


def _indices(value: object, name: str) -> Tensor:
    """Whole numbers (n,) of at least 0 as int64."""
    x = as_tensor(value, name)
    if x.ndim != 1 or not len(x) or x.is_floating_point() or x.dtype == torch.bool or x.min() < 0:
        raise InputError(f"{name} must be a non-empty list of whole numbers of at least 0")
    return x.long()


def _of_pool(value: object, name: str, n: int) -> Tensor:
    """Finite numbers (n,), one per candidate of the pool, on the CPU."""
    x = as_tensor(value, name).cpu()
    if x.shape != (n,) or not torch.isfinite(x).all():
        raise InputError(f"{name} must be ({n},) and finite, one for every candidate, not {tuple(x.shape)}")
    return x


def _checked_features(real: object, candidates: object, n: int) -> tuple[Tensor, Tensor]:
    """Features of real images (m, d) and of candidates (n, d)."""
    x, pool = as_points(real, "real", finite=True), as_points(candidates, "candidates", finite=True)
    if pool.shape != (n, x.shape[1]):
        raise InputError(
            f"candidates must be {(n, x.shape[1])}, a row for every entry of prototype and a column for every feature "
            f"of real, not {tuple(pool.shape)}"
        )
    return x, pool


def _first_of_each(key: Tensor, prototype: Tensor, numbers: Sequence[int]) -> Tensor:
    """The `numbers[k]` rows of least key of each prototype k, (M,) int64.

    By prototype and row; ties go to the earlier row.
    """
    order = key.argsort(stable=True)
    order = order[prototype[order].argsort(stable=True)]
    groups = order.split(torch.bincount(prototype, minlength=len(numbers)).tolist())
    return torch.cat([group[:n].sort().values for group, n in zip(groups, numbers, strict=True)])


def _root(value: float) -> float:
    return math.sqrt(max(0.0, value))
