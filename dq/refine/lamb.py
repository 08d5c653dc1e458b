"""LAMB on one tensor (You et al. 2020, arXiv 1904.00962), with a cosine schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPS = 1e-6


@dataclass
class Lamb:
    """A tensor with its moments.

    All images of a set are one tensor, and all its labels another: with a tensor for each image the ratio of norms,
    and so every step, would be another one.
    """

    value: Tensor
    first: Tensor  # mean of gradients
    second: Tensor  # mean of squared gradients
    steps: int = 0  # that are done

    @staticmethod
    def of(value: Tensor) -> Lamb:
        """Start an optimization, with a copy of the tensor."""
        value = value.detach().clone()
        return Lamb(value, torch.zeros_like(value), torch.zeros_like(value))

    @torch.no_grad()
    def step(self, gradient: Tensor, lr: float) -> None:
        """Update by p <- p - lr |p| / |u| u.

        Norms are over the tensor, and u = m / (sqrt(v) + eps) with bias-corrected moments. A norm of 0 makes the ratio
        1. No weight decay and no clipping, as in FRePo's released code.
        """
        self.steps += 1
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.lerp_(gradient.square(), 1 - BETAS[1])
        m, v = self.first / (1 - BETAS[0] ** self.steps), self.second / (1 - BETAS[1] ** self.steps)
        u = m / (v.sqrt() + EPS)
        length, update = self.value.norm(), u.norm()
        ratio = torch.where((length > 0) & (update > 0), length / update, torch.ones_like(length))
        self.value -= lr * ratio * u

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Value and moments by their names in a state."""
        return {f"{name}.{k}": getattr(self, k) for k in ("value", "first", "second")}

    @staticmethod
    def restored(tensors: Mapping[str, Tensor], name: str, steps: int, device: torch.device) -> Lamb:
        """Copies of what `tensors` gave, on a device, after so many steps."""
        value, first, second = (tensors[f"{name}.{k}"].to(device, copy=True) for k in ("value", "first", "second"))
        return Lamb(value, first, second, steps)


def cosine_lr(step: int, steps: int, lr: float, floor: float) -> float:
    """Cosine learning rate of a step, from `lr` to `floor` times it."""
    return lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))
