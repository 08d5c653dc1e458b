"""Gradient of the distance between a student's and an expert's trajectory.

MTT (Cazenavette et al. 2022) unrolls the student; TESLA (Cui et al. 2023) needs the memory of one step; PAD (arXiv
2408.03360) leaves the shallow parameters out of the distance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dq.core.seeds import generator
from dq.data.augment import augment
from dq.networks.flat_parameters import FlatNet

TINY = 1e-12


class MetaGradient(NamedTuple):
    """The loss of a step and its gradients."""

    loss: Tensor  # ()
    images: Tensor  # (S, 3, H, H)
    labels: Tensor  # (S, C)
    step_size: Tensor  # ()


@dataclass(frozen=True)
class Segment:
    """A part of an expert's trajectory, and which parameters of it are compared."""

    start: Tensor  # (P,) the expert's parameters where the student starts
    target: Tensor  # (P,) those some epochs later
    share: float = 0.0  # of the parameters that are left out, k = int(share P) of them
    # "depth" leaves out the first k in the order of registration, which for a ConvNet are the shallowest; "loss" the k
    # whose squared errors are smallest, as the paper's alternative
    select: str = "depth"

    def mask(self, errors: Tensor) -> Tensor:
        """Compared parameters (P,), as zeros and ones (PAD's second filter).

        `errors` (P,) are squared differences of the student's end and the expert's.
        """
        mask = torch.ones_like(errors)
        k = int(self.share * len(errors))
        if self.select == "depth":
            mask[:k] = 0
        elif k:
            mask[errors.detach().topk(k, largest=False).indices] = 0
        return mask


@dataclass(frozen=True)
class Student:
    """The training of a student: plain SGD on the cross-entropy with softened labels."""

    net: FlatNet
    batches: Sequence[Tensor]  # of every step: indices of its images
    seed: int  # of the augmentation, together with the step
    kind: str = "dsa"  # of the augmentation, "none" for none

    def loss(self, theta: Tensor, i: int, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy () of softmax(y) and the predictions for augmented x at step i."""
        rows = self.batches[i].to(x.device)
        augmented = augment(self.kind, x[rows], generator(self.seed, i))
        return -(y[rows].softmax(1) * F.log_softmax(self.net(theta, augmented), 1)).sum(1).mean()


def draw_batches(images: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """Indices of the batches of a student's steps: permutations in pieces of `size`."""
    draws = generator(seed, "inner batches")
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches += torch.randperm(images, generator=draws).split(size)
    return batches[:steps]


def last_start(step: int, *, first: int, last: int, every: int) -> int:
    """Bound below which start epochs are drawn at a step: min(last, first + step // every).

    DATM's sequential generation, where `every` steps raise the bound by an epoch.
    """
    return min(last, first + step // every) if every else last


def matching_loss(end: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
    """The distance of a student's end (P,) from an expert's, and its denominator.

        L = sum_j m_j (end_j - target_j)^2 / D,  D = sum_j m_j (start_j - target_j)^2

    with m of `Segment.mask`. The paper prints norms, the released code has sums of squares.
    """
    errors = (end - segment.target).square()
    m = segment.mask(errors)
    denominator = (m * (segment.start - segment.target).square()).sum()
    return (m * errors).sum() / (denominator + TINY), denominator


def exact_gradient(student: Student, x: Tensor, y: Tensor, step_size: Tensor, segment: Segment) -> MetaGradient:
    """Gradient through all steps theta_{i+1} = theta_i - lr grad l_i(theta_i).

    Its memory grows with their number: about 3 MB for an image of 32 px, a step and a ConvNet of width 128.

    Args:
        student: the training.
        x: (S, 3, H, H) images as networks see them.
        y: (S, C) label logits.
        step_size: () lr.
        segment: of the expert.
    """
    x, y, lr = (v.detach().requires_grad_(True) for v in (x, y, step_size))
    theta = segment.start.detach().requires_grad_(True)
    for i in range(len(student.batches)):
        (g,) = torch.autograd.grad(student.loss(theta, i, x, y), theta, create_graph=True)
        theta = theta - lr * g
    loss, _ = matching_loss(theta, segment)
    return MetaGradient(loss.detach(), *torch.autograd.grad(loss, (x, y, lr)))


def tesla_gradient(student: Student, x: Tensor, y: Tensor, step_size: Tensor, segment: Segment) -> MetaGradient:
    """TESLA's gradient in the memory of one step; arguments as for `exact_gradient`.

    With G = sum_i g_i, g_i = grad l_i(theta_i), m of `Segment.mask`, r = m (start - lr G - target) and D of
    `matching_loss`:

        L = |r|^2 / D,  dL/dlr = -2 r G / D,  dL/dx += d/dx [(-2 lr / D) r g_i(x)]

    with r, lr and theta_i taken for constants. The loss is that of `exact_gradient`; the gradients leave out that
    theta_i depends on the images and on lr through the steps before, which the paper does not say: their cosine with
    the exact ones falls with the number of steps and with lr.
    """
    x, y, lr = x.detach().requires_grad_(True), y.detach().requires_grad_(True), step_size.detach()
    segment = dataclasses.replace(segment, start=segment.start.detach(), target=segment.target.detach())
    theta, visited, total = segment.start, [], torch.zeros_like(segment.start)
    for i in range(len(student.batches)):
        at = theta.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(student.loss(at, i, x.detach(), y.detach()), at)
        visited.append(at.detach())
        theta, total = at.detach() - lr * g, total + g
    loss, denominator = matching_loss(theta, segment)
    r = segment.mask((theta - segment.target).square()) * (theta - segment.target)
    scale = -2 / (denominator + TINY)
    g_x, g_y = torch.zeros_like(x), torch.zeros_like(y)
    for i, at in enumerate(visited):
        at = at.requires_grad_(True)
        (g,) = torch.autograd.grad(student.loss(at, i, x, y), at, create_graph=True)
        part_x, part_y = torch.autograd.grad(r @ g, (x, y))
        g_x, g_y = g_x + scale * lr * part_x, g_y + scale * lr * part_y
    return MetaGradient(loss.detach(), g_x, g_y, scale * (r @ total))


GRADIENTS = {"exact": exact_gradient, "tesla": tesla_gradient}
