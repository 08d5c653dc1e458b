"""Which candidates of a class to keep: several draws of every prototype, of which as many stay as it has images.

All rules are functions of what a teacher says of the candidates and, in the space of its features, of the real images
of the class. The pool of candidates is (N,), in any order; prototype k keeps `numbers[k]` of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dq.cluster.inputs import as_points, as_tensor, as_weights
from dq.cluster.transport import ExactTransport, exact_transport, squared_cost
from dq.core.errors import InputError
from dq.data.coresets import facility_location

IMPROVEMENT = 1e-10  # relative; a smaller fall of the transport cost is rounding


@dataclass(frozen=True)
class Selection:
    """The candidates that are kept, and what the rule measured."""

    rows: Tensor  # (M,) int64 into the pool, prototype by prototype, within one in the order of the pool
    facts: dict[str, Any]


def select_correct(correct: Any, probability: Any, prototype: Any, numbers: Sequence[int]) -> Selection:
    """The first candidates of every prototype that the teacher classifies rightly (after CaO2, Wang et al. 2025).

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


def select_confident(probability: Any, prototype: Any, numbers: Sequence[int]) -> Selection:
    """The candidates of every prototype to whose class the teacher gives the highest probability; ties go to the
    earlier one. Arguments, result and errors as for `select_correct`."""
    prototype, numbers = _checked_pool(prototype, numbers)
    p = _of_pool(probability, "probability", len(prototype)).double()
    return Selection(_first_of_each(-p, prototype, numbers), {})


def select_facility(
    real: Any,
    candidates: Any,
    prototype: Any,
    numbers: Sequence[int],
    *,
    weights: Any = None,
    one_per_prototype: bool = True,
) -> Selection:
    """Candidates that cover the real images of the class best: facility location over cosines of features, greedily;
    see `dq.data.coresets.facility_location`.

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

    def coverage(kept: Tensor) -> float:
        a, b = (torch.nn.functional.normalize(v.double(), dim=1) for v in (x, pool[kept]))
        return float((w.double() * (a @ b.T).clamp(min=0).amax(1)).sum() / w.double().sum())

    absent = len(numbers) - len(prototype[rows].unique())
    return Selection(rows, {"coverage_first": coverage(first), "coverage": coverage(rows), "unrepresented": absent})


def select_transport(
    real: Any,
    candidates: Any,
    prototype: Any,
    numbers: Sequence[int],
    masses: Any,
    *,
    centers: Any,
    weights: Any = None,
) -> Selection:
    """Candidates whose measure has the least transport cost to the class in feature space: the objective of optimal
    quantization, over the images that were drawn.

    Minimizes W2^2(sum_x a_x delta(x), sum_i b_i delta(f_i)) over one candidate f_i for every image i, where the images
    of prototype k share its mass. Starts from the candidates nearest to `centers` and lets every image in turn take
    the candidate of its prototype that is best while the others stay (coordinate descent), until none changes. The
    cost never rises. At the end no change of a single image lowers it; several at once might, so that it need not be
    the least over all combinations (with one image it is).

    Every cost is exact. Candidates whose bound (see `lower_bounds`) is not below the best cost are not solved.

    Args:
        real: (n, d) features of the class's images.
        candidates: (N, d) those of the pool.
        prototype, numbers: as for `select_correct`.
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
    a, cost, number = (a / a.sum()).cpu(), squared_cost(x, pool).cpu(), torch.tensor(numbers)
    middle = as_points(centers, "centers", finite=True).double().to(pool)
    if middle.shape != (len(numbers), pool.shape[1]):
        expected = (len(numbers), pool.shape[1])
        raise InputError(f"centers must be {expected}, one for every prototype, not {tuple(middle.shape)}")
    distance = (pool - middle[prototype.to(pool.device)]).square().sum(1)
    b = (masses.cpu() / number.clamp(min=1)).repeat_interleave(number)
    b = b / b.sum()
    first = _first_of_each(torch.arange(len(pool)), prototype, numbers)
    rows = _first_of_each(distance.cpu(), prototype, numbers)
    solved = exact_transport(cost[:, rows], a, b)
    facts = {"w2_first": _root(exact_transport(cost[:, first], a, b).value), "w2_start": _root(solved.value)}
    changes, unchanged, i = 0, 0, 0
    while unchanged < len(rows):
        better = _best_change(cost, rows, i, prototype, a, b, solved)
        unchanged += 1
        if better is not None:
            rows, solved = better
            changes, unchanged = changes + 1, 1
        i = (i + 1) % len(rows)
    facts |= {"w2": _root(solved.value), "changes": changes}
    order = (prototype[rows] * len(pool) + rows).argsort()
    return Selection(rows[order], facts)


