"""SGD with momentum on a tensor of a set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Learned:
    """A tensor that is learned: v = momentum v + gradient, value = value - lr v, as `torch.optim.SGD` has it."""

    value: Tensor
    velocity: Tensor

    @staticmethod
    def of(value: Tensor) -> Learned:
        """Start at a value, at rest."""
        return Learned(value, torch.zeros_like(value))

    def step(self, gradient: Tensor, lr: float, momentum: float) -> None:
        """Move along the gradient."""
        self.velocity = momentum * self.velocity + gradient
        self.value = self.value - lr * self.velocity
