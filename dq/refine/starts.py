"""Where images of a set begin that are learned rather than drawn, and in which directions they move."""

from __future__ import annotations

import torch
from torch import Tensor

from dq.core.errors import InputError
from dq.core.seeds import generator
from dq.data.zca import Whitening, is_grey
from dq.refine.method import RealImages

NOISE_LIKE = 1000  # real images whose standard deviation noise to start from has (0.44 on CIFAR-10)


def real_rows(labels: Tensor, real: RealImages, seed: int) -> Tensor:
    """A random train image of the class of each image of the set, (n,); none twice while there are others.

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


def noise_like(images: Tensor, real: RealImages, whitening: Whitening, seed: int) -> Tensor:
    """Normal noise of the shape of `images`, as wide as whitened real images, and grey if these are."""
    std = whitening(real.images[:NOISE_LIKE]).std()
    noise = std * torch.randn(images.shape, generator=generator(seed, "noise"))
    return noise[:, :1].expand_as(noise).clone() if is_grey(real.images) else noise


def one_channel(gradient: Tensor) -> Tensor:
    """The gradient (n, 3, S, S) of images whose three channels are one, as those of a grey data set: that of the one
    channel, for all three. The released codes have one channel for such data."""
    return gradient.sum(1, keepdim=True).expand_as(gradient)


def first_images(
    start: str, images: Tensor, labels: Tensor, real: RealImages, whitening: Whitening, seed: int
) -> Tensor:
    """Images as networks see them: those that came in ("drawn"), random train images ("real") or noise."""
    if start == "drawn":
        return whitening(images)
    if start == "noise":
        return noise_like(images, real, whitening, seed)
    return whitening(real.images[real_rows(labels, real, seed)])


def rows_by_class(labels: Tensor, real: RealImages) -> dict[int, Tensor]:
    """Train images of every class of the set with `labels`.

    Raises:
        InputError: if a class has none.
    """
    rows = {c: (real.labels == c).nonzero()[:, 0] for c in labels.unique().tolist()}
    empty = [c for c, r in rows.items() if not len(r)]
    if empty:
        raise InputError(f"class {empty[0]} has no train image to be compared with; leave its images out of the set")
    return rows
