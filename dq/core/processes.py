"""Processes: the accelerator, and which process works on which unit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from dq.core.errors import RunError

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(*, cpu: bool = False, mixed_precision: str | None = None) -> Accelerator:
    """Build the one `Accelerator` of this process and check that it sees every launched process.

    Without a GPU, each launched process believes it is alone unless the accelerator is told to use the CPU; the
    result would be as many complete runs writing over one another. Hence the CPU is chosen here when no accelerator
    device exists, and the world size is compared with the launcher's.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    cpu = cpu or not torch.accelerator.is_available()
    # Stages are embarrassingly parallel, so a fast rank may wait for hours at the end of one.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision, kwargs_handlers=[patience])
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise RunError(
            f"the launcher started {expected} processes but this one sees {accelerator.num_processes}; "
            "launch with `accelerate launch --multi_gpu --num_processes N -m dq.cli ...` or torchrun"
        )
    return accelerator


def shard(costs: Sequence[float], rank: int, world_size: int) -> list[int]:
    """Indices of the units that `rank` works on: largest first, each to the least loaded rank (ties: lowest rank).

    Every rank computes the same division from the same costs; the indices come back in ascending order.
    """
    load = [0.0] * world_size
    mine = []
    for unit in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(world_size), key=lambda r: (load[r], r))
        load[owner] += costs[unit]
        if owner == rank:
            mine.append(unit)
    return sorted(mine)


def cut(n: int, *, least: int, most: int) -> list[range]:
    """0, ..., n - 1 in nearly equal stretches, 64 of them where that makes none shorter than `least` or longer than
    `most`: enough to be divided evenly over many processes, and the same for any number of them."""
    size = min(max(-(-n // 64), least), most)
    number = -(-n // size)
    return [range(i * n // number, (i + 1) * n // number) for i in range(number)]
