"""k-means by any engine: checks, centring, restarts, exact final assignment, and the numbers that describe it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dq.cluster.faiss_engine import faiss_assigner
from dq.cluster.inputs import as_points, as_weights
from dq.cluster.lloyd import (
    assign,
    cell_sums,
    cell_totals,
    fill_empty,
    fill_empty_alone,
    kmeans_plusplus,
    lloyd,
    pca_multistart,
    squared_distances,
)
from dq.cluster.online import clvq, minibatch, systematic_sample
from dq.cluster.transport import barycenter, uniform_w2
from dq.config.schema import ClusterConfig
from dq.core.errors import InputError
from dq.core.numbers import whole_number
from dq.core.seeds import derive_seed, generator

RELOCATIONS = 3  # Lloyd iterations after the last one, while cells are empty


@dataclass(frozen=True)
class Clustering:
    """k points of one class and the cells that they own, largest mass first. No cell is empty; `counts` sum to n."""

    centroids: Tensor  # (k, d) float32; float64 where the data are
    labels: Tensor  # (n,) int64, nearest centroid (barycenter engine: the balanced cell)
    counts: Tensor  # (k,) int64, points per cell
    masses: Tensor  # (k,) float64, weight of the points of each cell; without weights the counts
    sse: Tensor  # (k,) float64, sum of (weighted) squared distances per cell
    engine: str
    n_iter: int
    converged: bool  # False also where a cell was empty at the end and had to be moved
    asked: int  # the k asked for; len(centroids) is smaller where the class has fewer distinct points
    running_weights: Tensor | None = None  # (k,) float64, masses as the stream saw them (clvq, minibatch)

    @property
    def inertia(self) -> float:
        """Sum of weighted squared distances; over the sum of the masses it is the distortion, which equals W2^2
        between the weighted data and the centroids with their masses."""
        return float(self.sse.sum())


def choose_engine(engine: str) -> str:
    """What `auto` stands for: torch, everywhere. From the same start neither it nor FAISS is clearly faster on two CPU
    cores (`benchmarks/cluster.py`), and torch runs many classes at once on an accelerator."""
    return "torch" if engine == "auto" else engine


def nearest(x: Any, centroids: Any) -> Tensor:
    """Index of the nearest centroid, (n,) int64, for x (n, d) and centroids (k, d), tensors or arrays."""
    x, centroids = _same_space(as_points(x, "x"), centroids)
    shift = x.mean(0)
    return assign((x - shift).float()[None], (centroids - shift).float()[None])[0]


def _same_space(x: Tensor, centroids: Any) -> tuple[Tensor, Tensor]:
    """Both in the more precise of their dtypes, on the device of x."""
    c = as_points(centroids, "centroids")
    if c.shape[1] != x.shape[1]:
        raise InputError(
            f"centroids have {c.shape[1]} coordinates and the points {x.shape[1]}; give those of one space"
        )
    dtype = torch.promote_types(x.dtype, c.dtype)
    return x.to(dtype), c.to(x.device, dtype)


def kmeans(
    x: Any,
    k: int,
    *,
    config: ClusterConfig | None = None,
    weights: Any = None,
    seed: int = 0,
    start: Any = None,
    name: str = "the data",
) -> Clustering:
    """Quantize x (n, d) with k points: minimise sum_i w_i min_k |x_i - c_k|^2.

    All engines run on centered float32 data and end in an exact assignment to the points that are returned. `faiss`,
    `torch` and `barycenter` start from the same seeded points (or `start`), so that the choice among the first two
    changes speed, not results beyond rounding; the two streams start from their own first samples.

    An empty cell is moved onto the point that is farthest from its own centroid. `torch` and `faiss` iterate on from
    there; the cell of a stream moves alone, and the other centroids stay what the stream made them.

    Args:
        x: (n, d) tensor, array or nested lists of real numbers.
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
    xs: Sequence[Any],
    k: int,
    *,
    config: ClusterConfig | None = None,
    weights: Sequence[Any] | None = None,
    seeds: Sequence[int] | None = None,
    starts: Sequence[Any] | None = None,
    names: Sequence[str] | None = None,
) -> list[Clustering]:
    """`kmeans` on several classes. With the torch engine they run together, padded to the largest, and give what the
    loop over classes gives, up to the rounding of batched products; the other engines loop.

    Args:
        xs: points (n, d) of each class.
        weights, seeds, starts, names: one for each class; see `kmeans`.
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
    problems = [_Problem.check(*args, k, config) for args in zip(xs, weights, starts, seeds, names)]
    engine = choose_engine(config.engine)
    best: list[Clustering | None] = [None] * B
    for restart in range(config.n_init):
        if engine == "torch":
            found = _run_torch(problems, restart, config)
        else:
            found = [_run_one(p, engine, restart, config) for p in problems]
        for i, (p, (centroids, n_iter, converged, labels, running_weights)) in enumerate(zip(problems, found)):
            result = _finish(p, centroids, engine, n_iter, converged, labels, running_weights)
            rival = best[i]
            if rival is None or result.inertia < rival.inertia:
                best[i] = result
    return [_report(p, r, config) for p, r in zip(problems, best) if r is not None]


def _listed(values: Any, name: str) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise InputError(f"{name} must list one for each class, not be of type {type(values).__name__}") from None


def _one_each(values: Sequence[Any] | None, default: list[Any], name: str) -> list[Any]:
    """Values for each class, or the default where there are none."""
    if values is None:
        return default
    listed = _listed(values, name)
    if len(listed) != len(default):
        raise InputError(f"there are {len(listed)} {name} for {len(default)} classes; give one for each")
    return listed


_Found = tuple[Tensor, int, bool, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class _Problem:
    """One class, checked and centered."""

    x: Tensor  # (n, d) float32, mean zero
    mean: Tensor  # (d,)
    weights: Tensor  # (n,) float32
    start: Tensor | None
    k: int
    asked: int
    seed: int
    name: str

    @staticmethod
    def check(x: Any, weights: Any, start: Any, seed: int, name: str, k: int, config: ClusterConfig) -> _Problem:
        x, seed = as_points(x, name), whole_number(seed, "seed", least=None)
        size = float(torch.linalg.vector_norm(x))
        if not size < 1e18:  # one pass; NaN, infinite, or too large to be squared
            bad = (~torch.isfinite(x)).any(1).nonzero()
            if not len(bad):
                raise InputError(f"{name} has values too large for float32 distances (norm {size:.1e}); scale them")
            raise InputError(
                f"{name} has NaN or infinite latents (first at its point {int(bad[0])}); "
                "encode again in bfloat16 or float32"
            )
        if start is not None and config.engine == "minibatch":
            raise InputError("cluster.engine=minibatch draws its own start, as D4M does; give no start points")
        if weights is not None and config.engine in ("minibatch", "barycenter"):
            raise InputError(f"cluster.engine={config.engine} takes no point weights; use faiss, torch or clvq")
        w = torch.ones(len(x)) if weights is None else as_weights(weights, len(x), f"weights of {name}")
        w = w.to(x.device)
        allowed = min(k, int((w > 0).sum()))
        if allowed < k and config.on_small == "raise":
            raise too_small(f"{name} has {allowed} images but ipc={k}")
        centers = None if start is None else as_points(start, f"start centroids of {name}", finite=True)
        if centers is not None and centers.shape != (k, x.shape[1]):
            raise InputError(f"start centroids of {name} must be ({k}, {x.shape[1]}), not {tuple(centers.shape)}")
        # Subtracted before float64 is rounded, so that large offsets cost no digits; equal weights are no weights.
        mean = x.mean(0) if bool((w == w[0]).all()) else (w / w.sum()).to(x.dtype) @ x
        centered = None if centers is None else (centers.to(x)[:allowed] - mean).float()
        return _Problem((x - mean).float(), mean, w.float(), centered, allowed, k, seed, name)


def too_small(sentence: str, setting: str = "cluster.on_small") -> InputError:
    """The refusal of a class with fewer images than prototypes are asked for.

    Args:
        setting: what says that such a class is refused.
    """
    return InputError(f"{sentence}; lower ipc, drop the class, or set {setting}=clamp")


def _start_points(group: list[_Problem], x: Tensor, weights: Tensor, restart: int, config: ClusterConfig) -> Tensor:
    """Starting centroids (B, k, d) of classes with the same k, padded to x (B, n, d); each class draws from its own
    generator, so that it starts the same alone and in company."""
    if group[0].start is not None:
        return torch.stack([p.start for p in group if p.start is not None])
    generators = [generator(p.seed, "kmeans", restart) for p in group]
    k = group[0].k
    if config.init == "pca-multistart":
        return pca_multistart(x, weights, k, generators, tol=config.tol)
    if config.init == "random":
        chosen = torch.stack([torch.multinomial(w.cpu(), k, generator=g) for w, g in zip(weights, generators)])
    else:
        chosen = kmeans_plusplus(x, weights, k, generators)
    return x.gather(1, chosen.to(x.device).unsqueeze(2).expand(-1, -1, x.shape[2]))


def _run_torch(problems: list[_Problem], restart: int, config: ClusterConfig) -> list[_Found]:
    """Lloyd on all classes at once; classes that were clamped to another k run in a group of their own."""
    found: list[_Found | None] = [None] * len(problems)
    for k in {p.k for p in problems}:
        group = [i for i, p in enumerate(problems) if p.k == k]
        members = [problems[i] for i in group]
        x, w = _padded([p.x for p in members]), _padded([p.weights for p in members])
        start = _start_points(members, x, w, restart, config)
        centroids, iterations, converged = lloyd(x, start, w, n_iter=config.n_iter, tol=config.tol)
        for row, i in enumerate(group):
            found[i] = (centroids[row], int(iterations[row]), bool(converged[row]), None, None)
    return [f for f in found if f is not None]


def _padded(parts: list[Tensor]) -> Tensor:
    """Stack tensors that differ in length, with zeros at the end; a single one is not copied."""
    return parts[0][None] if len(parts) == 1 else torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def _occupied(p: _Problem, start: Tensor) -> Tensor:
    """Start points (k, d) of which those that own no point are moved onto points: equal ones would stay equal in an
    entropic barycenter, and a stream would leave them where they are."""
    labels = assign(p.x[None], start[None])[0]
    return fill_empty(p.x, start, labels, p.weights, cell_totals(p.weights, labels, len(start)))[0]


def _run_one(p: _Problem, engine: str, restart: int, config: ClusterConfig) -> _Found:
    if engine in ("faiss", "barycenter"):
        start = _start_points([p], p.x[None], p.weights[None], restart, config)
    if engine == "faiss":
        centroids, iterations, stopped = lloyd(
            p.x[None],
            start,
            p.weights[None],
            n_iter=config.n_iter,
            tol=config.tol,
            nearest=faiss_assigner(p.x),
        )
        return centroids[0], int(iterations[0]), bool(stopped[0]), None, None
    if engine == "barycenter":
        points, labels, used, converged = barycenter(
            p.x,
            _occupied(p, start[0]),
            transport=config.transport,
            entropy=config.entropy,
            n_iter=config.n_iter,
            tol=config.tol,
        )
        return points, used, converged, labels, None
    if engine == "minibatch":
        g = generator(p.seed, "order", restart)
        seed = derive_seed(p.seed, "minibatch", restart) % 2**32
        order = torch.randperm(len(p.x), generator=g)
        result = minibatch(p.x.cpu(), p.k, order=order, expand=config.expand, drop_tail=config.drop_tail, seed=seed)
        return result.centroids.to(p.x), 1, True, None, result.running_weights
    if engine == "clvq":

        def stream(i: int) -> Sequence[Tensor]:
            g = generator(p.seed, "order", restart, i)
            order = torch.randperm(len(p.x), generator=g)
            return p.x.cpu()[systematic_sample(p.weights.cpu(), g)[order]].split(config.batch_size)

        result = clvq(
            stream,
            p.k,
            generator=generator(p.seed, "kmeans", restart),
            passes=config.passes,
            init=None if p.start is None else _occupied(p, p.start).cpu(),  # None: k-means++ on the stream's head
        )
        return result.centroids.to(p.x), config.passes, True, None, result.running_weights
    raise InputError(
        f"there is no clustering engine {engine!r}; use auto, faiss, torch, clvq, minibatch or barycenter"
    )


def _finish(
    p: _Problem,
    c: Tensor,
    engine: str,
    n_iter: int,
    converged: bool,
    labels: Tensor | None,
    running_weights: Tensor | None,
) -> Clustering:
    """Exact assignment to the points that are returned; empty cells filled, or dropped where the data has no more
    distinct points."""
    x, w = p.x, p.weights
    own = torch.arange(len(c), device=c.device)
    if labels is None:
        labels = assign(x[None], c[None])[0]
        # Neighbors settle by Lloyd iterations, but not those of a stream, whose centroids no Lloyd iteration makes:
        # D4M leaves an empty one where it is, with no image, and here it moves alone. It moves once, since it then
        # owns the point on which it lies.
        settling = RELOCATIONS if engine in ("torch", "faiss") else 0
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
    mass = cell_totals(w, labels, len(c))
    own = own[mass > 0]
    if len(own) < len(c):
        c, running_weights = c[own], running_weights[own.cpu()] if running_weights is not None else None
        renumber = torch.full((len(mass),), -1, device=c.device)
        renumber[own] = torch.arange(len(own), device=c.device)
        labels = renumber[labels]
        labels = torch.where(labels < 0, assign(x[None], c[None])[0], labels)
    distance = squared_distances(x[None], c[None], labels[None])[0].double() * w.double()
    return Clustering(
        centroids=c + p.mean,
        labels=labels,
        counts=torch.bincount(labels, minlength=len(c)),
        masses=cell_totals(w, labels, len(c)),
        sse=cell_totals(distance, labels, len(c)),
        engine=engine,
        n_iter=n_iter,
        converged=converged,
        asked=p.asked,
        running_weights=running_weights,
    )


def _report(p: _Problem, result: Clustering, config: ClusterConfig) -> Clustering:
    """Sort by mass, largest first, and say when there are fewer prototypes than asked."""
    k = len(result.centroids)
    if k < p.asked:
        sentence = f"{p.name} has only {k} distinct points to offer for ipc={p.asked}"
        if config.on_small == "raise":
            raise too_small(sentence)
        warnings.warn(f"{sentence}; it gets {k} prototypes", stacklevel=3)
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
    x: Any, result: Clustering, *, weights: Any = None, with_uniform: bool = True
) -> dict[str, float]:
    """The numbers logged per class.

    `distortion` is the (weighted) mean squared distance to the centroid of the cell; `w2_mass` its root, the exact W2
    between the class and the centroids with their Voronoi masses; `w2_uniform` the exact W2 with weights 1/k (network
    simplex); `ess_mass` and `ess_sqrt` effective sample sizes (sum w)^2 / sum w^2 of the masses and their roots;
    `explained` the share of the variance between cells.

    Args:
        x: (n, d) points, those of which `result` is a clustering.
        weights: (n,) those of the clustering; None: there were none.

    Raises:
        InputError: if x, weights and result do not belong together.
    """
    x, c = _same_space(as_points(x, "x"), result.centroids)
    n = len(x)
    if len(result.labels) != n:
        raise InputError(f"the clustering is of {len(result.labels)} points, not of the {n} that are given")
    w = torch.ones(n) if weights is None else as_weights(weights, n, "weights of x")
    w = w.to(x.device, torch.float64)
    shift = x.mean(0)  # before float64 is rounded
    x, c = (x - shift).float(), (c - shift).float()
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
        "w2_uniform": uniform_w2(x, c, None if weights is None else w) if with_uniform else math.nan,
        "ess_mass": float(masses.sum() ** 2 / masses.square().sum()),
        "ess_sqrt": float(masses.sqrt().sum() ** 2 / masses.sum()),
        "explained": 1 - distortion / variance if variance > 0 else 1.0,
        "n_iter": result.n_iter,
        "converged": float(result.converged),
    }
