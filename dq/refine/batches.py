"""Composition of the batches of images that are optimized together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from dq.core.errors import InputError
from dq.core.text import plural

Rows = list[tuple[int, int]]  # (class, rank in the class) of images


def compose_batches(
    counts: Sequence[int], batch_size: int, *, compose: str = "index", min_classes: int = 5
) -> list[Rows]:
    """Compose batches, lists of (class, rank in the class).

    "index": the first image of every class, then the second, and so on, cut into nearly equal pieces of at most
    `batch_size`, so that none is a small rest (FADRM's released code cuts at `batch_size` and leaves one). "dealt":
    images in class order dealt out in turn, so that every batch takes from all classes alike, whatever their sizes.
    "rank": images of one rank alone are together, in nearly equal pieces of at most `batch_size`. "whole": all images
    are one batch, in class order.

    Args:
        counts: images of each class.
        batch_size: most images of a batch; not read with "whole".
        compose: one of these.
        min_classes: different classes that a batch must hold at least; all, if there are fewer.

    Raises:
        InputError: if a batch would hold fewer, since statistics are then matched by images that are too much alike.
    """
    total = sum(counts)
    number = 1 if compose == "whole" else -(-total // batch_size)
    rows = [(c, r) for c, n in enumerate(counts) for r in range(n)]
    if compose in ("dealt", "whole"):
        batches = [rows[j::number] for j in range(number)]
    elif compose == "rank":
        ranks = [[(c, r) for c, n in enumerate(counts) if r < n] for r in range(max(counts, default=0))]
        batches = [piece for rank in ranks for piece in _cut(rank, -(-len(rank) // batch_size))]
        number = len(batches)
    else:
        rows.sort(key=lambda row: (row[1], row[0]))
        batches = _cut(rows, number)
    other = "or " if compose == "rank" else "set compose=dealt, or "  # ranks cannot be dealt out
    needed = min(min_classes, sum(n > 0 for n in counts))
    for j, batch in enumerate(batches):
        present = len({c for c, _ in batch})
        if present < needed:
            raise InputError(
                f"batch {j} of {number} of the refinement would hold {plural(present, 'class')}, fewer than {needed}: "
                f"raise its batch_size (now {batch_size}), {other}lower min_classes"
            )
    return batches


def largest_batch(compose: str, batch_size: int, classes: int | None) -> int:
    """Most images of a batch; at most one per class with "rank"."""
    return min(batch_size, classes) if compose == "rank" and classes else batch_size


def _cut(rows: Rows, number: int) -> list[Rows]:
    """Rows in nearly equal pieces."""
    edges = [len(rows) * j // number for j in range(number + 1)]
    return [rows[a:b] for a, b in itertools.pairwise(edges)]
