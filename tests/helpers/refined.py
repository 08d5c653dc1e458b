"""Refinement of a whole set from tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dq.data.zca import Whitening
from dq.diffusion.image_codec import ImageCodec
from dq.networks.teacher import Teacher
from dq.networks.trajectories import Experts
from dq.refine.method import Batch, RealImages, Refined, Resources, Session


def refined(
    refine: Callable[..., Refined],
    images: Tensor,
    labels: Tensor,
    config: Any,
    real: RealImages | None = None,
    *,
    classes: int,
    weights: Tensor | None = None,
    teachers: Sequence[Teacher] = (),
    experts: Experts | None = None,
    codec: ImageCodec | None = None,
    whitening: Whitening | None = None,
    device: str = "cpu",
    **session: Any,
) -> Refined:
    """`refine` of a method for a set (n, 3, S, S) with labels (n,); the rest goes into the session."""
    side, on = images.shape[-1], torch.device(device)
    resources = Resources(side, classes, tuple(teachers), real=real, experts=experts, codec=codec, device=on)
    if whitening is not None:
        resources.once("whitening", lambda: whitening)
    return refine(Batch(images, labels, weights), config, resources, Session(**session))