def _best_change(
    cost: Tensor, rows: Tensor, i: int, prototype: Tensor, a: Tensor, b: Tensor, solved: ExactTransport
) -> tuple[Tensor, ExactTransport] | None:
    """The images with the candidate of least cost in place i, and their transport; None if the present one is it."""
    free = prototype == prototype[rows[i]]
    free[rows] = False
    options = free.nonzero()[:, 0]
    bounds = lower_bounds(cost, rows, i, options, a, b, solved.potentials)
    best = None
    limit = solved.value * (1 - IMPROVEMENT)
    for j in bounds.argsort().tolist():
        if float(bounds[j]) >= limit:
            break
        trial = rows.clone()
        trial[i] = options[j]
        transport = exact_transport(cost[:, trial], a, b)
        if transport.value < limit:
            best, limit = (trial, transport), transport.value
    return best


def lower_bounds(
    cost: Tensor, rows: Tensor, i: int, options: Tensor, a: Tensor, b: Tensor, potentials: Tensor
) -> Tensor:
    """Lower bounds of the transport cost if image i were another candidate.

    By duality any v gives a bound sum_x a_x min_j (c_xj - v_j) + sum_j b_j v_j. Those of the other images stay; that
    of the new point is the one that makes the bound largest, a weighted quantile.

    Args:
        cost: (n, N) between real images and the pool.
        rows: (M,) the present images, into the pool.
        options: (O,) candidates for image i, into the pool.
        a, b: (n,) and (M,) masses that sum to 1.
        potentials: (M,) dual solution of the present images.

    Returns:
        (O,) float64.
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


def _checked_pool(prototype: Any, numbers: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Prototypes of the pool (N,) and how many candidates each keeps."""
    prototype = _indices(prototype, "prototype").cpu()
    wanted = _indices(numbers, "numbers").tolist()
    if not sum(wanted):
        raise InputError("numbers must keep a candidate of at least one prototype; they are all 0")
    counts = torch.bincount(prototype, minlength=len(wanted)).tolist()
    short = next((k for k, n in enumerate(wanted) if counts[k] < n), None)
    if short is not None or len(counts) > len(wanted):
        k = len(wanted) if short is None else short
        keeps = wanted[k] if k < len(wanted) else 0
        raise InputError(f"prototype {k} has {counts[k]} candidates and keeps {keeps}; draw as many, or fewer others")
    return prototype, wanted


def _indices(value: Any, name: str) -> Tensor:
    """Whole numbers (n,) of at least 0 as int64."""
    x = as_tensor(value, name)
    if x.ndim != 1 or not len(x) or x.is_floating_point() or x.dtype == torch.bool or x.min() < 0:
        raise InputError(f"{name} must be a non-empty list of whole numbers of at least 0")
    return x.long()


def _of_pool(value: Any, name: str, n: int) -> Tensor:
    """A finite number (n,) for every candidate of the pool, on the CPU."""
    x = as_tensor(value, name).cpu()
    if x.shape != (n,) or not torch.isfinite(x).all():
        raise InputError(f"{name} must be ({n},) and finite, one for every candidate, not {tuple(x.shape)}")
    return x


def _checked_features(real: Any, candidates: Any, n: int) -> tuple[Tensor, Tensor]:
    """Features of real images (m, d) and of the n candidates of the pool (n, d)."""
    x, pool = as_points(real, "real", finite=True), as_points(candidates, "candidates", finite=True)
    if pool.shape != (n, x.shape[1]):
        raise InputError(
            f"candidates must be {(n, x.shape[1])}, a row for every entry of prototype and a column for every feature "
            f"of real, not {tuple(pool.shape)}"
        )
    return x, pool


def _first_of_each(key: Tensor, prototype: Tensor, numbers: Sequence[int]) -> Tensor:
    """Of each prototype the `numbers[k]` rows of least key, ties to the earlier; (M,) int64 by prototype and row."""
    order = key.argsort(stable=True)
    order = order[prototype[order].argsort(stable=True)]
    groups = order.split(torch.bincount(prototype, minlength=len(numbers)).tolist())
    return torch.cat([group[:n].sort().values for group, n in zip(groups, numbers)])


def _root(value: float) -> float:
    return math.sqrt(max(0.0, value))
