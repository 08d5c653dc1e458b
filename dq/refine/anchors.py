"""Anchors of FADRM's residual merges: real patches, a set or a pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dq.core.errors import InputError
from dq.core.text import plural
from dq.data.source import ImageSource
from dq.networks.patches import PatchRecipe, patch_images
from dq.networks.teacher import Teacher
from dq.refine.measure import total_variation


def patch_anchors(
    source: ImageSource,
    label: int,
    number: int,
    recipe: PatchRecipe,
    *,
    teacher: Teacher,
    seed: int,
    candidates: np.ndarray | None = None,
) -> Tensor:
    """Cut the best patches (number, 3, S, S) uint8 of a class.

    FADRM's own starting images come from an unpublished script; their names say that they were cut as RDED cuts them.

    Args:
        source: whose train images are cut.
        label: index of the class.
        number: of patches.
        recipe: settings of patches; the pool is raised to `number`.
        teacher: that scores crops.
        seed: of the draws.
        candidates: ascending rows of the train split that may be used; None: all.

    Raises:
        InputError: if the class has fewer images.
    """
    patches = patch_images(
        source,
        number,
        dataclasses.replace(recipe, pool=max(recipe.pool, number)),
        teacher=teacher,
        seed=seed,  # the same patches as those of the baseline `patches`
        classes=[label],
        candidates=candidates,
    ).images
    if len(patches) < number:
        group = "" if candidates is None else "a group of "
        raise InputError(
            f"{group}class {label} {source.class_names[label]!r} has {plural(len(patches), 'image')} for {number} "
            "anchors; use anchors=init, fewer images per class, or a smaller retrieve_pool"
        )
    return patches


def anchors_by_class(
    images: Tensor, labels: Tensor, counts: Sequence[int], class_names: Sequence[str], origin: str
) -> list[Tensor]:
    """The first `counts[c]` images (n_c, 3, S, S) uint8 of every class c of a set.

    Args:
        images: (N, 3, S, S) uint8.
        labels: (N,) classes.
        counts: images of each class.
        class_names: of the classes, for messages.
        origin: name of the set, for messages.

    Raises:
        InputError: if the set has too few images of a class.
    """
    anchors = []
    for label, (name, count) in enumerate(zip(class_names, counts, strict=True)):
        members = images[labels == label]
        if len(members) < count:
            raise InputError(
                f"{origin} has {len(members)} anchors of class {label} {name!r} for {count} images; add some"
            )
        anchors.append(members[:count])
    return anchors


@dataclass(frozen=True)
class AnchorPool:
    """Candidate anchors of each class, with features and complexity."""

    images: list[Tensor]  # (P_c, 3, S, S) uint8 by class
    features: list[Tensor]  # (P_c, d) unit length
    complexity: list[Tensor]  # (P_c,) total variation by that of the class's mean candidate


def make_pool(images: list[Tensor], teacher: Teacher) -> AnchorPool:
    """Make a pool of images by class, with features of a teacher."""
    variation = [total_variation(x) for x in images]
    mean = torch.cat(variation).mean().clamp(min=1e-12)
    return AnchorPool(images, [_unit(teacher.features(x)) for x in images], [v / mean for v in variation])


def nearest_anchors(x: Tensor, labels: Tensor, pool: AnchorPool, teacher: Teacher, complexity: float) -> Tensor:
    """Retrieve for every image the best candidate of its class.

    The score is |f(x) - f(p)|^2 + complexity TV(p), with f unit features of a teacher and TV relative to the mean of
    all candidates. In the spirit of RETA's dynamic retrieval (arXiv 2602.24144), which also trades fit against
    complexity; its score was not at hand, so this one is ours.

    Args:
        x: (B, 3, S, S) float32 in [0, 1], the images before a merge.
        labels: (B,) classes.
        pool: candidates.
        teacher: whose features are compared.
        complexity: weight of TV.

    Returns:
        (B, 3, S, S) float32 in [0, 1].
    """
    features = _unit(teacher.features(x))
    chosen = []
    for f, label in zip(features, labels.tolist(), strict=True):
        scores = (pool.features[label] - f).square().sum(1) + complexity * pool.complexity[label]
        chosen.append(pool.images[label][int(scores.argmin())])
    return torch.stack(chosen).float() / 255


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features, dim=1)
