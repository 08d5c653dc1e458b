"""Training augmentations on batches of normalized images: DSA's, FRePo's, and crop with flip.

The operations are functions of images (B, 3, S, S) and of one parameter per image, (B,). Parameters are drawn on the
CPU from the generator that is passed in, so that they do not depend on the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dq.core.errors import InputError

# Settings of DSA (Zhao & Bilen 2021) as released: strategy color_crop_cutout_flip_scale_rotate
OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
CROP_PAD, CUTOUT = 0.125, 0.5  # shares of the side
FLIP = 0.5
SCALE = 1.2
ROTATE_DEGREES = 15.0
# Settings of FRePo (Zhou et al. 2022) as released: one of these operations for a batch
FREPO_OPERATIONS = ("color", "zoom", "translate", "cutout", "rotate", "flip")
FREPO_COLOR = 0.25  # added brightness; exponents of contrast and saturation
FREPO_ZOOM = 1.25
FREPO_CUTOUT = 0.25  # of the side


def augment(kind: str, images: Tensor, generator: torch.Generator) -> Tensor:
    """Augment a batch (B, 3, S, S) by the name in `StudentConfig.augment`."""
    if kind == "dsa":
        return dsa(images, generator)
    if kind == "crop_flip":
        return crop_flip(images, generator)
    if kind in ("frepo", "frepo_noflip"):
        return frepo(images, generator, mirror=kind == "frepo")
    if kind == "none":
        return images
    raise InputError(f"augment must be 'dsa', 'crop_flip', 'frepo', 'frepo_noflip' or 'none', not {kind!r}")


def dsa(images: Tensor, generator: torch.Generator, *, operation: str | None = None, shared: bool = False) -> Tensor:
    """Apply differentiable Siamese augmentation: one operation per batch, parameters per image.

    Args:
        images: (B, 3, S, S), normalized.
        generator: CPU generator of the operation and its parameters.
        operation: one of `OPERATIONS`; None draws it.
        shared: one draw of the parameters for all images, which another batch has too with an equal generator, as
            methods that compare real and learned images use it.
    """
    x, n, side = images, len(images), images.shape[-1]
    draws = 1 if shared else n

    def uniform(*ranges: tuple[float, float]) -> Tensor:
        """Draw (ranges, B) and copy them to the device at once."""
        values = [low + (high - low) * torch.rand(draws, generator=generator) for low, high in ranges]
        return torch.stack(values).expand(-1, n).to(x.device)

    if operation is None:
        operation = OPERATIONS[int(torch.randint(len(OPERATIONS), (), generator=generator))]
    if operation == "color":
        amounts = uniform((-BRIGHTNESS / 2, BRIGHTNESS / 2), (0, SATURATION), (CONTRAST, 1 + CONTRAST))
        return contrast(saturation(brightness(x, amounts[0]), amounts[1]), amounts[2])
    if operation == "crop":
        return _random_crop(x, generator, draws)
    if operation == "cutout":
        size = int(side * CUTOUT + 0.5)
        # the center lies anywhere in the image, so a part of the square may fall outside
        centers = torch.randint(0, side + 1 - size % 2, (2, draws), generator=generator).expand(-1, n).to(x.device)
        return cutout(x, centers[0], centers[1], size)
    if operation == "flip":
        return _random_flip(x, generator, draws)
    if operation == "scale":
        sx, sy = uniform((1 / SCALE, SCALE), (1 / SCALE, SCALE))
        zero = torch.zeros_like(sx)
        return affine(x, torch.stack([sx, zero, zero, sy], 1).view(n, 2, 2))
    if operation == "rotate":
        return affine(x, _rotations(uniform((-ROTATE_DEGREES, ROTATE_DEGREES))[0]))
    raise InputError(f"DSA has no operation {operation!r}; it has {', '.join(OPERATIONS)}")


def frepo(images: Tensor, generator: torch.Generator, *, mirror: bool = True, operation: str | None = None) -> Tensor:
    """Apply FRePo's augmentation: one operation per batch, parameters per image.

    Args:
        images: (B, 3, S, S), normalized or whitened.
        generator: CPU generator of the operation and its parameters.
        mirror: whether mirror images are among the operations; not for digits and clothes.
        operation: one of `FREPO_OPERATIONS`; None draws it.
    """
    x, n, side = images, len(images), images.shape[-1]
    names = FREPO_OPERATIONS if mirror else FREPO_OPERATIONS[:-1]

    def uniform(limit: float) -> Tensor:
        return (limit * (2 * torch.rand(n, generator=generator) - 1)).to(x.device)

    if operation is None:
        operation = names[int(torch.randint(len(names), (), generator=generator))]
    if operation == "color":
        x = saturation(brightness(x, uniform(FREPO_COLOR)), uniform(FREPO_COLOR).exp())
        return contrast(x, uniform(FREPO_COLOR).exp())
    if operation == "zoom":
        factor = uniform(math.log(FREPO_ZOOM)).exp()
        return affine(x, factor[:, None, None] * torch.eye(2, device=x.device))
    if operation == "translate":
        return _random_crop(x, generator)
    if operation == "cutout":
        centers = torch.randint(0, side, (2, n), generator=generator).to(x.device)
        return cutout(x, centers[0], centers[1], max(1, int(side * FREPO_CUTOUT + 0.5)))
    if operation == "rotate":
        return affine(x, _rotations(uniform(ROTATE_DEGREES)))
    if operation == "flip":
        return _random_flip(x, generator)
    raise InputError(f"FRePo's augmentation has no operation {operation!r}; it has {', '.join(names)}")


def _rotations(degrees: Tensor) -> Tensor:
    """Matrices (B, 2, 2) of angles (B,)."""
    angle = degrees * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop zero-padded images (4 px of padding for 32 px images) and mirror half of them."""
    return _random_flip(_random_crop(images, generator), generator)


