"""Checks and conversion of the arguments of public functions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dq.core.errors import InputError


def as_tensor(value: object, name: str) -> Tensor:
    """Convert a tensor, an array or nested lists to a dense real tensor.

    Without gradients, on the same device; `name` is for messages. float16 and bfloat16 become float32; other types
    stay.

    Raises:
        InputError: for anything that holds no real numbers, or masked ones.
    """
    if isinstance(value, Tensor):
        if value.is_complex() or value.is_quantized or value.layout != torch.strided or value.is_meta:
            raise InputError(f"{name} must be a dense tensor of real numbers, not {_described(value)}")
        x = value.detach()
    else:
        if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
            raise InputError(f"{name} must have no masked values; fill them or leave their rows out")
        try:
            if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
                value = torch.stack([torch.as_tensor(v).detach().cpu() for v in value]).numpy()
            array = np.asarray(value)
        except (ValueError, TypeError, RuntimeError):  # rows that differ in length
            raise InputError(f"{name} must be a tensor or an array of numbers, not {type(value).__name__}") from None
        if array.dtype.kind not in "buif":
            raise InputError(f"{name} must be a tensor or an array of numbers, not {_described(value)}")
        if array.dtype.itemsize > 8 or not array.dtype.isnative:
            array = array.astype(array.dtype.kind + str(min(8, array.dtype.itemsize)))
        x = torch.from_numpy(np.array(array))  # a copy: the array may be read-only or run backwards
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def as_points(value: object, name: str, *, finite: bool = False) -> Tensor:
    """Convert points (n, d) to float32, or float64 where they are; n, d >= 1.

    Args:
        value: a tensor, an array, or nested lists of numbers.
        name: of the points, for messages.
        finite: whether to refuse NaN and infinite values.

    Raises:
        InputError: for another number of axes, no points, or what holds no real numbers.
    """
    x = as_tensor(value, name)
    if x.ndim != 2 or not x.numel():
        raise InputError(f"{name} must be a non-empty (n, d) array, not {tuple(x.shape)}")
    x = x if x.dtype == torch.float64 else x.float()
    if finite and not torch.isfinite(x).all():
        raise InputError(f"{name} has NaN or infinite values; leave these points out")
    return x


def as_rows(value: object, name: str) -> Tensor:
    """Flatten rows (n, ...), one per image, to points (n, d); see `as_points`.

    Raises:
        InputError: for fewer than two axes, no rows, or what holds no real numbers.
    """
    x = as_tensor(value, name)
    if x.ndim < 2:
        raise InputError(f"{name} must be one row per image, (n, ...), not {tuple(x.shape)}")
    return as_points(x.flatten(1), name)


def as_weights(value: object, n: int, name: str) -> Tensor:
    """Convert weights (n,) to a float tensor: finite, none negative, not all zero.

    `name` says what the weights are, in the plural, e.g. "weights of class 3 'cat'".

    Raises:
        InputError: for anything else.
    """
    w = as_tensor(value, name)
    w = w if w.dtype == torch.float64 else w.float()
    if w.shape != (n,) or not (torch.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
        raise InputError(f"{name} must be ({n},), finite, non-negative and not all zero")
    return w


def too_small(sentence: str, setting: str = "cluster.on_small") -> InputError:
    """An error for a class with fewer images than prototypes.

    `setting` is the one by which such a class is refused.
    """
    return InputError(f"{sentence}; lower ipc, drop the class, or set {setting}=clamp")


def _described(value: object) -> str:
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"{kind} of {value.dtype}, {value.layout}, {value.device}"
    dtype = getattr(value, "dtype", None)
    return f"{kind} of {dtype}" if dtype is not None else kind
