"""Batches that fit in memory, and reuse of freed memory on a CPU."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

log = logging.getLogger("dq")
T = TypeVar("T")

# what libraries say when the device has no memory left for their work space
ALLOCATION = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")

# parameters of glibc's mallopt, and the size in bytes up to which freed blocks stay with the process
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**30

_limits: dict[tuple[object, ...], int] = {}  # rows at once after a failure, by kind of work
_fitted: dict[tuple[object, ...], int] = {}  # the largest piece that has fitted, by kind of work


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks for later allocations.

    Activations of a training step are larger than the size from which glibc maps a block of its own, so that every
    step asks for its memory again and the kernel fills it with zeros: up to half of the time of a step on a CPU
    (results/allocator.csv). Results are the same. Nothing is done outside Linux with glibc, or where a variable of
    the environment sets one of the two thresholds.

    Returns:
        Whether the thresholds were set.
    """
    variables = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    if not sys.platform.startswith("linux") or any(v in os.environ for v in variables):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all(mallopt(p, KEPT_BYTES) == 1 for p in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or a library on it, could not get memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in ALLOCATION)
    )


def run_with_batch_backoff(
    what: str, size: int, call: Callable[[slice], Tensor], *, like: tuple[object, ...] = ()
) -> Tensor:
    """The rows of a batch as one tensor; see `list_in_pieces`."""
    return torch.cat(list_in_pieces(what, size, call, like=like))


def list_in_pieces(what: str, size: int, call: Callable[[slice], T], *, like: tuple[object, ...] = ()) -> list[T]:
    """Call a function on a batch of `size` rows, in halves where memory is short.

    Only for work whose rows do not depend on one another: the result is then the same, up to the rounding with which
    batch sizes differ. Later batches of the same kind start with what has fitted. A piece that fails although a
    larger one has fitted before, such as the last of a batch, is halved alone.

    Args:
        what: the work, named in the log.
        size: number of rows.
        call: gives the rows of a slice of the batch. It is called again after a failure and must not have kept
            anything, a generator's state for instance.
        like: what decides the memory of a row beside `what`, such as the network and the shape of an image.

    Returns:
        What `call` gave, piece by piece.

    Raises:
        torch.OutOfMemoryError, RuntimeError: if a single row does not fit.
    """
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    # not accelerate's find_executable_batch_size, which drops the rows that are done and empties the cache each time
    kind = (what, *like)
    done: list[T] = []
    start = 0
    most = _limits.get(kind, size)
    while start < size:
        length = min(size - start, most)
        try:
            done.append(call(slice(start, start + length)))
            start += length
            _fitted[kind] = max(length, _fitted.get(kind, 0))
            continue
        except RuntimeError as e:
            if length == 1 or not (is_out_of_memory(e) or should_reduce_batch_size(e)):
                raise
        # outside the handler, whose traceback keeps the tensors of the failed call
        most = length // 2
        if length >= _fitted.get(kind, 0):
            _limits[kind] = most
            _fitted.pop(kind, None)
        log.warning("%s: a batch of %d does not fit in memory; going on with %d", what, length, most)
        clear_device_cache(garbage_collection=True)
    return done
