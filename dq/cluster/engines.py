"""Engines of k-means: each fits centroids to checked and centered classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dq.cluster.faiss_engine import faiss_assigner
from dq.cluster.inputs import as_points, as_weights, too_small
from dq.cluster.lloyd import assign, cell_totals, fill_empty, kmeans_plusplus, lloyd, pca_multistart
from dq.cluster.online import clvq, minibatch, systematic_sample
from dq.cluster.transport import barycenter
from dq.config.schema import ClusterConfig
from dq.core.errors import InputError
from dq.core.numbers import whole_number
from dq.core.plain import PlainDict
from dq.core.seeds import derive_seed, generator
from dq.core.text import plural


@dataclass(frozen=True)
class Problem:
    """The points of one class, checked and centered."""

    x: Tensor  # (n, d) float32, mean zero
    mean: Tensor  # (d,)
    weights: Tensor  # (n,) float32
    start: Tensor | None  # (k, d)
    k: int
    requested: int  # the requested k
    seed: int
    name: str  # in messages


@dataclass(frozen=True)
class Fit:
    """Centroids of one class, before the exact assignment."""

    centroids: Tensor  # (k, d)
    n_iter: int
    converged: bool
    labels: Tensor | None = None  # (n,) balanced cells; None: those of the nearest centroids
    running_weights: Tensor | None = None  # (k,) float64, masses as a stream saw them


def check_problem(
    x: object, weights: object, start: object, seed: object, name: str, k: int, config: ClusterConfig
) -> Problem:
    """Check and center the points of a class.

    Raises:
        InputError: see `dq.cluster.kmeans.kmeans`.
    """
    x, seed = as_points(x, name), whole_number(seed, "seed", minimum=None)
    _check_values(x, name)
    if start is not None and config.engine == "minibatch":
        raise InputError("cluster.engine=minibatch draws its own start, as D4M does; give no start points")
    if weights is not None and config.engine in ("minibatch", "barycenter"):
        raise InputError(f"cluster.engine={config.engine} takes no point weights; use faiss, torch or clvq")
    w = torch.ones(len(x)) if weights is None else as_weights(weights, len(x), f"weights of {name}")
    w = w.to(x.device)
    allowed = min(k, int((w > 0).sum()))
    if allowed < k and config.on_small == "raise":
        raise too_small(f"{name} has {plural(allowed, 'image')} but ipc={k}")
    centers = None if start is None else as_points(start, f"start centroids of {name}", finite=True)
    if centers is not None and centers.shape != (k, x.shape[1]):
        raise InputError(f"start centroids of {name} must be ({k}, {x.shape[1]}), not {tuple(centers.shape)}")
    # Subtracted before float64 is rounded, so that large offsets cost no digits; equal weights are no weights.
    mean = x.mean(0) if bool((w == w[0]).all()) else (w / w.sum()).to(x.dtype) @ x
    centered = None if centers is None else (centers.to(x)[:allowed] - mean).float()
    return Problem((x - mean).float(), mean, w.float(), centered, allowed, k, seed, name)


def _check_values(x: Tensor, name: str) -> None:
    """Refuse points that are not finite, or too large to be squared."""
    size = float(torch.linalg.vector_norm(x))  # one pass for all of them
    if size < 1e18:
        return
    bad = (~torch.isfinite(x)).any(1).nonzero()
    if not len(bad):
        raise InputError(f"{name} has values too large for float32 distances (norm {size:.1e}); scale them")
    raise InputError(
        f"{name} has NaN or infinite latents (first at its point {int(bad[0])}); encode again in bfloat16 or float32"
    )


def _start_points(group: list[Problem], x: Tensor, weights: Tensor, restart: int, config: ClusterConfig) -> Tensor:
    """Starting centroids (B, k, d) of classes of one k, padded to x (B, n, d).

    Each class draws from its own generator, so that it starts the same alone and in a group.
    """
    if group[0].start is not None:
        return torch.stack([p.start for p in group if p.start is not None])
    generators = [generator(p.seed, "kmeans", restart) for p in group]
    k = group[0].k
    if config.init == "pca-multistart":
        return pca_multistart(x, weights, k, generators, tol=config.tol)
    if config.init == "random":
        draws = zip(weights, generators, strict=True)
        chosen = torch.stack([torch.multinomial(w.cpu(), k, generator=g) for w, g in draws])
    else:
        chosen = kmeans_plusplus(x, weights, k, generators)
    return x.gather(1, chosen.to(x.device).unsqueeze(2).expand(-1, -1, x.shape[2]))


def _start_of(p: Problem, restart: int, config: ClusterConfig) -> Tensor:
    """Starting centroids (k, d) of one class."""
    return _start_points([p], p.x[None], p.weights[None], restart, config)[0]


def _occupied(p: Problem, start: Tensor) -> Tensor:
    """Move start points (k, d) that own no point onto points.

    Equal ones would stay equal in an entropic barycenter, and a stream would leave them where they are.
    """
    labels = assign(p.x[None], start[None])[0]
    return fill_empty(p.x, start, labels, p.weights, cell_totals(p.weights, labels, len(start)))[0]


def _padded(parts: list[Tensor]) -> Tensor:
    """Stack tensors, padded with zeros; a single one is not copied."""
    return parts[0][None] if len(parts) == 1 else torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def fit_torch(problems: list[Problem], restart: int, config: ClusterConfig) -> list[Fit]:
    """Lloyd on all classes at once, in groups of the same k and d.

    Classes differ in d where one has fewer principal directions than asked for.
    """
    fits: dict[int, Fit] = {}
    shapes = [(p.k, p.x.shape[1]) for p in problems]
    for shape in dict.fromkeys(shapes):
        group = [i for i, s in enumerate(shapes) if s == shape]
        members = [problems[i] for i in group]
        x, w = _padded([p.x for p in members]), _padded([p.weights for p in members])
        start = _start_points(members, x, w, restart, config)
        centroids, iterations, converged = lloyd(x, start, w, n_iter=config.n_iter, tol=config.tol)
        for row, i in enumerate(group):
            fits[i] = Fit(centroids[row], int(iterations[row]), bool(converged[row]))
    return [fits[i] for i in range(len(problems))]


def fit_faiss(p: Problem, restart: int, config: ClusterConfig) -> Fit:
    """Lloyd with nearest centroids by FAISS."""
    start = _start_of(p, restart, config)[None]
    options: PlainDict = {"n_iter": config.n_iter, "tol": config.tol, "nearest": faiss_assigner(p.x)}
    centroids, iterations, converged = lloyd(p.x[None], start, p.weights[None], **options)
    return Fit(centroids[0], int(iterations[0]), bool(converged[0]))


def fit_barycenter(p: Problem, restart: int, config: ClusterConfig) -> Fit:
    """Free-support Wasserstein barycenter with equal masses."""
    result = barycenter(
        p.x,
        _occupied(p, _start_of(p, restart, config)),
        transport=config.transport,
        entropy=config.entropy,
        n_iter=config.n_iter,
        tol=config.tol,
    )
    return Fit(result.points, result.n_iter, result.converged, result.labels)


def fit_minibatch(p: Problem, restart: int, config: ClusterConfig) -> Fit:
    """D4M's one-pass mini-batch k-means."""
    order = torch.randperm(len(p.x), generator=generator(p.seed, "order", restart))
    seed = derive_seed(p.seed, "minibatch", restart) % 2**32
    result = minibatch(p.x.cpu(), p.k, order=order, expand=config.expand, drop_tail=config.drop_tail, seed=seed)
    return Fit(result.centroids.to(p.x), 1, True, running_weights=result.running_weights)


