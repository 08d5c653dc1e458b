"""Gradient of the distance between a student's trajectory on a distilled set and an expert's on real images.

MTT (Cazenavette et al. 2022) unrolls the student; TESLA (Cui et al. 2023) needs the memory of one step; PAD (arXiv
2408.03360) leaves the shallow parameters out of the distance.
"""

from __future__ import annotations

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
class Student:
    """The training of a student on the set: plain SGD on the cross-entropy with softened labels."""

    net: FlatNet
    batches: Sequence[Tensor]  # of every step: indices of its images
    seed: int  # of the augmentation, together with the step
    kind: str = "dsa"  # of the augmentation, "none" for none

    def loss(self, theta: Tensor, i: int, x: Tensor, y: Tensor) -> Tensor:
        """-mean over the batch of step i of sum_c softmax(y)_c log softmax(f(theta, augmented x))_c, ()."""
        rows = self.batches[i].to(x.device)
        seen = augment(self.kind, x[rows], generator(self.seed, i))
        return -(y[rows].softmax(1) * F.log_softmax(self.net(theta, seen), 1)).sum(1).mean()


def draw_batches(images: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """Indices of the batches of a student's steps: a permutation in pieces of `size`, then another one."""
    draws = generator(seed, "inner batches")
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches += torch.randperm(images, generator=draws).split(size)
    return batches[:steps]


def last_start(step: int, *, first: int, last: int, every: int) -> int:
    """The bound below which start epochs are drawn at a step: min(last, first + step // every) (DATM's sequential
    generation, where a run of `every` steps raises the bound by an epoch)."""
    return min(last, first + step // every) if every else last


def kept_parameters(share: float, select: str, errors: Tensor) -> Tensor:
    """Which parameters (P,) the distance counts, as zeros and ones (PAD's second filter).

    Args:
        share: of the parameters that are left out, k = int(share P) of them.
        select: "depth" leaves out the first k in the order of registration, which for a ConvNet are the shallowest;
            "loss" the k whose squared errors are smallest, as the paper's alternative.
        errors: (P,) squared differences of the student's end and the expert's.
    """
    mask = torch.ones_like(errors)
    k = int(share * len(errors))
    if select == "depth":
        mask[:k] = 0
    elif k:
        mask[errors.detach().topk(k, largest=False).indices] = 0
    return mask


def matching_loss(end: Tensor, start: Tensor, target: Tensor, share: float, select: str) -> tuple[Tensor, Tensor]:
    """The distance and its denominator:

        L = sum_j m_j (end_j - target_j)^2 / D,  D = sum_j m_j (start_j - target_j)^2

    with m of `kept_parameters`. The paper prints norms, the released code has sums of squares.

    Args:
        end: (P,) the student's parameters at its end.
        start: (P,) the expert's where the student started.
        target: (P,) the expert's some epochs later.
    """
    errors = (end - target).square()
    m = kept_parameters(share, select, errors)
    denominator = (m * (start - target).square()).sum()
    return (m * errors).sum() / (denominator + TINY), denominator


def exact_gradient(
    student: Student,
    x: Tensor,
    y: Tensor,
    step_size: Tensor,
    start: Tensor,
    target: Tensor,
    *,
    share: float = 0.0,
    select: str = "depth",
) -> MetaGradient:
    """Gradient through all steps theta_{i+1} = theta_i - lr grad l_i(theta_i) of the student. Its memory grows with
    their number: about 3 MB for an image of 32 px, a step and a ConvNet of width 128.

    Args:
        x: (S, 3, H, H) images as networks see them.
        y: (S, C) label logits.
        step_size: () lr.
        start, target: (P,) of the expert.
        share, select: see `kept_parameters`.
    """
    x, y, lr = (v.detach().requires_grad_(True) for v in (x, y, step_size))
    theta = start.detach().requires_grad_(True)
    for i in range(len(student.batches)):
        (g,) = torch.autograd.grad(student.loss(theta, i, x, y), theta, create_graph=True)
        theta = theta - lr * g
    loss, _ = matching_loss(theta, start, target, share, select)
    return MetaGradient(loss.detach(), *torch.autograd.grad(loss, (x, y, lr)))


def tesla_gradient(
    student: Student,
    x: Tensor,
    y: Tensor,
    step_size: Tensor,
    start: Tensor,
    target: Tensor,
    *,
    share: float = 0.0,
    select: str = "depth",
) -> MetaGradient:
    """TESLA's gradient in the memory of one step. With G = sum_i g_i, g_i = grad l_i(theta_i), m of `kept_parameters`,
    r = m (start - lr G - target) and D of `matching_loss`:

        L = |r|^2 / D,  dL/dlr = -2 r G / D,  dL/dx += d/dx [(-2 lr / D) r g_i(x)]

    with r, lr and theta_i taken for constants. The loss is that of `exact_gradient`; the gradients leave out that
    theta_i depends on the images and on lr through the steps before, which the paper does not say: their cosine with
    the exact ones falls with the number of steps and with lr.
    """
    x, y, lr = x.detach().requires_grad_(True), y.detach().requires_grad_(True), step_size.detach()
    start, target = start.detach(), target.detach()
    theta, visited, total = start, [], torch.zeros_like(start)
    for i in range(len(student.batches)):
        at = theta.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(student.loss(at, i, x.detach(), y.detach()), at)
        visited.append(at.detach())
        theta, total = at.detach() - lr * g, total + g
    loss, denominator = matching_loss(theta, start, target, share, select)
    r = kept_parameters(share, select, (theta - target).square()) * (theta - target)
    scale = -2 / (denominator + TINY)
    g_x, g_y = torch.zeros_like(x), torch.zeros_like(y)
    for i, at in enumerate(visited):
        at = at.requires_grad_(True)
        (g,) = torch.autograd.grad(student.loss(at, i, x, y), at, create_graph=True)
        part_x, part_y = torch.autograd.grad(r @ g, (x, y))
        g_x, g_y = g_x + scale * lr * part_x, g_y + scale * lr * part_y
    return MetaGradient(loss.detach(), g_x, g_y, scale * (r @ total))


GRADIENTS = {"exact": exact_gradient, "tesla": tesla_gradient}
