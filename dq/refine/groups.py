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
from typing import Any

import torch
from torch import Tensor, nn

from dq.networks.teacher import Teacher, evaluation_mode
from dq.refine.matching import Layer
from dq.refine.moments import Moments


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


def group_of_rank(rank: int, *, images: int, groups: int) -> int:
    """The group of the image of a rank among so many images of its class. Where there are as many groups as images, it
    is the rank; several images of a prototype share its cell, and those of a class with few real images share groups.
    """
    return rank * groups // images
