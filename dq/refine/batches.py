"""Which images are optimised together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from dq.core.errors import InputError

Rows = list[tuple[int, int]]  # (class, rank in the class) of images


def compose_batches(
    counts: Sequence[int], batch_size: int, *, compose: str = "index", min_classes: int = 5
) -> list[Rows]:
    """Which images are optimised together: lists of (class, rank in the class).

    "index": the first image of every class, then the second, and so on, cut into nearly equal pieces of at most
    `batch_size`, so that none is a small rest (FADRM's released code cuts at `batch_size` and leaves one). "dealt":
    images in class order dealt out in turn, so that every batch takes from all classes alike, whatever their sizes.
    "whole": all images are one batch, in class order.

    Args:
        counts: images of each class.
        min_classes: different classes that a batch must hold at least; all, if there are fewer.

    Raises:
        InputError: if a batch would hold fewer, since statistics are then matched by images that are too much alike.
    """
    total = sum(counts)
    number = 1 if compose == "whole" else -(-total // batch_size)
    rows = [(c, r) for c, n in enumerate(counts) for r in range(n)]
    if compose in ("dealt", "whole"):
        batches = [rows[j::number] for j in range(number)]
    else:
        rows.sort(key=lambda row: (row[1], row[0]))
        edges = [total * j // number for j in range(number + 1)]
        batches = [rows[a:b] for a, b in itertools.pairwise(edges)]
    needed = min(min_classes, sum(n > 0 for n in counts))
    for j, batch in enumerate(batches):
        held = len({c for c, _ in batch})
        if held < needed:
            raise InputError(
                f"batch {j} of {number} of the refinement would hold {held} classes, fewer than {needed}: raise its "
                f"batch_size (now {batch_size}), set compose=dealt, or lower min_classes"
            )
    return batches
