"""Batch statistics of several groups of images in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class GroupStatistics(TorchFunctionMode):
    """Within the block, batch norm in training mode normalizes each of `groups` groups of a batch by itself.

    A batch holds the groups one after another, of equal size. Networks then give what they give for one group after
    another: batch norm bit for bit, convolutions and products up to the rounding with which batch sizes differ.
    Running statistics are not updated.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def __torch_function__(
        self, function: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.batch_norm and self.groups > 1:
            return batch_norm_by_group(self.groups, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def batch_norm_by_group(
    groups: int,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` of each group of x (G * P, C, ...)."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    channels = x.shape[1]
    side_by_side = x.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)  # (P, G * C, ...)
    scale, shift = (None if v is None else v.repeat(groups) for v in (weight, bias))
    out = F.batch_norm(side_by_side, None, None, scale, shift, True, momentum, eps)
    return out.unflatten(1, (groups, channels)).transpose(0, 1).flatten(0, 1)
