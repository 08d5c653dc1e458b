"""The door to all engines: checks, centring, restarts, exact final assignment, and the numbers that describe it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dq.cluster.faiss_engine import lloyd_faiss
from dq.cluster.lloyd import assign, cell_sums, fill_empty, kmeans_plusplus, lloyd, race, squared_distances
from dq.cluster.online import clvq, minibatch
from dq.cluster.transport import barycentre, uniform_w2
from dq.config.schema import ClusterConfig
from dq.core.errors import InputError
from dq.core.seeds import derive_seed, generator


@dataclass(frozen=True)
class Clustering:
    """k points of one class and the cells that they own. No cell is empty; `counts` sum to n."""

    centroids: Tensor  # (k, d) float32
    labels: Tensor  # (n,) int64, nearest centroid (barycentre engine: the balanced cell)
    counts: Tensor  # (k,) int64, points per cell
    sse: Tensor  # (k,) float64, sum of (weighted) squared distances per cell
    engine: str
    n_iter: int
    converged: bool
    asked: int  # the k asked for; len(centroids) is smaller where the class has fewer distinct points
    companion: Tensor | None = None  # (k,) float64, masses as the stream saw them (clvq, minibatch)

    @property
    def inertia(self) -> float:
        """Sum of squared distances; inertia / n is the distortion and equals W2^2 of the points with their masses."""
        return float(self.sse.sum())


def choose_engine(engine: str) -> str:
    """What `auto` stands for: torch, everywhere. From the same start neither it nor FAISS is clearly faster on two CPU
    cores (`benchmarks/cluster.py`), and torch runs many classes at once on an accelerator."""
    return "torch" if engine == "auto" else engine


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid, (n,) int64, for x (n, d) and centroids (k, d)."""
    shift = x.mean(0)
    return assign((x - shift)[None], (centroids - shift)[None])[0]


def kmeans(
    x: Tensor,
    k: int,
    *,
    config: ClusterConfig | None = None,
    weights: Tensor | None = None,
    seed: int = 0,
    start: Tensor | None = None,
    name: str = "the data",
) -> Clustering:
    """Quantize x (n, d) with k points: minimise sum_i w_i min_k |x_i - c_k|^2.

    All engines run on centred float32 data and end in an exact assignment to the points that are returned. `faiss`,
    `torch` and `barycentre` start from the same seeded points (or `start`), so that the choice among the first two
    changes speed, not results beyond rounding; the two streams start from their own first samples.

    Args:
        config: engine and its settings; see `ClusterConfig`.
        weights: (n,) non-negative weights of the points; not for `minibatch` and `barycentre`. They weigh the sum
            above and the means; `counts` stay numbers of points.
        seed: of the start points and, for streams, of the order.
        start: (k, d) starting centroids instead of drawn ones.
        name: how messages name the data, e.g. "class 3 'cat'".

    Raises:
        InputError: for non-finite data, k < 1, or fewer distinct points than k with `on_small="raise"`.
    """
    return kmeans_many([x], k, config=config, weights=[weights], seeds=[seed], starts=[start], names=[name])[0]


def kmeans_many(
    xs: Sequence[Tensor],
    k: int,
    *,
    config: ClusterConfig | None = None,
    weights: Sequence[Tensor | None] | None = None,
    seeds: Sequence[int] | None = None,
    starts: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
) -> list[Clustering]:
    """`kmeans` on several classes. With the torch engine they run together, padded to the largest, and give what the
    loop over classes gives; the other engines loop."""
    config = config or ClusterConfig()
    B = len(xs)
    weights, starts = weights or [None] * B, starts or [None] * B
    seeds, names = seeds or list(range(B)), names or ["the data"] * B
    if k < 1 or config.n_iter < 1 or config.n_init < 1:
        raise InputError(f"k={k}, n_iter={config.n_iter} and n_init={config.n_init} must be at least 1")
    problems = [_Problem.check(*args, k, config) for args in zip(xs, weights, starts, seeds, names)]
    engine = choose_engine(config.engine)
    best: list[Clustering | None] = [None] * B
    for restart in range(config.n_init):
        if engine == "torch":
            found = _run_torch(problems, restart, config)
        else:
            found = [_run_one(p, engine, restart, config) for p in problems]
        for i, (p, (centroids, n_iter, converged, labels, companion)) in enumerate(zip(problems, found)):
            result = _finish(p, centroids, engine, n_iter, converged, labels, companion)
            rival = best[i]
            if rival is None or result.inertia < rival.inertia:
                best[i] = result
    return [_report(p, r, config) for p, r in zip(problems, best) if r is not None]


