"""Checks of the inputs and the results of methods."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dq.core.errors import InputError, RunError
from dq.refine.method import RealImages, Refined

FAR = 1e3  # of a pixel's usual range [0, 1]
LARGEST_HALF = 65504.0  # in which label vectors are stored


def check_set(
    images: Tensor, labels: Tensor, classes: int, real: RealImages | None = None, weights: Tensor | None = None
) -> None:
    """Refuse a set, train images or weights of wrong shapes or values.

    Args:
        images: (n, 3, S, S) float, finite.
        labels: (n,) whole numbers from 0 to classes - 1.
        classes: number of classes.
        real: train images (N, 3, S, S).
        weights: (n,) positive, finite.

    Raises:
        InputError: that says which.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or len(images) == 0:
        raise InputError(f"images to refine must be float (n, 3, S, S), not {images.dtype} {tuple(images.shape)}")
    if not bool(torch.isfinite(images).all()):
        raise InputError("an image to refine has pixels that are no finite numbers; leave it out of the set")
    if float(images.abs().max()) > FAR / 10:
        raise InputError(f"images to refine have pixels in [0, 1], but one is {float(images.abs().max()):g}")
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(
            f"{len(images)} images to refine need whole numbers ({len(images)},) as labels, not {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise InputError(f"labels of {classes} classes lie in 0 to {classes - 1}, not {int(labels.max())}")
    if real is not None and len(real.images) and real.images.shape[1:] != images.shape[1:]:
        sizes = f"{tuple(real.images.shape[1:])} and {tuple(images.shape[1:])}"
        raise InputError(f"train images and images to refine must be of one size, not {sizes}")
    if weights is not None and not (
        weights.shape == labels.shape and bool(((weights > 0) & weights.isfinite()).all())
    ):
        raise InputError(f"weights of {len(images)} images must be ({len(images)},) positive, finite numbers")


def check_refined(refined: Refined, stage: str) -> None:
    """Refuse a diverged result, before it is stored.

    Raises:
        RunError: that names the stage.
    """
    way_out = f"lower the learning rates of stage {stage}"
    far = float(refined.images.abs().max())
    if not far <= FAR:
        raise RunError(f"a pixel of an image that {stage} learned is {far:g}, far from [0, 1]; {way_out}")
    if refined.soft_labels is not None and not float(refined.soft_labels.abs().max()) <= LARGEST_HALF:
        raise RunError(f"the labels that {stage} learned are too large or no numbers; {way_out}")
    if refined.step_size is not None and not (0 < refined.step_size < math.inf):
        raise RunError(f"the step size that {stage} learned is {refined.step_size:g}; {way_out}")
