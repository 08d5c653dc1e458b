"""Patches: the crops of real images that a teacher recognizes best, as RDED cuts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dq.core.errors import InputError
from dq.core.seeds import generator
from dq.data.images import read_images
from dq.data.source import ImageSource
from dq.networks.teacher import Teacher

Rank = Literal["easy", "medium"]
CHUNK_BYTES = 1 << 27  # of float crops held at once; a matter of memory, not of results


@dataclass(frozen=True)
class Patches:
    """Mosaics of patches cut from real images, in class order."""

    images: Tensor  # (N, 3, S, S) uint8
    rows: np.ndarray  # (N,) int64, source row of the first patch of each


def patch_images(
    source: ImageSource,
    ipc: int,
    *,
    teacher: Teacher,
    image_size: int,
    seed: int = 0,
    candidates: np.ndarray | None = None,
    classes: Sequence[int] | None = None,
    pool: int = 300,
    crops: int = 5,
    factor: int = 1,
    rank: Rank = "easy",
) -> Patches:
    """The crops of real images that a teacher recognizes best, `factor`^2 in every output (RDED, Sun et al. 2024).

    Per class: draw `pool` images, cut `crops` random squares from each, score them by the teacher's cross-entropy,
    keep the best of each image, rank the images, and fill the outputs. Where this departs from RDED: crops are cut
    from images already brought to `image_size`, and the stored 8-bit crops are the ones scored. A class with fewer
    than `ipc` * `factor`^2 images gives the full mosaics that it has.

    Args:
        seed: of the draw of images and crops. Crops of an image depend on nothing but the seed and the image's row.
        candidates: ascending rows of the train split that may be used; None: all.
        classes: whose patches to cut; None: all classes. Those of a class do not depend on the others.
        rank: "easy" takes the lowest cross-entropies first, as RDED does; "medium" those around the median, in turn
            below and above it (DELT, Shen et al. 2024).

    Raises:
        InputError: if `pool` is too small, a class too small for one mosaic, or `factor` does not divide the size.
    """
    settings = {"ipc": ipc, "pool": pool, "crops": crops, "factor": factor}
    low = next((f"{k}={v}" for k, v in settings.items() if v < 1), None)
    if low:
        raise InputError(f"patches need whole numbers of at least 1, not {low}")
    if image_size % factor:
        raise InputError(f"{factor} patches do not fit beside one another in {image_size} px; choose a divisor")
    if rank not in get_args(Rank):
        raise InputError(f"rank must be 'easy' or 'medium', not {rank!r}")
    tiles = factor**2
    if pool < ipc * tiles:
        raise InputError(f"pool={pool} images of a class are too few for {ipc} mosaics of {tiles}; raise it")
    rows = np.arange(len(source.train)) if candidates is None else candidates
    images, firsts = [], []
    chunk = max(1, CHUNK_BYTES // (crops * 3 * image_size**2 * 4))
    for label in range(len(source.class_names)) if classes is None else classes:
        name = source.class_names[label]
        own = rows[source.train.labels[rows] == label]
        order = torch.randperm(len(own), generator=generator(seed, "patch pool", label))
        drawn = np.sort(own[order[:pool].numpy()])
        patches, losses, kept = [], [], []
        for first in range(0, len(drawn), chunk):
            part, read, _ = read_images(
                source.train,
                drawn[first : first + chunk],
                image_size,
                source.preprocess,
                on_bad=source.on_bad_image,
            )
            if read:
                best, loss = best_crops(part, read, label, teacher=teacher, crops=crops, factor=factor, seed=seed)
                patches.append(best)
                losses.append(loss)
                kept += read
        number = min(ipc, len(kept) // tiles)
        if not number:
            raise InputError(
                f"class {label} {name!r} has {len(kept)} images but a mosaic needs {tiles}; lower factor, "
                "add candidates, or drop the class"
            )
        chosen = rank_order(torch.cat(losses), rank)[: number * tiles]
        images.append(mosaics(torch.cat(patches)[chosen], factor))
        firsts.append(np.array(kept, np.int64)[chosen[:number].numpy()])
    return Patches(torch.cat(images), np.concatenate(firsts))


def crop_boxes(size: int, crops: int, g: torch.Generator) -> list[tuple[int, int, int]]:
    """Top, left and side of random squares in a square of `size` px: area uniform in (0.08, 1) of the whole, then the
    place uniform, as torchvision's RandomResizedCrop draws them with ratio 1."""
    boxes = []
    for area, down, right in torch.rand(crops, 3, generator=g, dtype=torch.float64).tolist():
        side = max(1, round(size * (0.08 + 0.92 * area) ** 0.5))
        boxes.append((int(down * (size - side + 1)), int(right * (size - side + 1)), side))
    return boxes


