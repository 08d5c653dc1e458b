"""Copies from the CPU to a device for which the host does not wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; to CUDA from page-locked memory, so that the host goes on at once."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def to_device_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return small tensors on a device, those of one dtype by one copy.

    On the CPU they are returned as they are; elsewhere as contiguous views of what was copied.
    """
    if device.type == "cpu":
        return list(tensors)
    moved: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        numbers = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        flat = torch.cat([tensors[i].flatten() for i in numbers])
        flat = to_device(flat, device) if len(flat) else torch.empty(0, dtype=dtype, device=device)
        pieces = flat.split([tensors[i].numel() for i in numbers])
        moved |= {i: piece.view(tensors[i].shape) for i, piece in zip(numbers, pieces, strict=True)}
    return [moved[i] for i in range(len(tensors))]
