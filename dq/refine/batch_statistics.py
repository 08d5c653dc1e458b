"""Sums of the inputs of batch norm layers, and their distance to statistics, with gradients in few kernels.

Every layer gives the sums of its centered inputs and of their squares, of which a batch has one vector for all layers.
Moments, distances and the gradients of the sums are computed on that vector: a kernel for each layer would cost more
than its work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq.refine.moments import Moments

Sums = tuple[Tensor, Tensor]  # (C,) of x - center and (C,) of its square, over images and pixels
TINY = 1e-30  # least norm that divides; the differences are 0 below


class InputSums(torch.autograd.Function):
    """Sums over x (B, C, H, W) of x - center and its square, per channel in float32, with image weights p (B,).

    The gradient of both is an affine function of x, so that one pass gives it. Deviations are taken from `center` (a
    value near the mean), so that nothing cancels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, center: Tensor, p: Tensor | None) -> Sums:
        ctx.save_for_backward(x, center, *([] if p is None else [p]))
        return _sums(x, center, p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, center, *p = ctx.saved_tensors
        return _gradient(x, center, grads[0], grads[1], p[0] if p else None).to(x.dtype), None, None


class NormAndSums(torch.autograd.Function):
    """Batch norm in evaluation mode together with `InputSums` around its running mean.

    One saved tensor and two passes backwards, where autograd would need six. `scale` (C,) is the slope of the norm.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: nn.BatchNorm2d, p: Tensor | None, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        center: Tensor = norm.running_mean  # type: ignore[assignment]
        ctx.save_for_backward(x, center, scale, *([] if p is None else [p]))
        y = F.batch_norm(x, center, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        return (y, *_sums(x, center, p))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, center, scale, *p = ctx.saved_tensors
        total = _gradient(x, center, grads[1], grads[2], p[0] if p else None)
        return total.addcmul_(grads[0], scale.view(1, -1, 1, 1)).to(x.dtype), None, None, None


def _sums(x: Tensor, center: Tensor, p: Tensor | None) -> Sums:
    # The two-pass sum is up to forty times as fast on a CPU as torch.var, which goes channel by channel
    d = x.float() - center.view(1, -1, 1, 1)
    if p is None:
        first = d.sum((0, 2, 3))
        return first, d.square_().sum((0, 2, 3))
    first = p @ d.sum((2, 3))
    return first, p @ d.square_().sum((2, 3))


def _gradient(x: Tensor, center: Tensor, g_first: Tensor, g_second: Tensor, p: Tensor | None) -> Tensor:
    """P (g_first + 2 g_second (x - center)), float32."""
    offset = torch.addcmul(g_first, g_second, center, value=-2).view(1, -1, 1, 1)
    total = torch.addcmul(offset, x.float(), g_second.view(1, -1, 1, 1), value=2)
    return total if p is None else total.mul_(p.view(-1, 1, 1, 1))


@dataclass(frozen=True)
class StatisticsDistance:
    """Distances of the moments of L layers with D channels together to targets."""

    targets: Tensor  # (2, D): means from the centers, and variances
    rows: Tensor  # (L, largest C_l) int64, the channels of each layer; 0 behind its last
    present: Tensor  # (L, largest C_l) float32, 1 for a channel and 0 behind the last
    layer_of: Tensor  # (D,) int64
    channels: tuple[int, ...]  # C_l
    norm: Literal["l2", "squared"]
    shares: dict[tuple[int, ...], Tensor]  # (D,) of 1 / summed values of each channel, by those of each layer

    @staticmethod
    def of(
        targets: Sequence[Moments], centers: Sequence[Tensor], norm: Literal["l2", "squared"]
    ) -> StatisticsDistance:
        """Prepare the distances to targets (C_l,) of sums around centers (C_l,), layer by layer."""
        channels = tuple(len(c) for c in centers)
        starts = torch.tensor([0, *channels]).cumsum(0)[:-1, None]
        columns = torch.arange(max(channels))
        present = columns < torch.tensor(channels)[:, None]
        device = centers[0].device
        layer_of = torch.arange(len(channels)).repeat_interleave(torch.tensor(channels))
        means = torch.cat([t.mean - c for t, c in zip(targets, centers, strict=True)])
        return StatisticsDistance(
            torch.stack([means, torch.cat([t.var for t in targets])]),
            torch.where(present, starts + columns, 0).to(device),
            present.float().to(device),
            layer_of.to(device),
            channels,
            norm,
            {},
        )

    def __call__(self, sums: Sequence[Sums], counts: tuple[int, ...]) -> Tensor:
        """Distance (L,) of every layer, of its sums over so many values."""
        share = self._share(counts)
        first, second = torch.cat([s for pair in zip(*sums, strict=True) for s in pair]).view(2, -1) * share
        moments = torch.stack([first, torch.addcmul(second, first, first, value=-1)])
        return _Norms.apply(self.targets - moments, self)

    def _share(self, counts: tuple[int, ...]) -> Tensor:
        """(D,) 1 / counts of each channel's layer, copied to the device once."""
        if counts not in self.shares:
            numbers = (1 / torch.tensor(counts, dtype=torch.float64)).float()
            self.shares[counts] = numbers.repeat_interleave(torch.tensor(self.channels)).to(self.targets.device)
        return self.shares[counts]


class _Norms(torch.autograd.Function):
    """Norms of differences (2, D) over the channels of each layer, those of means and variances added: (L,)."""

    @staticmethod
    def forward(ctx: Any, differences: Tensor, layout: StatisticsDistance) -> Tensor:
        ctx.layout = layout
        by_layer = differences[:, layout.rows] * layout.present  # (2, L, largest C_l)
        if layout.norm == "squared":
            ctx.save_for_backward(differences)
            return by_layer.square().sum((0, 2))
        norms = torch.linalg.vector_norm(by_layer, dim=2)
        ctx.save_for_backward(differences, norms)
        return norms.sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        differences, *norms = ctx.saved_tensors
        slope = grads[0] / norms[0].clamp(min=TINY) if norms else 2 * grads[0][None]
        return differences * slope[:, ctx.layout.layer_of], None
