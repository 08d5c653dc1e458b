"""Patches: crops of real images that a teacher recognizes best (RDED)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dq.core.errors import InputError
from dq.core.seeds import generator
from dq.core.text import plural
from dq.data.images import read_images
from dq.data.source import ImageSource
from dq.networks.teacher import Teacher

Rank = Literal["easy", "medium"]
CHUNK_BYTES = 1 << 27  # of float crops held at once; a matter of memory, not of results


@dataclass(frozen=True)
class PatchRecipe:
    """Settings of patches: how they are cut, ranked and laid out."""

    image_size: int  # px
    pool: int = 300  # images of a class that are drawn
    crops: int = 5  # of an image
    factor: int = 1  # factor x factor patches an output
    rank: Rank = "easy"

    def check(self, ipc: int) -> None:
        """Check the settings for `ipc` outputs per class.

        Raises:
            InputError: if `pool` is too small, or `factor` does not divide the size.
        """
        settings = {"ipc": ipc, "pool": self.pool, "crops": self.crops, "factor": self.factor}
        low = next((f"{k}={v}" for k, v in settings.items() if v < 1), None)
        if low:
            raise InputError(f"patches need whole numbers of at least 1, not {low}")
        if self.image_size % self.factor:
            raise InputError(
                f"{self.factor} patches do not fit beside one another in {self.image_size} px; choose a divisor"
            )
        if self.rank not in get_args(Rank):
            raise InputError(f"rank must be 'easy' or 'medium', not {self.rank!r}")
        tiles = self.factor**2
        if self.pool < ipc * tiles:
            raise InputError(f"pool={self.pool} images of a class are too few for {ipc} mosaics of {tiles}; raise it")


@dataclass(frozen=True)
class Patches:
    """Mosaics of patches cut from real images, in class order."""

    images: Tensor  # (N, 3, S, S) uint8
    rows: np.ndarray  # (N,) int64, source row of the first patch of each


def patch_images(
    source: ImageSource,
    ipc: int,
    recipe: PatchRecipe,
    *,
    teacher: Teacher,
    seed: int = 0,
    candidates: np.ndarray | None = None,
    classes: Sequence[int] | None = None,
) -> Patches:
    """Cut the crops of real images that a teacher recognizes best (RDED, Sun et al. 2024).

    Per class: draw `pool` images, cut `crops` random squares from each, score them by the teacher's cross-entropy,
    keep the best of each image, rank the images, and fill the outputs with `factor`^2 crops each. `rank` "easy" takes
    the lowest cross-entropies first, as RDED does; "medium" those around the median, in turn below and above it (DELT,
    Shen et al. 2024). Where this departs from RDED: crops are cut from images already brought to `image_size`, and the
    stored 8-bit crops are the ones scored. A class with fewer than `ipc` * `factor`^2 images gives fewer mosaics.

    Args:
        source: real images.
        ipc: mosaics of a class.
        recipe: sizes and ranking.
        teacher: what scores the crops.
        seed: of the draw of images and crops. Crops of an image depend on nothing but the seed and the image's row.
        candidates: ascending rows of the train split that may be used; None: all.
        classes: whose patches to cut; None: all classes. Those of a class do not depend on the others.

    Raises:
        InputError: if `recipe` does not fit, or a class is too small for one mosaic.
    """
    recipe.check(ipc)
    rows = np.arange(len(source.train)) if candidates is None else candidates
    tiles = recipe.factor**2
    images, firsts = [], []
    for label in range(len(source.class_names)) if classes is None else classes:
        class_rows = rows[source.train.labels[rows] == label]
        order = torch.randperm(len(class_rows), generator=generator(seed, "patch pool", label))
        pool_rows = np.sort(class_rows[order[: recipe.pool].numpy()])
        scored = _score_patches(source, pool_rows, label, recipe, teacher, seed)
        number = min(ipc, len(scored.rows) // tiles)
        if not number:
            raise InputError(
                f"class {label} {source.class_names[label]!r} has {plural(len(scored.rows), 'image')} but a mosaic "
                f"needs {tiles}; lower factor, add candidates, or drop the class"
            )
        chosen = rank_order(torch.cat(scored.losses), recipe.rank)[: number * tiles]
        images.append(mosaics(torch.cat(scored.patches)[chosen], recipe.factor))
        firsts.append(np.array(scored.rows, np.int64)[chosen[:number].numpy()])
    return Patches(torch.cat(images), np.concatenate(firsts))


class _Scored(NamedTuple):
    """The best crop of each image of a class that can be read, in chunks."""

    patches: list[Tensor]  # (m, 3, S / factor, S / factor) uint8
    losses: list[Tensor]  # (m,) float64
    rows: list[int]


def _score_patches(
    source: ImageSource, rows: np.ndarray, label: int, recipe: PatchRecipe, teacher: Teacher, seed: int
) -> _Scored:
    scored = _Scored([], [], [])
    size, crops, factor = recipe.image_size, recipe.crops, recipe.factor
    chunk = max(1, CHUNK_BYTES // (crops * 3 * size**2 * 4))
    for first in range(0, len(rows), chunk):
        part = rows[first : first + chunk]
        images, read, _ = read_images(source.train, part, size, source.preprocess, on_bad=source.on_bad_image)
        if read:
            best, loss = best_crops(images, read, label, teacher=teacher, crops=crops, factor=factor, seed=seed)
            scored.patches.append(best)
            scored.losses.append(loss)
            scored.rows.extend(read)
    return scored


def crop_boxes(size: int, crops: int, g: torch.Generator) -> list[tuple[int, int, int]]:
    """Draw top, left and side of random squares in a square of `size` px.

    Area uniform in (0.08, 1) of the whole, then the place uniform, as torchvision's RandomResizedCrop with ratio 1.
    """
    boxes = []
    for area, down, right in torch.rand(crops, 3, generator=g, dtype=torch.float64).tolist():
        side = max(1, round(size * (0.08 + 0.92 * area) ** 0.5))
        boxes.append((int(down * (size - side + 1)), int(right * (size - side + 1)), side))
    return boxes


def best_crops(
    images: Tensor, rows: list[int], label: int, *, teacher: Teacher, crops: int, factor: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the crop of every image with the lowest cross-entropy under a teacher.

    The images (n, 3, S, S) uint8 are of one class; their crops are drawn by `seed` and `rows` (n,). Crops are resized
    to S / `factor` and shown to the teacher in the middle of zeros: those of its normalized input, so the mean color,
    as in RDED.

    Returns:
        Patches (n, 3, S / factor, S / factor) uint8 and cross-entropies (n,) float64.
    """
    size = images.shape[-1]
    side = size // factor
    device = next(teacher.net.parameters()).device
    boxes = torch.tensor([crop_boxes(size, crops, generator(seed, "patch crops", row)) for row in rows])
    # the loop takes half the time of the products on a CPU, and products a small part of it on an accelerator
    cut = cut_in_turn(images, boxes, side) if device.type == "cpu" else cut_together(images.to(device), boxes, side)
    shown = cut.flatten(0, 1).float() / 255
    if factor > 1:
        canvas = torch.tensor(teacher.mean, device=device).view(1, 3, 1, 1).repeat(len(shown), 1, size, size)
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
    return cut[index, best].cpu(), loss[index, best]


