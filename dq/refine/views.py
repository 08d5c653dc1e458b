"""Random views of a batch: one crop, flip and shift for all images.

Batch statistics are matched over the batch, and one view keeps them those of images that were seen alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dq.config.refinement import MatchingConfig
from dq.core.seeds import derive_seed
from dq.core.transfer import to_device
from dq.data.views import draw_crops, resize_matrix

MAX_VIEWS, VIEW_BYTES = 64, 16 << 20  # of views that are drawn at once


@dataclass(frozen=True)
class View:
    """Crop, flip and shift of one step."""

    box: tuple[int, int, int, int]  # px: top, left, height, width
    flip: bool
    shift: tuple[int, int]  # px down and right


def draw_view(config: MatchingConfig, side: int, jitter: int, *, seed: int, step: int) -> View:
    """Draw crop, flip and shift of a step from its seed."""
    rng = np.random.default_rng(derive_seed(seed, "view", step))
    box = (0, 0, side, side)
    if config.crop_scale:
        box = tuple(draw_crops(rng, 1, side, config.crop_scale, config.crop_ratio)[0].tolist())
    flip = bool(rng.random() < config.flip)
    down, right = rng.integers(0, jitter + 1, size=2).tolist()
    return View(box, flip, (down, right))


def apply_view(x: Tensor, view: View) -> Tensor:
    """Crop, flip and shift images (B, C, S, S), differentiably.

    The crop is resized to S (bilinear, half-pixel centers, as torchvision's RandomResizedCrop; enlarging needs no
    antialiasing), mirrored, and rolled around.
    """
    side = x.shape[-1]
    down, right = view.shift
    if view.box[2:] == (side, side):
        x = x.flip(3) if view.flip else x
        return torch.roll(x, (down, right), (2, 3)) if down or right else x
    rows, columns = _view_matrices([view], side, x.device)[0]
    return rows @ x @ columns.T


def _view_matrices(views: Sequence[View], side: int, device: torch.device) -> Tensor:
    """Return matrices (V, 2, S, S) of rows and of columns that crop, mirror and roll images of S px."""
    numbers = [[view.box[:2], view.box[2:], (0, int(view.flip)), view.shift] for view in views]
    start, length, mirror, shift = to_device(torch.tensor(numbers), device).transpose(0, 1).reshape(4, -1)
    matrices = resize_matrix(start, length, side, mirror.bool())  # (2 V, S, S)
    source = (torch.arange(side, device=device) - shift[:, None]) % side
    return matrices.gather(1, source[..., None].expand_as(matrices)).view(-1, 2, side, side)


class StepViews:
    """Views of the steps at one size, of which many are drawn and copied to the device at once."""

    def __init__(self, config: MatchingConfig, side: int, jitter: int, *, seed: int, device: torch.device) -> None:
        """Draw as `draw_view` does with these arguments, for images on `device`."""
        self._draw = functools.partial(draw_view, config, side, jitter, seed=seed)
        self._side, self._device = side, device
        self._number = max(1, min(MAX_VIEWS, VIEW_BYTES // (2 * 4 * side * side)))
        self._views: dict[int, View] = {}
        self._matrices: dict[int, Tensor] = {}  # (2, S, S) of the steps whose views crop

    def apply(self, x: Tensor, step: int) -> Tensor:
        """Return `apply_view` of images (B, C, S, S) in the view of a step."""
        if step not in self._views:
            self._views = {t: self._draw(step=t) for t in range(step, step + self._number)}
            cropped = [t for t, view in self._views.items() if view.box[2:] != (self._side, self._side)]
            views = [self._views[t] for t in cropped]
            matrices = _view_matrices(views, self._side, self._device) if views else ()
            self._matrices = dict(zip(cropped, matrices, strict=True))
        if step not in self._matrices:
            return apply_view(x, self._views[step])
        rows, columns = self._matrices[step]
        return rows @ x @ columns.T


@dataclass(frozen=True)
class Schedule:
    """Blocks of steps at one size each; anchors are merged in between."""

    sizes: tuple[int, ...]  # side in px in each block
    steps: tuple[int, ...]
    lr: float
    alpha: float = 1.0  # share of the optimized image in a merge; 1: no merge
    jitter: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step: one cosine to 0 over all blocks."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / sum(self.steps)))


def resample(x: Tensor, size: int) -> Tensor:
    """Resize images (B, C, S, S): bilinear, half-pixel centers, no antialiasing.

    As FADRM's released code.
    """
    if x.shape[-1] == size:
        return x
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