def best_crops(
    images: Tensor, rows: list[int], label: int, *, teacher: Teacher, crops: int, factor: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The crop of every image with the lowest cross-entropy under a teacher.

    Args:
        images: (n, 3, S, S) uint8, of one class.
        rows: (n,) what the images' crops are drawn by, beside the seed.
        label: the class.
        factor: crops are resized to S / `factor` and shown to the teacher in the middle of zeros. The zeros are those
            of its normalized input, so the mean color, as in RDED.

    Returns:
        Patches (n, 3, S / factor, S / factor) uint8 and cross-entropies (n,) float64.
    """
    size = images.shape[-1]
    side = size // factor
    cut = torch.empty(len(images), crops, 3, side, side, dtype=torch.uint8)
    for i, (image, row) in enumerate(zip(images.float(), rows)):
        for j, (top, left, width) in enumerate(crop_boxes(size, crops, generator(seed, "patch crops", row))):
            square = image[None, :, top : top + width, left : left + width]
            resized = F.interpolate(square, (side, side), mode="bilinear", antialias=True)[0]
            cut[i, j] = resized.round().clamp(0, 255).to(torch.uint8)
    shown = cut.flatten(0, 1).float() / 255
    if factor > 1:
        canvas = torch.tensor(teacher.mean).view(1, 3, 1, 1).repeat(len(shown), 1, size, size)
        edge = (size - side) // 2
        canvas[:, :, edge : edge + side, edge : edge + side] = shown
        shown = canvas
    # float64: a confident teacher's cross-entropies are all 0 in float32, and would rank nothing
    logits = teacher.logits(shown).double()
    if logits.shape[1] <= label:
        raise InputError(f"the teacher has {logits.shape[1]} outputs and none for class {label}; give another teacher")
    if not torch.isfinite(logits).all():
        raise InputError(f"the teacher gives NaN or infinite logits for class {label}; give another teacher")
    loss = F.cross_entropy(logits, torch.full((len(logits),), label), reduction="none").view(len(images), crops)
    best = loss.argmin(1)
    index = torch.arange(len(images))
    return cut[index, best], loss[index, best]


def rank_order(loss: Tensor, rank: Rank) -> Tensor:
    """Indices of (n,) cross-entropies in the order of taking: lowest first, or from the median outwards. Ties go to
    the lowest index."""
    easiest = loss.argsort(stable=True)
    if rank == "easy":
        return easiest
    n = len(loss)
    return easiest[torch.tensor(sorted(range(n), key=lambda r: (abs(2 * r - (n - 1)), r)))]


def mosaics(patches: Tensor, factor: int) -> Tensor:
    """Ranked patches (factor^2 * n, 3, s, s) as n images (n, 3, factor * s, factor * s).

    As in RDED's code, the first n patches are the top left corners and so on row by row, so that the mosaics are
    about equally good.
    """
    s = patches.shape[-1]
    grid = patches.unflatten(0, (factor, factor, -1))  # (row, column, n, 3, s, s)
    return grid.permute(2, 3, 0, 4, 1, 5).reshape(-1, 3, factor * s, factor * s)
