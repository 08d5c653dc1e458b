"""Losses, pictures, checks and saved states of learning a set."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dq.core.plain import PlainDict, PlainMapping
from dq.refine.optimize import SHOWN
from dq.refine.rendering import Rendering

SAVE_SECONDS = 60.0  # between two saved states
STRIPS = 4  # pictures of the first images, spread over the steps


@dataclass
class Record:
    """Losses, pictures and checks of a method, beside its learned tensors."""

    trace: Tensor  # (steps, terms) float32 terms of the loss
    strips: list[Tensor]  # (<= SHOWN, 3, S, S) each: the first images at the start and STRIPS times
    facts: PlainDict  # plain data
    best: dict[str, Tensor] = field(default_factory=dict)  # learned tensors of the best check, by names in a state
    saved_s: float = field(default_factory=time.perf_counter)  # time of the last saved state

    @staticmethod
    def restored(tensors: Mapping[str, Tensor], facts: PlainMapping, device: torch.device) -> Record:
        """The record of a saved state, with the best tensors on a device."""
        best = {k: v.to(device) for k, v in tensors.items() if k == "best" or k.startswith("best.")}
        return Record(tensors["trace"].clone(), list(tensors["strips"]), dict(facts), best)

    def add_picture(self, step: int, rendering: Rendering, values: Tensor) -> None:
        """Keep a picture of the first images if it is due."""
        if (step + 1) % max(1, len(self.trace) // STRIPS) == 0:
            self.strips.append(rendering.pixels(values[:SHOWN]).cpu())

    def add_check(self, steps: int, score: float, learned: dict[str, Tensor]) -> None:
        """Add a check, and keep the learned tensors of the best."""
        earlier = self.facts.get("checks", [])
        self.facts["checks"] = [*earlier, [steps, round(score, 5)]]
        if score > max((s for _, s in earlier), default=-1.0):
            self.best = learned

    def save_due(self, steps: int) -> bool:
        """Whether a state is due after so many steps; restarts the clock."""
        now = time.perf_counter()
        due = now - self.saved_s >= SAVE_SECONDS and steps < len(self.trace)
        if due:
            self.saved_s = now
        return due

    def tensors(self, learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a state, copied to the CPU."""
        tensors = {**learned, **self.best, "trace": self.trace, "strips": torch.stack(self.strips)}
        return {k: v.detach().cpu().clone() for k, v in tensors.items()}

    def blocks(self) -> Tensor:
        """The pictures (k, n, 3, S, S) in [0, 1]."""
        return torch.stack(self.strips).clamp(0, 1)
