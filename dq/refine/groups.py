"""Groups of the real images of a class, one for each of its images in the set, and what a network sees of them.

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
    """Moments of every image over its pixels, (N, sum C_l) float32 on the CPU: the channels of layer after layer.

    Args:
        layers: of `trace_layers`.
        images: (N, 3, S, S) uint8 or float in [0, 1].
    """
    channels = sum(a.channels for a in layers)
    with evaluation_mode(teacher.net), _input_moments(layers) as seen:

        def look(x: Tensor) -> Tensor:
            seen.clear()
            teacher(x)
            return torch.cat([torch.cat([m.mean for m in seen], 1), torch.cat([m.var for m in seen], 1)], 1).cpu()

        both = teacher.in_batches(images, look)
    return Moments(both[:, :channels], both[:, channels:])


@contextlib.contextmanager
def _input_moments(layers: Sequence[Layer]) -> Iterator[list[Moments]]:
    """A list to which a forward pass within the block adds the moments (B, C_l) of every image in each layer."""
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
    """Mean over several scores (n,) of the rank of each image, (n,) float64; ties go by position."""
    ranks = [x.argsort(stable=True).argsort(stable=True).double() for x in scores]
    return torch.stack(ranks).mean(0)


def cut_by_score(rows: Tensor, scores: Tensor, number: int) -> list[Tensor]:
    """Rows (n,) cut into groups from the least to the largest score, whose sizes differ by at most one.

    Args:
        number: of groups, at most n.
    """
    ordered = rows[scores.argsort(stable=True)]
    edges = [len(rows) * j // number for j in range(number + 1)]
    return [ordered[a:b].sort().values for a, b in itertools.pairwise(edges)]


def groups_by_score(rows: Tensor, scores: Tensor, images: int) -> ClassGroups:
    """Real images (n,) of a class in groups of nearly equal size, one for each of its images in the set; with fewer
    real images than these, each is a group, and images that follow one another share it."""
    number = min(images, len(rows))
    return ClassGroups(cut_by_score(rows, scores, number), [rank * number // images for rank in range(images)])


def groups_by_cell(rows: Tensor, cells: Tensor, copies: Sequence[int]) -> ClassGroups:
    """Real images (n,) of a class in the cells (n,) of its prototypes; images of a prototype share its cell.

    Args:
        copies: images of each prototype in the set.
    """
    of_image = [k for k, n in enumerate(copies) for _ in range(n)]
    return ClassGroups([rows[cells == k].sort().values for k in range(len(copies))], of_image)