def fit_clvq(p: Problem, restart: int, config: ClusterConfig) -> Fit:
    """Competitive learning on a stream that samples the weighted points."""

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
    return Fit(result.centroids.to(p.x), config.passes, True, running_weights=result.running_weights)


def _one_by_one(
    fit: Callable[[Problem, int, ClusterConfig], Fit],
) -> Callable[[list[Problem], int, ClusterConfig], list[Fit]]:
    """An engine of single classes as one of several."""
    return lambda problems, restart, config: [fit(p, restart, config) for p in problems]


# By name: classes, number of the restart and settings to a fit of each class
ENGINES: dict[str, Callable[[list[Problem], int, ClusterConfig], list[Fit]]] = {
    "torch": fit_torch,
    "faiss": _one_by_one(fit_faiss),
    "clvq": _one_by_one(fit_clvq),
    "minibatch": _one_by_one(fit_minibatch),
    "barycenter": _one_by_one(fit_barycenter),
}
LLOYD = ("torch", "faiss")  # engines whose centroids Lloyd iterations make
AUTO = "torch"  # as fast as FAISS on two CPU cores (`benchmarks/cluster.py`), and many classes at once on a GPU


def choose_engine(engine: str) -> str:
    """Return the name of the engine: `auto` is always torch."""
    return AUTO if engine == "auto" else engine
