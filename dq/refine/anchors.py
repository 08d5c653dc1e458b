"""What the residual merges of FADRM bring back: the images themselves, patches of real images, a set from a file, or
at every merge the nearest of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dq.core.errors import InputError
from dq.data.source import ImageSource
from dq.networks.patches import PatchRecipe, patch_images
from dq.networks.teacher import Teacher
from dq.refine.measure import total_variation

PATCH_POOL = 300  # images of a class whose crops are scored (RDED)


def patch_anchors(
    source: ImageSource,
    label: int,
    number: int,
    *,
    teacher: Teacher,
    image_size: int,
    rank: str,
    seed: int,
    candidates: np.ndarray | None = None,
    pool: int = PATCH_POOL,
) -> Tensor:
    """The best-known crops of `number` real images of a class, (number, 3, S, S) uint8, in the order of `rank`.

    FADRM's own starting images come from an unpublished script; their names say that they were cut as RDED cuts them.

    Args:
        candidates: ascending rows of the train split that may be used; None: all.
        pool: images whose crops are scored.

    Raises:
        InputError: if the class has fewer images.
    """
    found = patch_images(
        source,
        number,
        PatchRecipe(image_size, pool=max(pool, number), rank=rank),  # type: ignore[arg-type]
        teacher=teacher,
        seed=seed,  # the same patches as those of the baseline `patches`
        classes=[label],
        candidates=candidates,
    ).images
    if len(found) < number:
        raise InputError(
            f"{'a group of ' * (candidates is not None)}class {label} {source.class_names[label]!r} has {len(found)} "
            f"images for {number} anchors; use anchors=init, fewer images per class, or a smaller retrieve_pool"
        )
    return found


def anchors_by_class(
    images: Tensor, labels: Tensor, counts: Sequence[int], class_names: Sequence[str], origin: str
) -> list[Tensor]:
    """The first `counts[c]` images of every class c of a set, (n_c, 3, S, S) uint8.

    Args:
        images: (N, 3, S, S) uint8.
        labels: (N,) classes.
        origin: what a message calls the set.

    Raises:
        InputError: if the set has too few images of a class.
    """
    anchors = []
    for label, (name, count) in enumerate(zip(class_names, counts)):
        own = images[labels == label]
        if len(own) < count:
            raise InputError(f"{origin} has {len(own)} anchors of class {label} {name!r} for {count} images; add some")
        anchors.append(own[:count])
    return anchors


@dataclass(frozen=True)
class AnchorPool:
    """Candidate anchors of each class, with what they are chosen by."""

    images: list[Tensor]  # (P_c, 3, S, S) uint8 by class
    features: list[Tensor]  # (P_c, d) unit length
    complexity: list[Tensor]  # (P_c,) total variation by that of the class's mean candidate


def make_pool(images: list[Tensor], teacher: Teacher) -> AnchorPool:
    """A pool of these images by class, seen by a teacher."""
    variation = [total_variation(x) for x in images]
    mean = torch.cat(variation).mean().clamp(min=1e-12)
    return AnchorPool(images, [_unit(teacher.features(x)) for x in images], [v / mean for v in variation])


def nearest_anchors(x: Tensor, labels: Tensor, pool: AnchorPool, teacher: Teacher, complexity: float) -> Tensor:
    """For every image the candidate of its class with the least |f(x) - f(p)|^2 + complexity TV(p), f unit features of
    a teacher and TV relative to the mean of all candidates: (B, 3, S, S) float32 in [0, 1].

    In the spirit of RETA's dynamic retrieval (arXiv 2602.24144), which also trades fit against complexity; its score
    was not at hand, so this one is ours.

    Args:
        x: (B, 3, S, S) float32 in [0, 1], the images before a merge.
    """
    features = _unit(teacher.features(x))
    chosen = []
    for f, label in zip(features, labels.tolist()):
        scores = (pool.features[label] - f).square().sum(1) + complexity * pool.complexity[label]
        chosen.append(pool.images[label][int(scores.argmin())])
    return torch.stack(chosen).float() / 255


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features, dim=1)