def _random_crop(x: Tensor, generator: torch.Generator, draws: int | None = None) -> Tensor:
    pad = int(x.shape[-1] * CROP_PAD + 0.5)
    moves = torch.randint(-pad, pad + 1, (2, draws or len(x)), generator=generator).expand(-1, len(x)).to(x.device)
    return shift(x, moves[0], moves[1], pad)


def _random_flip(x: Tensor, generator: torch.Generator, draws: int | None = None) -> Tensor:
    return flip(x, (torch.rand(draws or len(x), generator=generator) < FLIP).expand(len(x)).to(x.device))


# --- the operations -----------------------------------------------------------------------------------------------


def _each(parameter: Tensor) -> Tensor:
    return parameter.view(-1, 1, 1, 1)


def brightness(x: Tensor, amount: Tensor) -> Tensor:
    """Add an amount to each image."""
    return x + _each(amount)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply the distance from the gray of each pixel."""
    return torch.lerp(x.mean(1, keepdim=True), x, _each(factor))


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply the distance from the mean of each image."""
    return torch.lerp(x.mean((1, 2, 3), keepdim=True), x, _each(factor))


def flip(x: Tensor, mirror: Tensor) -> Tensor:
    """Mirror left to right the images of which `mirror` (B,) bool is true."""
    return torch.where(_each(mirror), x.flip(3), x)


def shift(x: Tensor, down: Tensor, right: Tensor, pad: int) -> Tensor:
    """Shift the window on each image by (down, right) px, with zeros outside.

    At most by `pad` either way.
    """
    n, channels, height, width = x.shape
    padded = F.pad(x, (pad, pad, pad, pad))
    rows = torch.arange(height, device=x.device) + (down + pad)[:, None]  # (B, S)
    columns = torch.arange(width, device=x.device) + (right + pad)[:, None]  # (B, S)
    image = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def cutout(x: Tensor, row: Tensor, column: Tensor, size: int) -> Tensor:
    """Set a square of `size` px around (row, column) to zero.

    Zero is the mean color of normalized images.
    """

    def inside(side: int, center: Tensor) -> Tensor:
        start = (center - size // 2)[:, None]
        at = torch.arange(side, device=x.device)
        return (at >= start) & (at < start + size)  # (B, S)

    hole = inside(x.shape[2], row)[:, None, :, None] & inside(x.shape[3], column)[:, None, None, :]
    return x.masked_fill(hole, 0.0)


def affine(x: Tensor, matrix: Tensor) -> Tensor:
    """Apply linear maps (B, 2, 2) to images.

    The pixel at p (center 0, border 1) is read at `matrix` @ p; outside is zero.
    """
    theta = F.pad(matrix.to(x.dtype), (0, 1))  # (B, 2, 3), no translation
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)
