"""Training augmentations on batches of normalized images: DSA's, FRePo's, and crop with flip.

The operations are functions of images (B, 3, S, S) and of one parameter per image, (B,). Parameters are drawn on the
CPU from the generator that is passed in, so that they do not depend on the device: of one batch when it is augmented
(`augment`), or of all batches of an epoch before it, which then copies them to the device once (`draw_steps`,
`steps_on_device`, `apply_steps`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dq.core.errors import InputError
from dq.core.transfer import to_device_together

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


@dataclass(frozen=True)
class Step:
    """One operation on a batch with its drawn numbers."""

    operation: str  # one of `APPLY`
    values: Tensor  # a number, several numbers (P, B) or a matrix (B, 2, 2) of each image
    size: int = 0  # px, of padding or of a square


def augment(kind: str, images: Tensor, generator: torch.Generator) -> Tensor:
    """Augment a batch (B, 3, S, S) by the name in `StudentConfig.augment`."""
    return _drawn_and_applied(draw_steps(kind, len(images), images.shape[-1], generator), images)


def draw_steps(kind: str, n: int, side: int, generator: torch.Generator) -> list[Step]:
    """Draw what `augment` does to a batch of `n` images of `side` px, on the CPU."""
    if kind == "dsa":
        return _draw_dsa(n, side, generator)
    if kind == "crop_flip":
        return [_draw_crop(n, side, generator), _draw_flip(n, generator)]
    if kind in ("frepo", "frepo_noflip"):
        return _draw_frepo(n, side, generator, mirror=kind == "frepo")
    if kind == "none":
        return []
    raise InputError(f"augment must be 'dsa', 'crop_flip', 'frepo', 'frepo_noflip' or 'none', not {kind!r}")


def steps_on_device(batches: Sequence[Sequence[Step]], device: torch.device) -> list[list[Step]]:
    """Copy the draws of several batches to a device, in one copy for each dtype."""
    values = iter(to_device_together([step.values for steps in batches for step in steps], device))
    return [[dataclasses.replace(step, values=next(values)) for step in steps] for steps in batches]


def apply_steps(images: Tensor, steps: Sequence[Step]) -> Tensor:
    """Apply operations, whose draws are on the device of the images (B, 3, S, S), one after another."""
    for step in steps:
        images = APPLY[step.operation](images, step)
    return images


def _drawn_and_applied(steps: Sequence[Step], images: Tensor) -> Tensor:
    return apply_steps(images, steps_on_device([steps], images.device)[0])


def dsa(images: Tensor, generator: torch.Generator, *, operation: str | None = None, shared: bool = False) -> Tensor:
    """Apply differentiable Siamese augmentation: one operation per batch, parameters per image.

    Args:
        images: (B, 3, S, S), normalized.
        generator: CPU generator of the operation and its parameters.
        operation: one of `OPERATIONS`; None draws it.
        shared: one draw of the parameters for all images, which another batch has too with an equal generator, as
            methods that compare real and learned images use it.
    """
    steps = _draw_dsa(len(images), images.shape[-1], generator, operation=operation, shared=shared)
    return _drawn_and_applied(steps, images)


def _draw_dsa(
    n: int, side: int, generator: torch.Generator, *, operation: str | None = None, shared: bool = False
) -> list[Step]:
    draws = 1 if shared else n

    def uniform(*ranges: tuple[float, float]) -> Tensor:
        values = [low + (high - low) * torch.rand(draws, generator=generator) for low, high in ranges]
        return torch.stack(values).expand(-1, n)  # (ranges, B)

    if operation is None:
        operation = OPERATIONS[int(torch.randint(len(OPERATIONS), (), generator=generator))]
    if operation == "color":
        return [Step("color", uniform((-BRIGHTNESS / 2, BRIGHTNESS / 2), (0, SATURATION), (CONTRAST, 1 + CONTRAST)))]
    if operation == "crop":
        return [_draw_crop(n, side, generator, draws)]
    if operation == "cutout":
        size = int(side * CUTOUT + 0.5)
        # the center lies anywhere in the image, so a part of the square may fall outside
        centers = torch.randint(0, side + 1 - size % 2, (2, draws), generator=generator)
        return [Step("cutout", centers.expand(-1, n), size)]
    if operation == "flip":
        return [_draw_flip(n, generator, draws)]
    if operation == "scale":
        sx, sy = uniform((1 / SCALE, SCALE), (1 / SCALE, SCALE))
        zero = torch.zeros_like(sx)
        return [Step("affine", torch.stack([sx, zero, zero, sy], 1).view(n, 2, 2))]
    if operation == "rotate":
        return [Step("affine", _rotations(uniform((-ROTATE_DEGREES, ROTATE_DEGREES))[0]))]
    raise InputError(f"DSA has no operation {operation!r}; it has {', '.join(OPERATIONS)}")


def frepo(images: Tensor, generator: torch.Generator, *, mirror: bool = True, operation: str | None = None) -> Tensor:
    """Apply FRePo's augmentation: one operation per batch, parameters per image.

    Args:
        images: (B, 3, S, S), normalized or whitened.
        generator: CPU generator of the operation and its parameters.
        mirror: whether mirror images are among the operations; not for digits and clothes.
        operation: one of `FREPO_OPERATIONS`; None draws it.
    """
    steps = _draw_frepo(len(images), images.shape[-1], generator, mirror=mirror, operation=operation)
    return _drawn_and_applied(steps, images)


def _draw_frepo(
    n: int, side: int, generator: torch.Generator, *, mirror: bool, operation: str | None = None
) -> list[Step]:
    names = FREPO_OPERATIONS if mirror else FREPO_OPERATIONS[:-1]

    def uniform(limit: float) -> Tensor:
        return limit * (2 * torch.rand(n, generator=generator) - 1)

    if operation is None:
        operation = names[int(torch.randint(len(names), (), generator=generator))]
    if operation == "color":
        amount, saturated, contrasted = (uniform(FREPO_COLOR) for _ in range(3))
        return [Step("color", torch.stack([amount, saturated.exp(), contrasted.exp()]))]
    if operation == "zoom":
        return [Step("affine", uniform(math.log(FREPO_ZOOM)).exp()[:, None, None] * torch.eye(2))]
    if operation == "translate":
        return [_draw_crop(n, side, generator)]
    if operation == "cutout":
        centers = torch.randint(0, side, (2, n), generator=generator)
        return [Step("cutout", centers, max(1, int(side * FREPO_CUTOUT + 0.5)))]
    if operation == "rotate":
        return [Step("affine", _rotations(uniform(ROTATE_DEGREES)))]
    if operation == "flip":
        return [_draw_flip(n, generator)]
    raise InputError(f"FRePo's augmentation has no operation {operation!r}; it has {', '.join(names)}")


def _rotations(degrees: Tensor) -> Tensor:
    """Matrices (B, 2, 2) of angles (B,)."""
    angle = degrees * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop zero-padded images (4 px of padding for 32 px images) and mirror half of them."""
    return augment("crop_flip", images, generator)


def _draw_crop(n: int, side: int, generator: torch.Generator, draws: int | None = None) -> Step:
    pad = int(side * CROP_PAD + 0.5)
    moves = torch.randint(-pad, pad + 1, (2, draws or n), generator=generator)
    return Step("shift", moves.expand(-1, n), pad)


def _draw_flip(n: int, generator: torch.Generator, draws: int | None = None) -> Step:
    return Step("flip", (torch.rand(draws or n, generator=generator) < FLIP).expand(n))


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


def _color(x: Tensor, step: Step) -> Tensor:
    amount, saturated, contrasted = step.values
    return contrast(saturation(brightness(x, amount), saturated), contrasted)


APPLY: dict[str, Callable[[Tensor, Step], Tensor]] = {
    "color": _color,
    "shift": lambda x, step: shift(x, step.values[0], step.values[1], step.size),
    "cutout": lambda x, step: cutout(x, step.values[0], step.values[1], step.size),
    "flip": lambda x, step: flip(x, step.values),
    "affine": lambda x, step: affine(x, step.values),
}
