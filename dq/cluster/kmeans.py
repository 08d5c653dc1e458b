"""k-means by any engine: checks, restarts, exact final assignment and statistics."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from dq.cluster.engines import ENGINES, LLOYD, Fit, Problem, check_problem, choose_engine
from dq.cluster.inputs import as_points, as_weights, too_small
from dq.cluster.lloyd import assign, cell_sums, cell_totals, fill_empty, fill_empty_alone, squared_distances
from dq.cluster.transport import uniform_w2
from dq.config.schema import ClusterConfig
from dq.core.errors import InputError
from dq.core.numbers import whole_number
from dq.core.text import plural

T = TypeVar("T")
RELOCATIONS = 3  # Lloyd iterations after the last one, while cells are empty


@dataclass(frozen=True)
class Clustering:
    """Centroids of one class and their cells, largest mass first.

    No cell is empty; `counts` sum to n.
    """

    centroids: Tensor  # (k, d) float32; float64 where the data are
    labels: Tensor  # (n,) int64, nearest centroid (barycenter engine: the balanced cell)
    counts: Tensor  # (k,) int64, points per cell
    masses: Tensor  # (k,) float64, weight of the points of each cell; without weights the counts
    sse: Tensor  # (k,) float64, sum of (weighted) squared distances per cell
    engine: str
    n_iter: int
    converged: bool  # False also where a cell was empty at the end and had to be moved
    requested: int  # the requested k; len(centroids) is smaller where the class has fewer distinct points
    running_weights: Tensor | None = None  # (k,) float64, masses as the stream saw them (clvq, minibatch)

    @property
    def inertia(self) -> float:
        """Sum of weighted squared distances.

        Over the sum of the masses it is the distortion, which equals W2^2 between the weighted data and the centroids
        with their masses.
        """
        return float(self.sse.sum())


def nearest(x: object, centroids: object) -> Tensor:
    """Index (n,) int64 of the centroid (k, d) nearest to x (n, d)."""
    x, centroids = _same_space(as_points(x, "x"), centroids)
    shift = x.mean(0)
    return assign((x - shift).float()[None], (centroids - shift).float()[None])[0]


def _same_space(x: Tensor, centroids: object) -> tuple[Tensor, Tensor]:
    """Convert both to the more precise of their dtypes on one device."""
    c = as_points(centroids, "centroids")
    if c.shape[1] != x.shape[1]:
        raise InputError(
            f"centroids have {c.shape[1]} coordinates and the points {x.shape[1]}; give those of one space"
        )
    dtype = torch.promote_types(x.dtype, c.dtype)
    return x.to(dtype), c.to(x.device, dtype)


def kmeans(
    x: object,
    k: int,
    *,
    config: ClusterConfig | None = None,
    weights: object = None,
    seed: int = 0,
    start: object = None,
    name: str = "the data",
) -> Clustering:
    """Cluster points x (n, d) by weighted k-means.

    Minimizes sum_i w_i min_k |x_i - c_k|^2 over k centroids.     All engines run on centered float32 data and end in
    an exact assignment to the points that are returned. `faiss`, `torch` and `barycenter` start from the same seeded
    points (or `start`), so that the choice among the first two changes speed, not results beyond rounding; the two
    streams start from their own first samples.

    An empty cell is moved onto the point that is farthest from its own centroid. `torch` and `faiss` iterate on from
    there; the cell of a stream moves alone, and the other centroids stay what the stream made them.

    Args:
        x: (n, d) tensor, array or nested lists of real numbers.
        k: number of centroids.
        config: engine and its settings; see `ClusterConfig`.
        weights: (n,) non-negative weights of the points; not for `minibatch` and `barycenter`. They weigh the sum
            above and the means, and sum to `masses` in the cells; `counts` stay numbers of points.
        seed: of the start points and, for streams, of the order.
        start: (k, d) starting centroids instead of drawn ones; not for `minibatch`. For `clvq` and `barycenter` those
            that own no point are first moved onto points.
        name: how messages name the data, e.g. "class 3 'cat'".

    Raises:
        InputError: for arguments of other types, non-finite data, k < 1, or fewer distinct points than k with
            `on_small="raise"`.
    """
    return kmeans_many([x], k, config=config, weights=[weights], seeds=[seed], starts=[start], names=[name])[0]


def kmeans_many(
    xs: Sequence[object],
    k: int,
    *,
    config: ClusterConfig | None = None,
    weights: Sequence[Any] | None = None,
    seeds: Sequence[int] | None = None,
    starts: Sequence[Any] | None = None,
    names: Sequence[str] | None = None,
) -> list[Clustering]:
    """Run `kmeans` on several classes, given as points (n, d) of each.

    `weights`, `seeds`, `starts` and `names` have one entry for each class. With the torch engine the classes run
    together, padded to the largest, and give what the loop over classes gives, up to the rounding of batched products;
    the other engines loop.
    """
    config = ClusterConfig() if config is None else config
    if not isinstance(config, ClusterConfig):
        raise InputError(f"config of k-means is a ClusterConfig(...), not {type(config).__name__}")
    for setting in ("n_iter", "n_init", "batch_size", "passes", "expand"):
        whole_number(getattr(config, setting), setting)
    k, xs = whole_number(k, "k"), _listed(xs, "xs")
    B = len(xs)
    weights, starts = _one_each(weights, [None] * B, "weights"), _one_each(starts, [None] * B, "starts")
    seeds, names = _one_each(seeds, list(range(B)), "seeds"), _one_each(names, ["the data"] * B, "names")
    arguments = zip(xs, weights, starts, seeds, names, strict=True)
    problems = [check_problem(*of_class, k, config) for of_class in arguments]
    engine = choose_engine(config.engine)
    if engine not in ENGINES:
        raise InputError(f"there is no clustering engine {engine!r}; use auto, {', '.join(ENGINES)}")
    best: list[Clustering | None] = [None] * B
    for restart in range(config.n_init):
        fits = ENGINES[engine](problems, restart, config)
        for i, (p, fit) in enumerate(zip(problems, fits, strict=True)):
            result, previous = _finish(p, fit, engine), best[i]
            if previous is None or result.inertia < previous.inertia:
                best[i] = result
    return [_report(p, r, config) for p, r in zip(problems, best, strict=True) if r is not None]


def _listed(values: Iterable[T], name: str) -> list[T]:
    try:
        return list(values)
    except TypeError:
        raise InputError(f"{name} must list one for each class, not be of type {type(values).__name__}") from None


def _one_each(values: Sequence[T] | None, default: list[T], name: str) -> list[T]:
    """Values of each class, or the default for None."""
    if values is None:
        return default
    listed = _listed(values, name)
    if len(listed) != len(default):
        raise InputError(f"there are {len(listed)} {name} for {len(default)} classes; give one for each")
    return listed


def _finish(p: Problem, fit: Fit, engine: str) -> Clustering:
    """Assign points to centroids, fill empty cells and measure all."""
    fit, labels = _filled(p, fit, engine) if fit.labels is None else (fit, fit.labels)
    fit, labels = _without_empty(p, fit, labels)
    c, w = fit.centroids, p.weights
    distance = squared_distances(p.x[None], c[None], labels[None])[0].double() * w.double()
    return Clustering(
        centroids=c + p.mean,
        labels=labels,
        counts=torch.bincount(labels, minlength=len(c)),
        masses=cell_totals(w, labels, len(c)),
        sse=cell_totals(distance, labels, len(c)),
        engine=engine,
        n_iter=fit.n_iter,
        converged=fit.converged,
        requested=p.requested,
        running_weights=fit.running_weights,
    )


def _filled(p: Problem, fit: Fit, engine: str) -> tuple[Fit, Tensor]:
    """Move centroids of empty cells onto points: the fit, labels (n,).

    Neighbors settle by Lloyd iterations, but not those of a stream, whose centroids no Lloyd iteration makes: D4M
    leaves an empty one where it is, with no image, and here it moves alone, once, since it then owns the point on
    which it lies.
    """
    x, w, c, converged = p.x, p.weights, fit.centroids, fit.converged
    labels = assign(x[None], c[None])[0]
    settling = RELOCATIONS if engine in LLOYD else 0
    for step in range(settling + len(c)):
        mass = cell_totals(w, labels, len(c))
        if (mass > 0).all():
            break
        if step < settling:
            moved = fill_empty(x, c, labels, w, mass)[0]
        else:
            moved = fill_empty_alone(x, c, labels, w, mass)
        if torch.equal(moved, c):
            break  # fewer distinct points than centroids
        c, converged = moved, False
        labels = assign(x[None], c[None])[0]
        if step < settling:
            sums, mass = cell_sums(x[None], labels[None], w[None], len(c))
            c = torch.where(mass[0, :, None] > 0, sums[0] / mass[0, :, None].clamp(min=1e-30), c)
            labels = assign(x[None], c[None])[0]
    return dataclasses.replace(fit, centroids=c, converged=converged), labels


def _without_empty(p: Problem, fit: Fit, labels: Tensor) -> tuple[Fit, Tensor]:
    """Drop the remaining empty cells: the fit, labels (n,)."""
    mass = cell_totals(p.weights, labels, len(fit.centroids))
    occupied = (mass > 0).nonzero()[:, 0]
    if len(occupied) == len(mass):
        return fit, labels
    c, running_weights = fit.centroids[occupied], fit.running_weights
    running_weights = None if running_weights is None else running_weights[occupied.cpu()]
    renumber = torch.full((len(mass),), -1, device=c.device)
    renumber[occupied] = torch.arange(len(occupied), device=c.device)
    labels = renumber[labels]
    labels = torch.where(labels < 0, assign(p.x[None], c[None])[0], labels)
    return dataclasses.replace(fit, centroids=c, running_weights=running_weights), labels


def _report(p: Problem, result: Clustering, config: ClusterConfig) -> Clustering:
    """Sort by mass, largest first, and warn of fewer centroids than requested."""
    k = len(result.centroids)
    if k < p.requested:
        sentence = f"{p.name} has only {k} distinct points to offer for ipc={p.requested}"
        if config.on_small == "raise":
            raise too_small(sentence)
        warnings.warn(f"{sentence}; it gets {plural(k, 'prototype')}", stacklevel=3)
    order = result.masses.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(k, device=order.device)
    return dataclasses.replace(
        result,
        centroids=result.centroids[order],
        labels=rank[result.labels],
        counts=result.counts[order],
        masses=result.masses[order],
        sse=result.sse[order],
        running_weights=result.running_weights[order.cpu()] if result.running_weights is not None else None,
    )


def quantization_stats(
    x: object, result: Clustering, *, weights: object = None, with_uniform: bool = True
) -> dict[str, float]:
    """Compute the statistics that are logged per class.

    `distortion` is the (weighted) mean squared distance to the centroid of the cell; `w2_mass` its root, the exact W2
    between the class and the centroids with their Voronoi masses; `w2_uniform` the exact W2 with weights 1/k (network
    simplex); `ess_mass` and `ess_sqrt` effective sample sizes (sum w)^2 / sum w^2 of the masses and their roots;
    `explained` the share of the variance between cells.

    Args:
        x: (n, d) points, those of which `result` is a clustering.
        result: of `kmeans`.
        weights: (n,) those of the clustering; None: there were none.
        with_uniform: whether to compute `w2_uniform`; False: NaN.

    Raises:
        InputError: if x, weights and result do not belong together.
    """
    uniform = uniform_quantization_w2(x, result, weights=weights) if with_uniform else math.nan
    x, c = _centered(x, result)
    n = len(x)
    w = torch.ones(n) if weights is None else as_weights(weights, n, "weights of x")
    w = w.to(x.device, torch.float64)
    labels = result.labels if result.engine != "barycenter" else assign(x[None], c[None])[0]
    total_weight = float(w.sum())
    distortion = float((squared_distances(x[None], c[None], labels[None])[0].double() * w).sum()) / total_weight
    mean = ((w / total_weight).float() @ x)[None]
    spread = squared_distances(x[None], mean[None], torch.zeros_like(labels)[None])[0]
    variance = float((spread.double() * w).sum()) / total_weight
    masses = cell_totals(w, labels, len(c))
    return {
        "n": n,
        "k": len(c),
        "distortion": distortion,
        "w2_mass": math.sqrt(distortion),
        "w2_uniform": uniform,
        "ess_mass": float(masses.sum() ** 2 / masses.square().sum()),
        "ess_sqrt": float(masses.sqrt().sum() ** 2 / masses.sum()),
        "explained": 1 - distortion / variance if variance > 0 else 1.0,
        "n_iter": result.n_iter,
        "converged": float(result.converged),
    }


def uniform_quantization_w2(x: Any, result: Clustering, *, weights: Any = None) -> float:
    """Exact W2 between points (n, d) and the centroids of their clustering with weights 1/k, as in the statistics."""
    points, c = _centered(x, result)
    w = None if weights is None else as_weights(weights, len(points), "weights of x").to(points.device, torch.float64)
    return uniform_w2(points, c, w)


def _centered(x: Any, result: Clustering) -> tuple[Tensor, Tensor]:
    """Points and centroids in float32, less the mean of the points."""
    x, c = _same_space(as_points(x, "x"), result.centroids)
    if len(result.labels) != len(x):
        raise InputError(f"the clustering is of {len(result.labels)} points, not of the {len(x)} that are given")
    shift = x.mean(0)  # before float64 is rounded
    return (x - shift).float(), (c - shift).float()
