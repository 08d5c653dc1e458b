"""Views of images in an epoch: RandAugment, patch shuffle, crop, mirror, color and mixing.

Draws and arithmetic are separate. `draw_views` makes all numbers of an epoch from a seed; `apply_views` turns images
into views by them. Labels stored for views and a student that replays them therefore use the same pixels, bit for bit.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from dq.config.students import ViewConfig
from dq.core.constants import constant
from dq.core.seeds import derive_seed, generator
from dq.core.transfer import to_device_together
from dq.data.augment import flip as mirrored
from dq.data.augment import shift
from dq.data.rand_augment import draw_operations, rand_augment

# Principal components of the colors of ImageNet (Krizhevsky et al. 2012, section 4.1)
LIGHT_VALUES = (0.2175, 0.0188, 0.0045)
LIGHT_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
GRAY = (0.299, 0.587, 0.114)
CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class Views:
    """All draws of one epoch over N images in B batches.

    Rows are positions in `order`, not images. Label files have these names as keys.
    """

    order: Tensor  # (N,) int32, the image at each position
    shuffle: Tensor  # (N, P) uint8, which patch moves to each position; P = 0 if patches stay
    box: Tensor  # (N, 4) int16, crop in px: top, left, height, width; of a padded image, top and left may be negative
    flip: Tensor  # (N,) uint8
    partner: Tensor  # (N,) int16, position inside the batch of the image that is mixed in
    kept: Tensor  # (B,) float32, share of the image itself in a mix: for CutMix the area outside the clipped box
    cut: Tensor  # (B, 4) int16, pasted box in px: top, left, height, width
    color: Tensor  # (N, 3) float32 jitter of brightness, saturation, contrast; (N, 0) if there is none
    color_order: Tensor  # (N, 3) uint8, or (N, 0)
    light: Tensor  # (N, 3) float32, or (N, 0)
    operations: Tensor  # (N, K) uint8, codes of RandAugment's operations; K = 0 if there are none

    def digest(self) -> int:
        """Return 63 bits of a hash of all draws."""
        h = hashlib.blake2b(digest_size=8)
        for f in fields(self):
            h.update(getattr(self, f.name).numpy().tobytes())
        return int.from_bytes(h.digest(), "big") >> 1

    def on_device(self, device: torch.device) -> Views:
        """Return draws for `apply_views` on a device, copied once.

        What the host reads stays on it: the mixes, and the codes of RandAugment. Other dtypes make another digest.
        """
        names = ("order", "shuffle", "box", "flip", "partner", "color", "color_order", "light")
        dtypes = {"order": torch.int64, "box": torch.int64, "partner": torch.int64, "flip": torch.bool}
        tensors = [getattr(self, name).to(dtypes.get(name)) for name in names]
        return replace(self, **dict(zip(names, to_device_together(tensors, device), strict=True)))


def batches(n: int, batch_size: int, accumulate: int = 1) -> list[slice]:
    """Return the positions of the batches of an epoch.

    A last batch too small to give two images to each of `accumulate` parts is joined to the one before, since batch
    norm cannot normalize a single image.
    """
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and n - starts[-1] < 2 * accumulate:
        starts.pop()
    return [slice(a, b) for a, b in itertools.pairwise([*starts, n])]


def parts(n: int, accumulate: int) -> list[slice]:
    """Divide a batch of n images into contiguous, nearly equal parts for gradient accumulation."""
    edges = [n * i // accumulate for i in range(accumulate + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges) if b > a]


def draw_views(
    config: ViewConfig, n: int, side: int, *, batch_size: int, accumulate: int, seed: int, epoch: int
) -> Views:
    """Draw the views of an epoch for `n` images of `side` px.

    Crops are drawn as torchvision's RandomResizedCrop draws them (ten attempts, then the largest central crop of an
    admissible ratio) and kept in whole pixels. CutMix: lambda ~ Beta(a, a), a box of side sqrt(1 - lambda), its center
    uniform, clipped to the image (Yun et al. 2019); `kept` is what remains after clipping. Patches: strips of columns
    are permuted, then strips of rows (RDED), so 2 x 2 patches have four arrangements and not 24.
    """
    order = torch.randperm(n, generator=generator(seed, "student order", epoch)).to(torch.int32)
    rng = np.random.default_rng(derive_seed(seed, "views", epoch))
    spans = batches(n, batch_size, accumulate)
    box = np.tile(np.array([0, 0, side, side], np.int16), (n, 1))
    if config.crop_scale:
        box = draw_crops(rng, n, side, config.crop_scale, config.crop_ratio)
    if config.crop_pad:
        pad = padding(config.crop_pad, side)
        box[:, :2] = rng.integers(-pad, pad + 1, (n, 2))
    flip = (rng.random(n) < config.flip).astype(np.uint8) if config.flip else np.zeros(n, np.uint8)
    strips = np.tile(np.arange(config.shuffle if config.shuffle > 1 else 0, dtype=np.uint8), (n, 1))
    columns, rows = rng.permuted(strips, axis=1), rng.permuted(strips, axis=1)
    shuffle = (config.shuffle * rows[:, :, None] + columns[:, None]).reshape(n, strips.shape[1] ** 2).astype(np.uint8)
    partner = np.concatenate([np.arange(s.stop - s.start) for s in spans]).astype(np.int16)
    kept, cut = np.ones(len(spans), np.float32), np.zeros((len(spans), 4), np.int16)
    if config.mix != "none":
        for i, s in enumerate(spans):
            partner[s] = rng.permutation(s.stop - s.start)
            share = rng.beta(config.mix_alpha, config.mix_alpha)
            if config.mix == "mixup":
                kept[i] = share
            else:
                cut[i], kept[i] = _draw_cut(rng, side, share)
    colors = 3 if config.jitter else 0
    color = rng.uniform(1 - config.jitter, 1 + config.jitter, (n, colors)).astype(np.float32)
    color_order = rng.permuted(np.tile(np.arange(colors, dtype=np.uint8), (n, 1)), axis=1)
    light = (rng.standard_normal((n, 3 if config.lighting else 0)) * config.lighting).astype(np.float32)
    operations = draw_operations(rng, n, config.rand_augment)
    arrays = (shuffle, box, flip, partner, kept, cut, color, color_order, light, operations)
    return Views(order, *(torch.from_numpy(a) for a in arrays))


def padding(share: float, side: int) -> int:
    """Return the padding of a crop in px: `share` of the side, rounded."""
    return int(side * share + 0.5)


def draw_crops(
    rng: np.random.Generator, n: int, side: int, scale: tuple[float, ...], ratio: tuple[float, ...]
) -> np.ndarray:
    area = side * side * rng.uniform(scale[0], scale[1], (n, CROP_ATTEMPTS))
    aspect = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), (n, CROP_ATTEMPTS)))
    width, height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (width >= 1) & (width <= side) & (height >= 1) & (height <= side)
    first = fits.argmax(1)
    rows = np.arange(n)
    w, h = width[rows, first], height[rows, first]
    # the image is square: the largest crop of an admissible ratio is all of it, or a strip if 1 is not admissible
    nearest = min(max(1.0, ratio[0]), ratio[1])
    is_unfit = ~fits.any(1)
    w[is_unfit] = max(1, np.rint(side * min(1.0, nearest)))
    h[is_unfit] = max(1, np.rint(side * min(1.0, 1 / nearest)))
    top, left = np.floor(rng.random(n) * (side - h + 1)), np.floor(rng.random(n) * (side - w + 1))
    top[is_unfit], left[is_unfit] = (side - h[is_unfit]) // 2, (side - w[is_unfit]) // 2
    return np.stack([top, left, h, w], 1).astype(np.int16)


def _draw_cut(rng: np.random.Generator, side: int, share: float) -> tuple[list[int], float]:
    length = int(side * math.sqrt(1 - share))
    row, column = rng.integers(side, size=2)
    top, left = max(row - length // 2, 0), max(column - length // 2, 0)
    bottom, right = min(row + length // 2, side), min(column + length // 2, side)
    height, width = bottom - top, right - left
    return [top, left, height, width], 1 - height * width / side**2


def apply_views(config: ViewConfig, images: Tensor, views: Views, batch: int, at: slice) -> Tensor:
    """Return the views of batch number `batch`, which holds the positions `at`.

    `images` (N, 3, S, S), uint8 or float in [0, 1], are all images of the set in their order.

    Returns:
        (B, 3, S, S) float32 pixels on the device of `images`; in [0, 1] unless colors are changed.
    """
    device = images.device
    x = images[views.order[at].long().to(device)]
    if config.rand_augment:
        x = rand_augment(x, views.operations[at], config.rand_magnitude)
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    if config.shuffle > 1:
        x = shuffle_patches(x, views.shuffle[at].to(device), config.shuffle)
    if config.crop_pad:
        box = views.box[at].long().to(device)
        x = shift(x, box[:, 0], box[:, 1], padding(config.crop_pad, x.shape[-1]))
        x = mirrored(x, views.flip[at].bool().to(device))
    elif config.crop_scale or config.flip:
        x = crop_and_flip(x, views.box[at].to(device), views.flip[at].bool().to(device))
    if config.jitter:
        x = jitter(x, views.color[at].to(device), views.color_order[at].to(device))
    if config.lighting:
        x = x + lighting(views.light[at].to(device))
    if config.mix != "none":
        other = x[views.partner[at].long().to(device)]  # a copy, so that no alias of the batch is changed
        x = mix(x, other, float(views.kept[batch]), views.cut[batch].tolist(), config.mix)
    return x


# --- the operations -----------------------------------------------------------------------------------------------


def crop_and_flip(x: Tensor, box: Tensor, flip: Tensor) -> Tensor:
    """Crop the boxes (B, 4) of square images (B, C, S, S), resize and mirror them.

    Bilinear with half-pixel centers, pixels outside the box repeated from its border: what `interpolate` gives for the
    cut-out crop. A crop is never larger than the image, so nothing is shrunk and antialiasing would change nothing.
    Written as two products with one matrix per image and axis.
    """
    n, side = len(x), x.shape[-1]
    start, length = box.long().T.reshape(2, 2 * n)  # of rows, then of columns
    matrices = resize_matrix(start, length, side, torch.cat([torch.zeros_like(flip), flip]))  # (2 B, S, S)
    return matrices[:n, None] @ x @ matrices[n:, None].mT


def resize_matrix(start: Tensor, length: Tensor, side: int, mirror: Tensor) -> Tensor:
    """Return weights (B, side, side) that resize `length` pixels from `start` to `side`.

    Backwards where `mirror`.
    """
    i = torch.arange(side, device=start.device).expand(len(start), -1)
    i = torch.where(mirror[:, None], side - 1 - i, i)
    at = ((i + 0.5) * (length[:, None] / side) - 0.5).clamp(min=0)
    low = at.floor().long().clamp(max=(length - 1)[:, None])
    high = (low + 1).clamp(max=(length - 1)[:, None])
    share = (at - low).clamp(max=1)
    matrix = torch.zeros(len(start), side, side, device=start.device)
    matrix.scatter_add_(2, (start[:, None] + low)[..., None], (1 - share)[..., None])
    return matrix.scatter_add_(2, (start[:, None] + high)[..., None], share[..., None])


def shuffle_patches(x: Tensor, order: Tensor, grid: int) -> Tensor:
    """Move patch order[b, j] of grid x grid patches of each image to position j.

    Of a side that `grid` does not divide the last pixels stay.
    """
    b, c = x.shape[:2]
    h, w = x.shape[2] // grid, x.shape[3] // grid
    patches = x[:, :, : grid * h, : grid * w].reshape(b, c, grid, h, grid, w).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(b, grid * grid, c, h, w)[torch.arange(b, device=x.device)[:, None], order.long()]
    shuffled = patches.reshape(b, grid, grid, c, h, w).permute(0, 3, 1, 4, 2, 5).reshape(b, c, grid * h, grid * w)
    out = x.clone()
    out[:, :, : grid * h, : grid * w] = shuffled
    return out


def jitter(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Multiply brightness, saturation and contrast by `factors` (B, 3).

    Each image in its `order` (B, 3): distance from black, from the gray of each pixel, from the mean gray of the image
    (Minimax's and IDC's code).
    """
    gray = constant(GRAY, x.device, torch.float32).view(1, 3, 1, 1)
    for step in order.long().unbind(1):
        factor = factors.gather(1, step[:, None]).view(-1, 1, 1, 1)
        luma = (x * gray).sum(1, keepdim=True)
        anchors = torch.stack([torch.zeros_like(luma), luma, luma.mean((2, 3), keepdim=True).expand_as(luma)])
        anchor = anchors[step, torch.arange(len(x), device=x.device)]
        x = anchor + factor * (x - anchor)
    return x


def lighting(amounts: Tensor) -> Tensor:
    """Return shifts (B, 3, 1, 1) along ImageNet's principal colors by `amounts` (B, 3)."""
    vectors = constant(LIGHT_VECTORS, amounts.device, torch.float32)
    values = constant(LIGHT_VALUES, amounts.device, torch.float32)
    return ((amounts * values) @ vectors.T)[..., None, None]


def mix(x: Tensor, other: Tensor, share: float, cut: list[int], kind: str) -> Tensor:
    """Mix batches: MixUp blends `other` with share 1 - share; CutMix pastes its box."""
    if kind == "mixup":
        return share * x + (1 - share) * other
    top, left, height, width = cut
    x = x.clone()
    box = (..., slice(top, top + height), slice(left, left + width))
    x[box] = other[box]
    return x
