"""Which operations CUDA refuses, waits for, or does without a kernel.

Read from the kernels and the documentation of torch: TensorIterator takes 0-dimensional CPU tensors as numbers, and
indexing takes indices on the CPU; everything else wants its tensors on one device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

# the size of the result, or an error, is read by the host
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "equal", "multinomial", "_linalg_check_errors", "linalg_qr", "_linalg_svd", "repeat_interleave",
}  # fmt: skip
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
NO_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias",
    "lift_fresh", "is_same_size", "_has_compatible_shallow_copy_type", "_fused_sdp_choice", "resize_",
    "_local_scalar_dense",
}  # fmt: skip
# without the tag `pointwise`, though they take a number as a 0-dimensional tensor
TAKES_NUMBERS = {"where", "masked_fill", "masked_fill_", "fill_", "fill", "_foreach_add_", "_foreach_mul_"}
TAKES_NUMBERS |= {"_foreach_div_", "_foreach_add", "_foreach_mul", "_foreach_div"}


class DeviceMixError(RuntimeError):
    """Tensors of the host and the device in one operation."""


def name_of(operation: OpOverload) -> str:
    return operation._schema.name.partition("::")[2]


def launches(operation: OpOverload) -> bool:
    """Whether the operation starts a kernel: not if it only looks at memory differently, or allocates."""
    looks = operation.is_view or torch.Tag.inplace_view in operation.tags
    return not looks and name_of(operation) not in NO_KERNEL


def waits(operation: OpOverload, indices: list[Tensor | None]) -> bool:
    """Whether the host waits for the result; indexing with a mask does, to learn how many there are."""
    if name_of(operation) == "repeat_interleave":
        return operation._overloadname == "Tensor"
    masks = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
    return name_of(operation) in WAITS or masks


def mix_up(operation: OpOverload, args: tuple[Any, ...], tensors: list[Tensor]) -> str | None:
    """What is wrong about where the tensors of an operation are, or None.

    Args:
        tensors: all tensors of the call, one of them at least on the device.
    """
    name = name_of(operation)
    hosted = [t for t in tensors if t.device.type == "cpu"]
    if not hosted:
        return None
    if name in INDEXING:
        if args[0].device.type == "cpu":
            return "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
        values = args[2] if len(args) > 2 else None
        if values is not None and values.device.type == "cpu" and values.dim():
            return "the values put into a tensor of the device are on the cpu"
        return None
    numbers = torch.Tag.pointwise in operation.tags or name in TAKES_NUMBERS
    if not numbers or any(t.dim() for t in hosted):
        return "expected all tensors to be on the same device"
    if operation._schema.is_mutable and tensors[0].device.type == "cpu":
        return "a tensor of the cpu cannot be changed by one of the device"
    return None