_Found = tuple[Tensor, int, bool, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class _Problem:
    """One class, checked and centred."""

    x: Tensor  # (n, d) float32, mean zero
    mean: Tensor  # (d,)
    weights: Tensor  # (n,) float32
    weighted: bool
    start: Tensor | None
    k: int
    asked: int
    seed: int
    name: str

    @staticmethod
    def check(
        x: Tensor, weights: Tensor | None, start: Tensor | None, seed: int, name: str, k: int, config: ClusterConfig
    ) -> _Problem:
        if x.ndim != 2 or not len(x):
            raise InputError(f"{name} must be a non-empty (n, d) array, not {tuple(x.shape)}")
        x = x if x.dtype == torch.float64 else x.float()
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
        if weights is not None and config.engine in ("minibatch", "barycentre"):
            raise InputError(f"cluster.engine={config.engine} takes no point weights; use faiss, torch or clvq")
        w = torch.ones(len(x), device=x.device) if weights is None else weights.to(x)
        if w.shape != (len(x),) or not (torch.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
            raise InputError(f"weights of {name} must be ({len(x)},), finite, non-negative and not all zero")
        allowed = min(k, int((w > 0).sum()))
        if allowed < k and config.on_small == "raise":
            raise InputError(
                f"{name} has {allowed} images but ipc={k}; lower ipc, drop the class, or set cluster.on_small=clamp"
            )
        if start is not None and start.shape != (k, x.shape[1]):
            raise InputError(f"start centroids of {name} must be ({k}, {x.shape[1]}), not {tuple(start.shape)}")
        mean = x.mean(0)  # subtracted before float64 is rounded, so that large offsets cost no digits
        centred = None if start is None else (start.to(x)[:allowed] - mean).float()
        return _Problem((x - mean).float(), mean, w.float(), weights is not None, centred, allowed, k, seed, name)


def _start_points(group: list[_Problem], x: Tensor, weights: Tensor, restart: int, config: ClusterConfig) -> Tensor:
    """Starting centroids (B, k, d) of classes with the same k, padded to x (B, n, d); each class draws from its own
    generator, so that it starts the same alone and in company."""
    if group[0].start is not None:
        return torch.stack([p.start for p in group if p.start is not None])
    generators = [generator(p.seed, "kmeans", restart) for p in group]
    k = group[0].k
    if config.init == "race":
        return race(x, weights, k, generators, tol=config.tol)
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


def _run_one(p: _Problem, engine: str, restart: int, config: ClusterConfig) -> _Found:
    if engine in ("faiss", "barycentre"):
        start = _start_points([p], p.x[None], p.weights[None], restart, config)[0]
    if engine == "faiss":
        w = p.weights if p.weighted else None
        centroids, used, converged = lloyd_faiss(p.x, start, w, n_iter=config.n_iter, tol=config.tol)
        return centroids, used, converged, None, None
    if engine == "barycentre":
        points, labels, used, converged = barycentre(
            p.x,
            start,
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
        return result.centroids.to(p.x), 1, True, None, result.companion
    if engine == "clvq":

        def stream(i: int) -> Sequence[Tensor]:
            probability = p.weights.cpu()
            g = generator(p.seed, "order", restart, i)
            if p.weighted:  # a weighted law is sampled, n draws a pass
                order = torch.multinomial(probability, len(p.x), replacement=True, generator=g)
            else:
                order = torch.randperm(len(p.x), generator=g)
            return p.x.cpu()[order].split(config.batch_size)

        result = clvq(
            stream,
            p.k,
            generator=generator(p.seed, "kmeans", restart),
            passes=config.passes,
            init=None if p.start is None else p.start.cpu(),  # else k-means++ on the head of the stream
        )
        return result.centroids.to(p.x), config.passes, True, None, result.companion
    raise InputError(
        f"there is no clustering engine {engine!r}; use auto, faiss, torch, clvq, minibatch or barycentre"
    )


def _finish(
    p: _Problem, c: Tensor, engine: str, n_iter: int, converged: bool, labels: Tensor | None, companion: Tensor | None
) -> Clustering:
    """Exact assignment to the points that are returned; empty cells filled, or dropped where the data has no more
    distinct points."""
    x, w = p.x, p.weights
    own = torch.arange(len(c), device=c.device)
    if labels is None:
        labels = assign(x[None], c[None])[0]
        for _ in range(3):
            mass = torch.bincount(labels, weights=w, minlength=len(c))
            if (mass > 0).all():
                break
            # An iteration of Lloyd after each relocation lets the neighbours settle.
            c = fill_empty(x, c, labels, w, mass)
            labels = assign(x[None], c[None])[0]
            sums, mass = cell_sums(x[None], labels[None], w[None], len(c))
            c = torch.where(mass[0, :, None] > 0, sums[0] / mass[0, :, None].clamp(min=1e-30), c)
            labels = assign(x[None], c[None])[0]
    mass = torch.bincount(labels, weights=w, minlength=len(c))
    own = own[mass > 0]
    if len(own) < len(c):
        c, companion = c[own], companion[own.cpu()] if companion is not None else None
        renumber = torch.full((len(mass),), -1, device=c.device)
        renumber[own] = torch.arange(len(own), device=c.device)
        labels = renumber[labels]
        labels = torch.where(labels < 0, assign(x[None], c[None])[0], labels)
    distance = squared_distances(x[None], c[None], labels[None])[0].double() * w.double()
    counts = torch.bincount(labels, minlength=len(c))
    sse = torch.bincount(labels, weights=distance, minlength=len(c))
    return Clustering(c + p.mean, labels, counts, sse, engine, n_iter, converged, p.asked, companion=companion)


def _report(p: _Problem, result: Clustering, config: ClusterConfig) -> Clustering:
    """Sort by mass, largest first, and say when there are fewer prototypes than asked."""
    k = len(result.centroids)
    if k < p.asked:
        sentence = f"{p.name} has only {k} distinct points to offer for ipc={p.asked}"
        if config.on_small == "raise":
            raise InputError(f"{sentence}; lower ipc, drop the class, or set cluster.on_small=clamp")
        warnings.warn(f"{sentence}; it gets {k} prototypes", stacklevel=3)
    order = result.counts.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(k, device=order.device)
    return dataclasses.replace(
        result,
        centroids=result.centroids[order],
        labels=rank[result.labels],
        counts=result.counts[order],
        sse=result.sse[order],
        companion=result.companion[order.cpu()] if result.companion is not None else None,
    )


def quantization_stats(x: Tensor, result: Clustering, *, with_uniform: bool = True) -> dict[str, float]:
    """The numbers logged per class.

    `distortion` is sse / n; `w2_mass` its root, the exact W2 between the class and the points with their Voronoi
    masses; `w2_uniform` the exact W2 with weights 1/k (network simplex); `ess_mass` and `ess_sqrt` effective sample
    sizes (sum w)^2 / sum w^2 of the masses and their roots; `explained` the share of the variance between cells.
    """
    x = x.float()
    c = result.centroids
    labels = result.labels if result.engine != "barycentre" else nearest(x, c)
    sse = float(squared_distances(x[None], c[None], labels[None]).double().sum())
    total = float((x - x.mean(0)).double().square().sum())
    counts = torch.bincount(labels, minlength=len(c)).double()
    return {
        "n": len(x),
        "k": len(c),
        "distortion": sse / len(x),
        "w2_mass": math.sqrt(sse / len(x)),
        "w2_uniform": uniform_w2(x, c) if with_uniform else math.nan,
        "ess_mass": float(counts.sum() ** 2 / counts.square().sum()),
        "ess_sqrt": float(counts.sqrt().sum() ** 2 / counts.sum()),
        "explained": 1 - sse / total if total > 0 else 1.0,
        "n_iter": result.n_iter,
        "converged": float(result.converged),
    }
