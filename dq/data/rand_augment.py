"""RandAugment (Cubuk et al. 2020) on batches of 8-bit images, with separate draws.

Operations, their order and their magnitudes are those of `torchvision.transforms.RandAugment` with nearest
interpolation and black outside the image; pixels are bit for bit those of PIL images.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dq.core.constants import constant

# The code of an operation is its index
OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
BINS = 31  # magnitudes are 0, ..., 30
LUMA = (19595, 38470, 7471)  # of red, green and blue in 1/65536, PIL's conversion to gray


def draw_operations(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
    """Draw codes (n, count) uint8 of `count` operations per image.

    A code is twice the index in `OPERATIONS`, plus 1 if the magnitude is negative. Uniform, with replacement, as in
    torchvision.
    """
    operation = rng.integers(len(OPERATIONS), size=(n, count))
    negative = rng.integers(2, size=(n, count))
    return (2 * operation + negative).astype(np.uint8)


def rand_augment(images: Tensor, codes: Tensor, magnitude: int) -> Tensor:
    """Apply to each image its operations, one after another.

    Args:
        images: (B, 3, S, S) uint8; floats in [0, 1] are rounded to 8 bits.
        codes: (B, K) uint8 on the CPU, see `draw_operations`.
        magnitude: 0, ..., 30, of all operations that have one.

    Returns:
        (B, 3, S, S) uint8.
    """
    if images.dtype != torch.uint8:
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    x = images.clone()
    for step in codes.long().unbind(1):
        for code in step.unique().tolist():
            rows = (step == code).nonzero()[:, 0].to(x.device)
            x[rows] = apply_operation(x[rows], OPERATIONS[code // 2], magnitude, negative=bool(code % 2))
    return x


def apply_operation(x: Tensor, operation: str, magnitude: int, *, negative: bool = False) -> Tensor:
    """Apply one of `OPERATIONS` to uint8 images (B, 3, S, S).

    Those without direction ignore `negative`.
    """
    sign = -1.0 if negative else 1.0
    side = x.shape[-1]
    if operation in ("shear_x", "shear_y"):
        level = sign * _level(0.3, magnitude)
        level = math.tan(math.atan(level))  # torchvision passes on an angle
        return _affine(x, (1, level, 0, 0, 1, 0) if operation == "shear_x" else (1, 0, 0, level, 1, 0))
    if operation in ("translate_x", "translate_y"):
        pixels = int(sign * _level(150 / 331 * side, magnitude))
        return _affine(x, (1, 0, -pixels, 0, 1, 0) if operation == "translate_x" else (1, 0, 0, 0, 1, -pixels))
    if operation == "rotate":
        angle = -math.radians(sign * _level(30.0, magnitude) % 360)
        cos, sin, middle = round(math.cos(angle), 15), round(math.sin(angle), 15), side / 2
        return _affine(x, (cos, sin, middle - (cos + sin) * middle, -sin, cos, middle - (cos - sin) * middle))
    if operation in ("brightness", "color", "contrast", "sharpness"):
        factor = 1 + sign * _level(0.9, magnitude)
        return _blend(_flat(x, operation), x, factor)
    if operation == "posterize":
        bits = 8 - round(magnitude * 4 / (BINS - 1))
        return x & (256 - 2 ** (8 - bits))
    if operation == "solarize":
        return torch.where(x < 255 * (1 - magnitude / (BINS - 1)), x, 255 - x)
    if operation == "autocontrast":
        return _autocontrast(x)
    if operation == "equalize":
        return _equalize(x)
    return x


def _level(largest: float, magnitude: int) -> float:
    """Bin `magnitude` of even steps from 0 to `largest`, in float32 as torchvision has them."""
    return float(torch.linspace(0.0, largest, BINS)[magnitude])


def _affine(x: Tensor, matrix: tuple[float, ...]) -> Tensor:
    """The pixel at (column, row) is read at `matrix` times (column, row, 1), nearest, and black outside.

    In 16-bit fixed point, as PIL computes it, so that every device reads the same pixels.
    """
    a, b, c, d, e, f = matrix
    side = x.shape[-1]

    def fixed(value: float) -> int:
        return math.floor(value * 65536 + 0.5)

    at = torch.arange(side, device=x.device)
    column, row = at[None, :], at[:, None]
    left = (fixed(c + a / 2 + b / 2) + fixed(a) * column + fixed(b) * row) >> 16  # (S, S)
    top = (fixed(f + d / 2 + e / 2) + fixed(d) * column + fixed(e) * row) >> 16
    outside = (left < 0) | (left >= side) | (top < 0) | (top >= side)
    return x[:, :, top.clamp(0, side - 1), left.clamp(0, side - 1)].masked_fill(outside, 0)


def _flat(x: Tensor, operation: str) -> Tensor:
    """The image (B, 3 or 1, S, S) float32 that `operation` moves away from, or towards."""
    if operation == "brightness":
        return torch.zeros_like(x[:, :1], dtype=torch.float32)
    if operation == "sharpness":
        return _smooth(x)
    weights = constant(LUMA, x.device, torch.int64).view(1, 3, 1, 1)
    gray = ((x.long() * weights).sum(1, keepdim=True) + 0x8000) >> 16
    if operation == "contrast":
        pixels = gray[0].numel()
        gray = ((2 * gray.sum((2, 3), keepdim=True) + pixels) // (2 * pixels)).expand_as(gray)
    return gray.float()


def _smooth(x: Tensor) -> Tensor:
    """Mean of 3 x 3 px in which the middle counts five times, to the nearest integer; the border stays."""
    out = x.float()
    if x.shape[-1] < 3:
        return out
    total = F.avg_pool2d(out, 3, 1, divisor_override=1) + 4 * out[:, :, 1:-1, 1:-1]
    out[:, :, 1:-1, 1:-1] = ((2 * total.round().long() + 13) // 26).float()
    return out


def _blend(start: Tensor, x: Tensor, factor: float) -> Tensor:
    """Clip start + factor (x - start) to whole levels in [0, 255]."""
    return (start + factor * (x.float() - start)).clamp(0, 255).to(torch.uint8)


def _autocontrast(x: Tensor) -> Tensor:
    """Stretch each channel to [0, 255]; a constant channel stays."""
    flat = x.flatten(2).long()  # (B, 3, P)
    # the table in float64, which not every device has, and with a true division, which `255 / tensor` is not
    low, high = (v.cpu().double() for v in (flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)))
    scale = torch.full_like(low, 255).div((high - low).clamp(min=1))
    levels = torch.arange(256, dtype=torch.float64)
    table = (levels * scale - low * scale).clamp(0, 255).long()  # (B, 3, 256)
    table = torch.where(high > low, table, levels.long())
    return table.to(x.device).gather(2, flat).to(torch.uint8).view_as(x)


def _equalize(x: Tensor) -> Tensor:
    """Flatten the histogram of each channel; a channel of one value, or of too few pixels, stays."""
    flat = x.flatten(2).long()  # (B, 3, P)
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    last = counts.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - last) // 255  # (B, 3, 1)
    before = counts.cumsum(2) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(2, flat), flat).to(torch.uint8).view_as(x)
