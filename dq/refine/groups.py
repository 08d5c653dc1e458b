"""Groups of real images of a class and their statistics.

PSM (arXiv 2609.34299): images that all follow one set of statistics are about equally difficult. There, the real
images of a class are sorted by GPS and cut into groups from easy to hard; the batch of the images of rank g is matched
to the batch norm statistics of the groups g, and starts from images of these. With the cells of a class's quantizer as
groups, each with the prototype that stands for it, this is not in print.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dq.networks.teacher import Teacher, evaluation_mode
from dq.refine.matching import Layer
from dq.refine.moments import Moments


@dataclass(frozen=True)
class ClassGroups:
    """The real images of a class in groups."""

    rows: list[Tensor]  # of each group: rows of the train split, ascending; together all images that are quantized
    of_image: list[int]  # the group of each image of the class in the set, ascending


def image_moments(teacher: Teacher, layers: Sequence[Layer], images: Tensor) -> Moments:
    """Moments (N, sum C_l) of every image over its pixels, layer after layer.

    float32 on the CPU, for layers of `trace_layers` and images (N, 3, S, S), uint8 or float in [0, 1].
    """
    channels = sum(a.channels for a in layers)
    with evaluation_mode(teacher.net), _input_moments(layers) as seen:

        def moments(x: Tensor) -> Tensor:
            seen.clear()
            teacher(x)
            return torch.cat([torch.cat([m.mean for m in seen], 1), torch.cat([m.var for m in seen], 1)], 1).cpu()

        both = teacher.in_batches(images, moments)
    return Moments(both[:, :channels], both[:, channels:])


@contextlib.contextmanager
def _input_moments(layers: Sequence[Layer]) -> Iterator[list[Moments]]:
    """Collect the moments (B, C_l) of every image in each layer in a forward pass."""
    seen: list[Moments] = []

    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].float()
        mean = x.mean((2, 3))
        seen.append(Moments(mean, (x - mean[:, :, None, None]).square_().mean((2, 3))))

    hooks = [a.norm.register_forward_pre_hook(read) for a in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def mean_rank(scores: Sequence[Tensor]) -> Tensor:
    """Mean rank (n,) float64 of each image over scores (n,); ties go by position."""
    ranks = [x.argsort(stable=True).argsort(stable=True).double() for x in scores]
    return torch.stack(ranks).mean(0)


def cut_by_score(rows: Tensor, scores: Tensor, number: int) -> list[Tensor]:
    """Cut rows (n,) into `number` groups by ascending score.

    Sizes differ by at most one; `number` is at most n.
    """
    ordered = rows[scores.argsort(stable=True)]
    edges = [len(rows) * j // number for j in range(number + 1)]
    return [ordered[a:b].sort().values for a, b in itertools.pairwise(edges)]


def groups_by_score(rows: Tensor, scores: Tensor, images: int) -> ClassGroups:
    """Group the real images (n,) of a class by score.

    One group for each image in the set. Groups are of nearly equal size. With fewer real images than these, each is a
    group, and images that follow one another share it.
    """
    number = min(images, len(rows))
    return ClassGroups(cut_by_score(rows, scores, number), [rank * number // images for rank in range(images)])


def groups_by_cell(rows: Tensor, cells: Tensor, copies: Sequence[int]) -> ClassGroups:
    """Group the real images (n,) of a class by the cells (n,) of its prototypes.

    Images of a prototype share its cell; `copies` are the images of each prototype in the set.
    """
    of_image = [k for k, n in enumerate(copies) for _ in range(n)]
    return ClassGroups([rows[cells == k].sort().values for k in range(len(copies))], of_image)
