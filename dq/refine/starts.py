"""First values of learned images, and gradients of gray ones."""

from __future__ import annotations

import torch
from torch import Tensor

from dq.core.errors import InputError
from dq.core.seeds import generator
from dq.data.zca import is_gray
from dq.refine.method import RealImages
from dq.refine.rendering import Rendering

NOISE_LIKE = 1000  # real images whose standard deviation noise to start from has (0.44 on CIFAR-10)
NOISE_LATENTS = 256  # real images whose latents' mean and deviation noise to start from has


def real_rows(labels: Tensor, real: RealImages, seed: int) -> Tensor:
    """Random train images (n,) of the classes, without repetition if possible.

    Raises:
        InputError: if a class has no train image.
    """
    rows = torch.empty_like(labels)
    for c in labels.unique().tolist():
        candidates, places = (real.labels == c).nonzero()[:, 0], (labels == c).nonzero()[:, 0]
        if not len(candidates):
            raise InputError(f"start=real needs train images of class {c}, but there are none; set start=drawn")
        order = torch.randperm(len(candidates), generator=generator(seed, "start", c))
        rows[places] = candidates[order[torch.arange(len(places)) % len(candidates)]]
    return rows


def noise_like(images: Tensor, real: RealImages, rendering: Rendering, seed: int) -> Tensor:
    """Normal noise for each of `images` (n, 3, S, S).

    Of their shape, with the standard deviation of whitened real images, and gray if these are; or of the shape of
    their latents, with the channels' means and deviations in real images.
    """
    if rendering.codec is not None:
        # spread over the train images, which may be in the order of their classes
        z = rendering.encode(real.images[:: max(1, len(real.images) // NOISE_LATENTS)][:NOISE_LATENTS])
        noise = torch.randn(len(images), *z.shape[1:], generator=generator(seed, "noise")).to(z.device)
        return z.mean((0, 2, 3), keepdim=True) + z.std((0, 2, 3), keepdim=True) * noise
    std = rendering.whitening(real.images[:NOISE_LIKE]).std()
    noise = std * torch.randn(images.shape, generator=generator(seed, "noise"))
    return noise[:, :1].expand_as(noise).clone() if is_gray(real.images) else noise


def one_channel(gradient: Tensor) -> Tensor:
    """Gradient (n, 3, S, S) of images whose three channels are one.

    That of the one channel, for all three, as in the released codes, which have one channel for gray data.
    """
    return gradient.sum(1, keepdim=True).expand_as(gradient)


def first_values(
    start: str, images: Tensor, labels: Tensor, real: RealImages, rendering: Rendering, seed: int
) -> Tensor:
    """First whitened images (n, 3, S, S), or latents (n, C, h, w).

    Args:
        start: "drawn" for `images`, "real" for random train images, or "noise".
        images: (n, 3, S, S) float32 in [0, 1].
        labels: (n,) classes.
        real: train images.
        rendering: of what is learned.
        seed: of draws.

    Raises:
        InputError: if real images of a class are asked for and there are none.
    """
    if start == "drawn":
        return rendering.encode(images)
    if start == "noise":
        return noise_like(images, real, rendering, seed)
    return rendering.encode(real.images[real_rows(labels, real, seed)])


def rows_by_class(labels: Tensor, real: RealImages) -> dict[int, Tensor]:
    """Rows of the train images of every class of the set with `labels`.

    Raises:
        InputError: if a class has none.
    """
    rows = {c: (real.labels == c).nonzero()[:, 0] for c in labels.unique().tolist()}
    empty = [c for c, r in rows.items() if not len(r)]
    if empty:
        raise InputError(f"class {empty[0]} has no train image to be compared with; leave its images out of the set")
    return rows
