"""Pruning of a class by difficulty: PAD's rule, other policies and controls.

Ranks count from 0, the easiest image of a class. rho = ipc / n is the share of a class of n images that a set has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dq.config.pruning import DEFAULT_SHARES, PruneConfig
from dq.core.seeds import generator


def hard_drop(ratio: float) -> float:
    """Return the share of hardest images of a class that is dropped.

    At a small ratio rho = ipc / n:

        0.20 clip(log10(0.01 / rho) / log10(0.01 / 0.0002), 0, 1)

    0.2 at a ratio of 0.02 % (CIFAR-10 at ipc 1), falling to 0 at 1 %. Fitted to PAD's plots (arXiv 2408.03360, figure
    2), which have these two ends alone; the logarithm between them is an assumption.
    """
    return 0.20 * min(max(math.log10(0.01 / ratio) / math.log10(0.01 / 0.0002), 0.0), 1.0)


def easy_drop(ratio: float) -> float:
    """Return the share of easiest images of a class that is dropped.

    At a large ratio rho = ipc / n:

        0.10 clip(log10(rho / 0.01) / log10(0.10 / 0.01), 0, 1)

    0 at 1 %, rising to 0.1 at 10 %; see `hard_drop`.
    """
    return 0.10 * min(max(math.log10(ratio / 0.01) / math.log10(0.10 / 0.01), 0.0), 1.0)


def minimum_size(n: int, ipc: int, settings: PruneConfig) -> int:
    """Return the number of images of a class of n that every policy keeps at least.

    It is max(`keep_per_ipc` ipc, `keep_share` n), and all of a smaller class.
    """
    return min(n, max(math.ceil(settings.keep_per_ipc * ipc), math.ceil(settings.keep_share * n)))


def rank_band(n: int, ipc: int, settings: PruneConfig) -> range:
    """Return the ranks, from easy to hard, that a policy keeps of n images.

        none                     all
        pad, random, reversed    the hardest int(hard_drop(rho) n) and the easiest int(easy_drop(rho) n) go; one of
                                 the two is 0
        hard, easy               the hardest, the easiest int(share n) go
        window                   the hardest int(share ipc) go, and what is easier than the `minimum_size` that follow
                                 (SelMatch, arXiv 2406.18561, which keeps ipc of them)

    `random` and `reversed` are controls with the counts of `pad`: they keep these ranks of another order, see
    `policy_order`. Where a policy would keep less than `minimum_size`, it drops less.
    """
    share = DEFAULT_SHARES.get(settings.policy, 0.0) if settings.share is None else settings.share
    minimum = minimum_size(n, ipc, settings)
    if settings.policy == "none" or not n:
        return range(n)
    if settings.policy == "window":
        stop = max(n - int(share * ipc), minimum)
        return range(stop - minimum, stop)
    hard, easy = hard_drop(ipc / n), easy_drop(ipc / n)
    if settings.policy in ("hard", "easy"):
        hard, easy = (share, 0.0) if settings.policy == "hard" else (0.0, share)
    spare = n - minimum
    return range(min(int(easy * n), spare), n - min(int(hard * n), spare))


def policy_order(order: Tensor, settings: PruneConfig, *seed: object) -> Tensor:
    """Return the order (n,) in which a policy counts its ranks.

    From easy to hard, for `reversed` from hard to easy, and for `random` drawn by `seed`, whatever the difficulty.
    """
    if settings.policy == "random":
        return order.sort().values[torch.randperm(len(order), generator=generator("prune", *seed))]
    return order.flip(0) if settings.policy == "reversed" else order


@dataclass(frozen=True)
class Pruned:
    """Images of one class of n that a policy keeps."""

    mask: Tensor  # (n,) bool, by position; of the images that are kept
    ranks: Tensor  # (n,) int64, rank of each image in the order of the policy
    band: range  # of the ranks that are kept

    @property
    def cells(self) -> float:
        """Images of the class for each one that is kept."""
        return len(self.mask) / len(self.band)

    def weights(self, outside: float) -> Tensor:
        """Return (n,) float32: 1 for images that are kept, `outside` for the others."""
        return torch.where(self.mask, 1.0, outside)


def prune_class(order: Tensor, ipc: int, settings: PruneConfig, *seed: object) -> Pruned:
    """Prune a class by a policy.

    `order` (n,) int64 are positions 0, ..., n - 1 of the images, the easiest first; `seed` is of the policy `random`:
    anything that names run and class.
    """
    order = policy_order(order, settings, *seed)
    band = rank_band(len(order), ipc, settings)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    return Pruned((ranks >= band.start) & (ranks < band.stop), ranks, band)


def clusters_in_band(labels: Tensor, pruned: Pruned, keep: int) -> Tensor:
    """Select the `keep` clusters whose mean ranks lie deepest in the band.

    Returns (keep,) int64, ascending. The rule by images would drop the clusters whose mean rank lies outside the band.
    As the mean of many ranks hardly ever does, and as sets are compared at equal size, so many are dropped as leave
    `keep`: first those outside the band, the farthest first, then those nearest to an end at which the policy drops.
    `labels` (n,) is the cluster of each image; no cluster is empty.
    """
    k = int(labels.max()) + 1
    ranks = pruned.ranks.double().to(labels.device)
    means = ranks.new_zeros(k).index_add_(0, labels, ranks) / torch.bincount(labels, minlength=k)
    outside = torch.full_like(means, -math.inf)
    if pruned.band.start > 0:
        outside = torch.maximum(outside, pruned.band.start - means)
    if pruned.band.stop < len(ranks):
        outside = torch.maximum(outside, means - (pruned.band.stop - 1))
    return outside.argsort(stable=True)[:keep].sort().values
