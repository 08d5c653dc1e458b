"""SGD with momentum on a tensor of a set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Learned:
    """A tensor and its velocity.

    v = momentum v + gradient, value = value - lr v, as `torch.optim.SGD` has it.
    """

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

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Value and velocity by their names in a state."""
        return {f"{name}.value": self.value, f"{name}.velocity": self.velocity}

    @staticmethod
    def restored(tensors: Mapping[str, Tensor], name: str, device: torch.device) -> Learned:
        """Copies of what `tensors` gave, on a device."""
        value, velocity = (tensors[f"{name}.{k}"].to(device, copy=True) for k in ("value", "velocity"))
        return Learned(value, velocity)
