"""Held-out parts of train, and images at another side."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dq.core.errors import InputError
from dq.core.seeds import generator
from dq.data.source import ImageSource

log = logging.getLogger("dq")
HELD_OUT = "held-out"  # name of a test split made of train images


def resized(images: Tensor, side: int, *, bounded: bool = True) -> Tensor:
    """Resize images (N, 3, S, S) to `side` px, bicubic and antialiased.

    Returns the same tensor if they have that size.
    """
    if images.shape[-1] == side:
        return images
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True)
    x = x.clamp(0, 1) if bounded else x
    return (x * 255).round().to(torch.uint8) if images.dtype == torch.uint8 else x


def validation_rows(labels: np.ndarray, total: int) -> np.ndarray:
    """Return rows of a stratified part of train.

    About `total` images, at most a fifth of a class. The same for every evaluation of a data set, so that sets are
    compared on the same images.
    """
    share = total / len(np.unique(labels))
    return _stratified_rows(labels, "validation", lambda n: min(max(1, round(share)), n // 5))


def _stratified_rows(labels: np.ndarray, purpose: str, count: Callable[[int], int]) -> np.ndarray:
    """Draw `count(n)` rows of every class of n, ascending; the same ones for a purpose and labels."""
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        order = torch.randperm(len(rows), generator=generator(purpose, int(label)))
        chosen.append(rows[order[: count(len(rows))].numpy()])
    return np.sort(np.concatenate(chosen))


def with_test_split(source: ImageSource, share: float) -> ImageSource:
    """Set a part of every class of train aside as the test split of a source that has none.

    Args:
        source: the images; returned as they are if there is a test split, or `share` is 0.
        share: of every class, rounded down, in [0, 1); a class of one image or more keeps at least one for train, and
            classes of two or more give at least one. Which images go depends on their order alone.

    Raises:
        InputError: if no class has two images.
    """
    if not share or source.test_name is not None:
        return source
    labels = source.train.labels
    test = _stratified_rows(labels, "test", lambda n: min(max(1, int(share * n)), n - 1))
    if not len(test):
        raise InputError(
            f"{source.origin} has no test split, and one image a class, of which none can be held out; add images or "
            "set source.test_share=0"
        )
    log.info(
        "%s has no test split: %d of its %d images, about %.0f %% of every class, are held out (source.test_share)",
        *(source.origin, len(test), len(labels), 100 * share),
    )
    train = np.setdiff1d(np.arange(len(labels)), test)
    parts = {
        source.train_name: source.train.part(train, source.train_name),
        HELD_OUT: source.train.part(test, HELD_OUT),
    }
    identity = hashlib.blake2b(f"{source.fingerprint}|{share}".encode(), digest_size=8).hexdigest()
    return dataclasses.replace(source, splits={**source.splits, **parts}, test_name=HELD_OUT, fingerprint=identity)
