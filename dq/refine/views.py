"""Random views of a batch: one crop, flip and shift for all images.

Batch statistics are matched over the batch, and one view keeps them those of images that were seen alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dq.config.refinement import MatchingConfig
from dq.core.seeds import derive_seed
from dq.data.views import draw_crops, resize_matrix


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
    top, left, height, width = view.box
    if (height, width) == (side, side):
        x = x.flip(3) if view.flip else x
        return torch.roll(x, (down, right), (2, 3)) if down or right else x
    # in one copy, for which the device must stop
    start, length, mirror = torch.tensor([[top, left], [height, width], [0, view.flip]], device=x.device)
    matrices = resize_matrix(start, length, side, mirror.bool())  # (2, S, S)
    rows, columns = matrices[0].roll(down, 0), matrices[1].roll(right, 0)
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
