"""Quantizers of streams: CLVQ, and D4M's one-pass mini-batch k-means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dq.cluster.inputs import as_points, as_tensor
from dq.cluster.lloyd import assign, kmeans_plusplus
from dq.core.errors import InputError
from dq.core.numbers import whole_number


@dataclass(frozen=True)
class StreamResult:
    """Centroids of a stream and their masses."""

    centroids: Tensor  # (k, d) float32
    running_weights: Tensor  # (k,) float64, running estimate of the masses, sums to 1
    steps: int  # samples seen


def clvq(
    stream: Callable[[int], Iterable[Tensor]],
    k: int,
    *,
    generator: torch.Generator,
    passes: int = 1,
    init: object = None,
    step: tuple[float, float] | None = None,
    init_size: int | None = None,
) -> StreamResult:
    """Competitive Learning Vector Quantization: SGD on the distortion (Pagès 2015).

        k* = argmin_k |z - x_k|;   x_k* <- x_k* - g (x_k* - z);   w <- (1 - g') w + g' e_k*

    Memory is bounded by one batch and the start buffer. Within a batch the winners are found with the centroids at
    its beginning and the updates are then applied in order, in closed form; batches of one give the textbook method.

    Args:
        stream: `stream(pass)` iterates over batches (b, d) of that pass, in the order to be used.
        k: number of centroids.
        generator: for the starting points.
        passes: over the stream.
        step: (a, b) for g_l = a / (b + l) with l the sample count, for points and running weights alike (the
            global schedule of the theory). Default: g = 1 / (samples won by k* so far), MacQueen's step, with
            g' = 1 / l, whose running weights are the shares of samples won.
        init: starting points (k, d). Default: greedy k-means++ on the first `init_size` samples.
        init_size: samples for the default start; None: 20 k.

    Returns:
        Points and running weights. Exact masses need one more pass that assigns without moving.
    """
    k = whole_number(k, "k")
    centroids = _start_points(stream, k, generator, init_size or 20 * k) if init is None else as_points(init, "init")
    if len(centroids) != k:
        raise InputError(f"init has {len(centroids)} points but k={k}; give k of them")
    state = _Clvq(
        centroids.double().clone(), torch.zeros(k, dtype=torch.float64), torch.full((k,), 1 / k, dtype=torch.float64)
    )
    for p in range(passes):
        for batch in stream(p):
            z = as_points(batch, "a batch of the stream").double()
            if z.shape[1] != centroids.shape[1]:
                raise InputError(f"a batch of the stream has {z.shape[1]} coordinates and init {centroids.shape[1]}")
            state.update(z, step)
    if state.seen == 0:
        raise InputError("the stream for CLVQ gave no samples")
    weights = state.running_weights
    return StreamResult(state.centroids.float(), weights / weights.sum(), state.seen)


@dataclass
class _Clvq:
    """Centroids of CLVQ while samples come in."""

    centroids: Tensor  # (k, d) float64
    won: Tensor  # (k,) samples won; starting points are samples that come again, and count for nothing by themselves
    running_weights: Tensor  # (k,) float64
    seen: int = 0  # samples

    def update(self, z: Tensor, step: tuple[float, float] | None) -> None:
        """Move the centroids by a batch z (m, d), with the steps of `clvq`."""
        winner = assign(z[None].float(), self.centroids[None].float())[0]
        m, k = len(z), len(self.centroids)
        clock = torch.arange(self.seen + 1, self.seen + m + 1, dtype=torch.float64)
        if step is None:
            weight_gain = 1 / clock
            order = _rank_in_group(winner)  # 0, 1, ... among the samples that the same point won
            gain = 1 / (self.won[winner] + order + 1)
        else:
            weight_gain = gain = step[0] / (step[1] + clock)
            if gain.max() > 1:
                raise InputError(f"CLVQ step a/(b+l) with a={step[0]}, b={step[1]} exceeds 1; choose a <= b + 1")
        member = torch.zeros(m, k, dtype=torch.float64)
        member[torch.arange(m), winner] = 1.0
        pull, remain = _in_order(member * gain[:, None])
        self.centroids = remain[:, None] * self.centroids + pull.T @ z
        # every sample decays the running weights, the winner's gets the gain
        decay = (1 - weight_gain).flip(0).cumprod(0).flip(0)
        after = torch.cat([decay[1:], decay.new_ones(1)])
        self.running_weights = decay[0] * self.running_weights + member.T @ (weight_gain * after)
        self.won += member.sum(0)
        self.seen += m


def systematic_sample(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Systematic resampling by weights (n,) (Carpenter et al. 1999).

    n ascending indices (n,) int64; index i comes floor or ceil of n w_i / sum(w) times, with that number as its
    expectation. Equal weights give every index once.
    """
    n = len(weights)
    cumulative = weights.double().cumsum(0)
    offset = torch.rand((), dtype=torch.float64, generator=generator)
    ticks = (torch.arange(n, dtype=torch.float64) + offset) * (cumulative[-1] / n)
    drawn = torch.searchsorted(cumulative, ticks, right=True)
    return drawn.clamp(max=int(weights.gt(0).nonzero().max()))


def _in_order(gains: Tensor) -> tuple[Tensor, Tensor]:
    """Closed form of x <- (1 - g_i) x + g_i z_i for i = 1..m.

    Per column of gains (m, k), zero where not won. Returns the weight of each sample, g_i prod_{j>i} (1 - g_j), (m,
    k), and of the start, prod_j (1 - g_j), (k,).
    """
    decay = (1 - gains).flip(0).cumprod(0).flip(0)
    after = torch.cat([decay[1:], decay.new_ones(1, gains.shape[1])])
    return gains * after, decay[0]


def _rank_in_group(group: Tensor) -> Tensor:
    """How many earlier entries have the same value, (m,) float64."""
    order = group.argsort(stable=True)
    sorted_group = group[order]
    first = torch.searchsorted(sorted_group, sorted_group)
    rank = torch.empty(len(group), dtype=torch.float64)
    rank[order] = (torch.arange(len(group)) - first).double()
    return rank


def _start_points(stream: Callable[[int], Iterable[Tensor]], k: int, generator: torch.Generator, size: int) -> Tensor:
    """Starting points (k, d) by k-means++ on the first samples of a stream."""
    buffer: list[Tensor] = []
    samples = 0
    for batch in stream(0):
        buffer.append(as_points(batch, "a batch of the stream")[: size - samples].float())
        samples += len(buffer[-1])
        if samples >= size:
            break
    if samples < k:
        raise InputError(f"the stream for CLVQ gave {samples} samples but k={k}")
    x = torch.cat(buffer)[None]
    chosen = kmeans_plusplus(x, torch.ones(1, samples), k, [generator])[0]
    return x[0, chosen].double()


def minibatch(x: object, k: int, *, order: object, expand: int, drop_tail: bool, seed: int) -> StreamResult:
    """D4M's quantizer: one pass of scikit-learn's `MiniBatchKMeans.partial_fit`.

    On batches of expand * k points in `order` (Su et al., CVPR 2024; the released code).

    `drop_tail=True` reproduces the released code's fault: after the loop only the class of the very last image is
    flushed, so that n mod (expand * k) images of every other class never count. By default the tail is fitted.
    """
    from sklearn.cluster import MiniBatchKMeans

    k, expand = whole_number(k, "k"), whole_number(expand, "expand")
    x = as_points(x, "x", finite=True)
    points = x[as_tensor(order, "order").to(x.device, torch.int64)].cpu().numpy()
    size = expand * k
    if len(points) < k:
        raise InputError(f"x has {len(points)} points but k={k}; lower k")
    if len(points) < size and drop_tail:
        raise InputError(
            f"a class of {len(points)} images never fills one batch of expand*k = {size}, so D4M's code would not fit "
            "it at all; lower cluster.expand or set cluster.drop_tail=false"
        )
    model = MiniBatchKMeans(n_clusters=k, random_state=seed, n_init="auto")
    full = len(points) // size * size
    starts = list(range(0, full, size))
    tail = points[full:]
    if not drop_tail and len(tail) and not starts and len(tail) >= k:
        model.partial_fit(tail)
    for start in starts:
        model.partial_fit(points[start : start + size])
    if not drop_tail and starts and len(tail):
        model.partial_fit(tail)
    counts = torch.from_numpy(model._counts.astype("float64"))
    return StreamResult(
        torch.from_numpy(model.cluster_centers_.astype("float32")).to(x.device),
        counts / counts.sum().clamp(min=1e-30),
        len(points) if not drop_tail else full,
    )
