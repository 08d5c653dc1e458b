"""Small constants as tensors, copied to a device once and not in every step."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def constant(values: object, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers as a tensor on a device, the same in every call.

    Numbers nest as for `torch.tensor`; the tensor must not be changed in place.

    A copy from ordinary memory waits until the device has done all its work, so that one in a loop holds the host up.
    """
    return _constant(_hashable(values), device, dtype)


@functools.lru_cache(maxsize=256)
def _constant(values: object, device: torch.device, dtype: torch.dtype) -> Tensor:
    # the first caller may be in inference mode, whose tensors no later caller could use under autograd
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _hashable(values: object) -> Any:
    return tuple(_hashable(v) for v in values) if isinstance(values, (list, tuple)) else values
