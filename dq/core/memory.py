"""Batches that fit: an accelerator out of memory gets its batch in halves."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger("dq")

_fitting: dict[str, int] = {}  # the largest piece that fitted, by kind of work


def in_pieces(what: str, size: int, call: Callable[[slice], Tensor]) -> Tensor:
    """`call` on a batch of `size` rows, at once if memory allows, else in halves, and those in halves.

    Only for work whose rows do not depend on one another: the result is then the same, up to the rounding with which
    batch sizes differ. Later batches of the same kind start with what has fitted.

    Args:
        what: the kind of work, named in the log.
        call: gives the rows of a slice of the batch. It is called again after a failure and must not have kept
            anything, a generator's state for instance.

    Raises:
        torch.OutOfMemoryError: if a single row does not fit.
    """
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    done: list[Tensor] = []
    start = 0
    while start < size:
        length = min(size - start, _fitting.get(what, size))
        try:
            done.append(call(slice(start, start + length)))
            start += length
            continue
        except RuntimeError as e:
            if length == 1 or not (isinstance(e, torch.OutOfMemoryError) or should_reduce_batch_size(e)):
                raise
        # outside the handler, whose traceback keeps the tensors of the failed call
        _fitting[what] = length // 2
        log.warning("%s: a batch of %d does not fit in memory; going on with %d", what, length, length // 2)
        clear_device_cache(garbage_collection=True)
    return torch.cat(done)
