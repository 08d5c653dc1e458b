"""Seconds of an operation: one clock for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from dq.core.seeds import generator

BUDGET_S: ContextVar[float] = ContextVar("budget_s", default=6.0)  # for the repeats of one operation
REPEATS = 3


@dataclass(frozen=True)
class Speed:
    """Seconds of one call: the middle of some repeats and the extremes."""

    seconds: float
    least: float
    most: float
    batch: int  # calls at once


def timed(
    work: Callable[[Any], float | None],
    largest: int,
    *,
    device: torch.device,
    smallest: int = 1,
    budget_s: float | None = None,
    prepare: Callable[[int], Any] = int,
) -> Speed:
    """Time one call of `work`, as the median of some repeats.

    Batches double up to `largest` while the budget lasts.

    Args:
        work: does what `prepare` gave; returns the seconds that count, or None for all of them.
        largest: calls at once, at most.
        device: where to compute.
        smallest: calls at once, at least.
        budget_s: seconds for the repeats; None: `BUDGET_S`.
        prepare: makes the input of so many calls, outside of the clock; by default their number.
    """

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()

    def once(size: int) -> float:
        ready = prepare(size)
        wait()
        began = time.perf_counter()
        reported = work(ready)
        wait()
        return time.perf_counter() - began if reported is None else reported

    budget_s = BUDGET_S.get() if budget_s is None else budget_s
    size = min(smallest, largest)
    once(size)
    taken = once(size)
    while size < largest and 2 * taken * REPEATS <= budget_s:  # a batch twice as large takes at most twice as long
        size = min(2 * size, largest)
        taken = once(size)
    each = sorted(once(size) / size for _ in range(REPEATS))
    return Speed(statistics.median(each), each[0], each[-1], size)


def random_pixels(size: int, side: int) -> torch.Tensor:
    """Images (size, 3, side, side) uint8 to measure with."""
    return torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator("speeds", size))
