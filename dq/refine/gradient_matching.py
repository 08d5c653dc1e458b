"""Gradient matching: equal gradients of a network by classes.

Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient Matching" (DC), ICLR 2021, arXiv 2006.05929; with the same
augmentation on both sides, Zhao and Bilen, DSA, ICML 2021, arXiv 2102.08259; with the settings of the released code.
The share of parameters that is left out is PAD's (arXiv 2408.03360).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from dq.config.condensation import LOOPS, GradientMatching
from dq.core.errors import InputError
from dq.core.seeds import derive_seed, generator
from dq.data.augment import dsa
from dq.networks.flat_parameters import FlatNet
from dq.refine.class_matching import (
    ClassBatches,
    ClassMatchingMethod,
    Gradient,
    class_gradients,
    class_rows,
    image_shares,
    learn_images,
)
from dq.refine.method import Batch, Context, Cost, Refined, Resources, Session

TINY = 1e-6  # beside products of norms, as released


def resolve(config: GradientMatching, context: Context) -> GradientMatching:
    """Fill in passes and net_epochs by images per class, as the released code.

    Raises:
        InputError: for an unknown network, one that gathers statistics over batches, or an alpha that leaves nothing.
    """
    net = FlatNet(config.net, context.classes or 2, context.side)
    if int(config.alpha * net.size) >= net.size - net.sizes[-1]:  # the last are biases, which are not compared
        raise InputError(f"alpha={config.alpha:g} leaves no weights of {config.net!r} to compare; lower it")
    ipc = context.ipc or 1
    passes, epochs = LOOPS[max(k for k in LOOPS if k <= ipc)]
    if config.net_epochs is not None:
        epochs = config.net_epochs
    return dataclasses.replace(config, passes=config.passes or passes, net_epochs=epochs)


def distance(real: Tensor, learned: Tensor, net: FlatNet, alpha: float = 0.0) -> Tensor:
    """Sum over layers and their outputs o of 1 - cos(real_o, learned_o).

    DC, equation 10, where biases and norms are left out as released.

    Args:
        real: (P,) gradient of real images for the parameters of `net`.
        learned: (P,) that of learned ones.
        net: the network.
        alpha: the first int(alpha P) entries are left out.
    """
    first, begin = int(alpha * net.size), 0
    total = torch.zeros((), device=real.device)
    for shape, size in zip(net.shapes, net.sizes, strict=True):
        end = begin + size
        if len(shape) > 1 and end > first:
            a, b = (g[begin:end].view(shape[0], -1) for g in (real, learned))
            if begin < first:  # the cut lies within this layer
                compared = (torch.arange(begin, end, device=real.device) >= first).view(shape[0], -1)
                rows = compared.any(1)
                a, b = (a * compared)[rows], (b * compared)[rows]
            total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + TINY)).sum()
        begin = end
    return total


def train(
    net: FlatNet,
    theta: Tensor,
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    config: GradientMatching,
    draws: torch.Generator,
) -> Tensor:
    """Parameters (P,) after `config.net_epochs` epochs of SGD on a set.

    Args:
        net: the network.
        theta: (P,) its parameters at the start.
        x: (n, 3, S, S) images as networks see them.
        y: (n,) classes.
        weights: (n,) of the images in the cross-entropy.
        config: settings of the training.
        draws: for batches and augmentation.
    """
    for _ in range(config.net_epochs or 0):
        for part in torch.randperm(len(x), generator=draws).split(config.net_batch):
            index = part.to(x.device)
            images = dsa(x[index], draws) if config.augment == "dsa" else x[index]
            at = theta.detach().requires_grad_(True)
            losses = F.cross_entropy(net(at, images), y[index], reduction="none")
            (g,) = torch.autograd.grad((weights[index] * losses).sum() / weights[index].sum(), at)
            theta = at.detach() - config.net_lr * g
    return theta


def refine(batch: Batch, config: GradientMatching, resources: Resources, session: Session | None = None) -> Refined:
    """Learn the images of a set by gradient matching; see `learn_images`.

    With a network theta and the same augmentation a on both sides, they move along the gradient of

        L = sum_c distance(grad_theta l(theta; a(real images of c)), grad_theta l(theta; a(learned images of c)))

    of the cross-entropy l; then theta is trained `net_epochs` epochs on the set, and after `passes` updates replaced.
    With `config.weighted` the weights of the batch weigh the images in the cross-entropy.
    """
    session, classes, device = session or Session(), resources.classes, resources.device
    seed, side = session.seed, batch.images.shape[-1]
    config = resolve(config, Context(side, 0, max(1, len(batch.images) // classes), classes))
    passes = config.passes or 1
    net = FlatNet(config.net, classes, side).to(device)
    weights, shares = (v.to(device) for v in image_shares(config, batch))
    y, rows = batch.labels.to(device), class_rows(batch.labels, device)

    def gradient_of(batches: ClassBatches) -> Gradient:
        def gradient(x: Tensor, step: int, carried: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            number, update = divmod(step, passes)
            if update == 0:
                carried["theta"] = net.initial(derive_seed(seed, "network", number)).to(device)
            else:
                draws = generator(seed, "network's training", step)
                carried["theta"] = train(net, carried["theta"], x, y, weights, config, draws)
            theta = carried["theta"].detach().requires_grad_(True)

            def loss_of(c: int, part: Tensor) -> Tensor:
                real, index = batches.images(c, step, device), rows[c]
                loss = F.cross_entropy(net(theta, real), torch.full((len(real),), c, device=device))
                (of_real,) = torch.autograd.grad(loss, theta)
                losses = F.cross_entropy(net(theta, batches.augment(part, c, step)), y[index], reduction="none")
                (of_learned,) = torch.autograd.grad((shares[index] * losses).sum(), theta, create_graph=True)
                return distance(of_real, of_learned, net, config.alpha)

            return class_gradients(loss_of, x, rows)[:2]

        return gradient

    return learn_images(batch, config, config.networks * passes, resources, gradient_of, session)


class GradientMethod(ClassMatchingMethod):
    """Gradient matching as a stage of a run."""

    config = GradientMatching
    refine = staticmethod(refine)

    def resolve(self, stage: GradientMatching, context: Context) -> GradientMatching:
        return resolve(stage, context)

    def brief(self, stage: GradientMatching) -> GradientMatching:
        # two updates of a network, with a training of it in between
        return dataclasses.replace(stage, networks=1, passes=min(stage.passes or 2, 2), start="drawn", checks=0)

    def cost(self, stage: GradientMatching, context: Context) -> Cost:
        return Cost(stage.networks * (stage.passes or 1), None, stage.checks * stage.check_nets)
