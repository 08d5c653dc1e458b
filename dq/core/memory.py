"""Batches that fit: an accelerator out of memory gets its batch in halves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

log = logging.getLogger("dq")
T = TypeVar("T")

# what libraries say when the device has no memory left for their work space
ALLOCATION = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")

_limits: dict[tuple[object, ...], int] = {}  # rows at once after a failure, by kind of work
_fitted: dict[tuple[object, ...], int] = {}  # the largest piece that has fitted, by kind of work


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or a library on it, could not get memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in ALLOCATION)
    )


def in_pieces(what: str, size: int, call: Callable[[slice], Tensor], *, like: tuple[object, ...] = ()) -> Tensor:
    """The rows of a batch as one tensor; see `list_in_pieces`."""
    return torch.cat(list_in_pieces(what, size, call, like=like))


def list_in_pieces(what: str, size: int, call: Callable[[slice], T], *, like: tuple[object, ...] = ()) -> list[T]:
    """`call` on a batch of `size` rows, at once if memory allows, else in halves, and those in halves.

    Only for work whose rows do not depend on one another: the result is then the same, up to the rounding with which
    batch sizes differ. Later batches of the same kind start with what has fitted. A piece that fails although a
    larger one has fitted before, such as the last of a batch, is halved alone.

    Args:
        what: the work, named in the log.
        call: gives the rows of a slice of the batch. It is called again after a failure and must not have kept
            anything, a generator's state for instance.
        like: what decides the memory of a row beside `what`, such as the network and the shape of an image.

    Returns:
        What `call` gave, piece by piece.

    Raises:
        torch.OutOfMemoryError, RuntimeError: if a single row does not fit.
    """
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

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