def cut_in_turn(images: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Cut boxes (n, m, 3) from images (n, 3, S, S) uint8, and resize them to (n, m, 3, side, side) uint8."""
    cut = torch.empty(*boxes.shape[:2], 3, side, side, dtype=torch.uint8)
    for i, image in enumerate(images.float()):
        for j, (top, left, width) in enumerate(boxes[i].tolist()):
            square = image[None, :, top : top + width, left : left + width]
            resized = F.interpolate(square, (side, side), mode="bilinear", antialias=True)[0]
            cut[i, j] = resized.round().clamp(0, 255).to(torch.uint8)
    return cut


def cut_together(images: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Give `cut_in_turn` by two products with one matrix per crop and axis, up to rounding: a gray level at ties."""
    top, left, width = boxes.to(images.device).unbind(2)  # (n, m) each
    rows, columns = (crop_matrix(start, width, images.shape[-1], side) for start in (top, left))
    resized = rows[:, :, None] @ images.float()[:, None] @ columns[:, :, None].mT
    return resized.round().clamp(0, 255).to(torch.uint8)


def crop_matrix(start: Tensor, width: Tensor, size: int, side: int) -> Tensor:
    """Weights (..., side, size) that resize `width` px from `start` to `side` px.

    Bilinear with half-pixel centers, the kernel widened where a crop shrinks, as `interpolate` with antialias.
    """
    scale = width.double()[..., None, None] / side
    centers = scale * (torch.arange(side, device=start.device)[:, None] + 0.5)
    at = torch.arange(size, device=start.device) - start[..., None, None]  # px of the crop
    weights = (1 - (at + 0.5 - centers).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((at >= 0) & (at < width[..., None, None]))
    return (weights / weights.sum(-1, keepdim=True)).float()


def rank_order(loss: Tensor, rank: Rank) -> Tensor:
    """Sort cross-entropies (n,) from the lowest, or from the median outwards.

    Returns indices (n,); ties go to the lowest index.
    """
    easiest = loss.argsort(stable=True)
    if rank == "easy":
        return easiest
    n = len(loss)
    return easiest[torch.tensor(sorted(range(n), key=lambda r: (abs(2 * r - (n - 1)), r)))]


def mosaics(patches: Tensor, factor: int) -> Tensor:
    """Lay out ranked patches (factor^2 * n, 3, s, s) as n images.

    The images are (n, 3, factor * s, factor * s).

    As in RDED's code, the first n patches are the top left corners and so on row by row, so that the mosaics are
    about equally good.
    """
    s = patches.shape[-1]
    grid = patches.unflatten(0, (factor, factor, -1))  # (row, column, n, 3, s, s)
    return grid.permute(2, 3, 0, 4, 1, 5).reshape(-1, 3, factor * s, factor * s)
