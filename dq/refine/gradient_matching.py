"""Gradient matching: images of a class give a network the gradients that real ones give it.

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
from dq.diffusion.image_codec import ImageCodec
from dq.networks.flat_parameters import FlatNet
from dq.refine.class_matching import (
    ClassBatches,
    ClassMatchingMethod,
    Gradient,
    class_gradients,
    image_weights,
    learn_images,
)
from dq.refine.method import Callback, Context, Cost, RealImages, Refined, State

TINY = 1e-6  # beside products of norms, as released


def resolve(config: GradientMatching, context: Context) -> GradientMatching:
    """The settings with passes and net_epochs filled in, those of the released code by images per class.

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
    """sum over layers and their outputs o of 1 - cos(real_o, learned_o), () (DC, equation 10), where biases and norms
    are left out as released.

    Args:
        real, learned: (P,) gradients for the parameters of `net`.
        alpha: the first int(alpha P) entries are left out.
    """
    first, begin = int(alpha * net.size), 0
    total = torch.zeros((), device=real.device)
    for shape, size in zip(net.shapes, net.sizes, strict=True):
        end = begin + size
        if len(shape) > 1 and end > first:
            a, b = (g[begin:end].view(shape[0], -1) for g in (real, learned))
            if begin < first:  # the cut lies within this layer
                kept = (torch.arange(begin, end, device=real.device) >= first).view(shape[0], -1)
                rows = kept.any(1)
                a, b = (a * kept)[rows], (b * kept)[rows]
            total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + TINY)).sum()
        begin = end
    return total


def refine(
    images: Tensor,
    labels: Tensor,
    config: GradientMatching,
    real: RealImages,
    *,
    classes: int,
    weights: Tensor | None = None,
    codec: ImageCodec | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    resume: State | None = None,
    callback: Callback | None = None,
) -> Refined:
    """Learn a set's images; see `learn_images`. With a network theta and the same augmentation a on both sides, they
    move along the gradient of

        L = sum_c distance(grad_theta l(theta; a(real images of c)), grad_theta l(theta; a(learned images of c)))

    of the cross-entropy l; then theta is trained `net_epochs` epochs on the set, and after `passes` updates replaced.

    Args:
        weights: (n,) of the images in the cross-entropy, for `config.weighted`.
    """
    device = torch.device(device)
    config = resolve(config, Context(images.shape[-1], 0, max(1, len(images) // classes), classes))
    passes, epochs = config.passes or 1, config.net_epochs or 0
    net = FlatNet(config.net, classes, images.shape[-1]).to(device)
    w, shares = (v.to(device) for v in image_weights(config, labels, weights))
    y = labels.to(device)
    rows = {c: (y == c).nonzero()[:, 0] for c in labels.unique().tolist()}

    def train(theta: Tensor, x: Tensor, step: int) -> Tensor:
        """Parameters after some epochs of SGD on the set."""
        draws = generator(seed, "network's training", step)
        for _ in range(epochs):
            for part in torch.randperm(len(x), generator=draws).split(config.net_batch):
                own = part.to(device)
                seen = dsa(x[own], draws) if config.augment == "dsa" else x[own]
                at = theta.detach().requires_grad_(True)
                losses = F.cross_entropy(net(at, seen), y[own], reduction="none")
                (g,) = torch.autograd.grad((w[own] * losses).sum() / w[own].sum(), at)
                theta = at.detach() - config.net_lr * g
        return theta

    def gradient_of(batches: ClassBatches) -> Gradient:
        def gradient(x: Tensor, step: int, carried: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            number, update = divmod(step, passes)
            if update == 0:
                carried["theta"] = net.initial(derive_seed(seed, "network", number)).to(device)
            else:
                carried["theta"] = train(carried["theta"], x, step)
            theta = carried["theta"].detach().requires_grad_(True)

            def loss_of(c: int, part: Tensor) -> Tensor:
                seen, own = batches.images(c, step, device), rows[c]
                loss = F.cross_entropy(net(theta, seen), torch.full((len(seen),), c, device=device))
                (of_real,) = torch.autograd.grad(loss, theta)
                losses = F.cross_entropy(net(theta, batches.augment(part, c, step)), y[own], reduction="none")
                (of_learned,) = torch.autograd.grad((shares[own] * losses).sum(), theta, create_graph=True)
                return distance(of_real, of_learned, net, config.alpha)

            return class_gradients(loss_of, x, rows)[:2]

        return gradient

    return learn_images(
        images,
        labels,
        config,
        config.networks * passes,
        real,
        gradient_of,
        classes=classes,
        weights=weights,
        codec=codec,
        seed=seed,
        device=device,
        resume=resume,
        callback=callback,
    )


class GradientMethod(ClassMatchingMethod):
    """Gradient matching as a stage of a run."""

    config = GradientMatching
    learn = staticmethod(refine)

    def resolve(self, stage: GradientMatching, context: Context) -> GradientMatching:
        return resolve(stage, context)

    def brief(self, stage: GradientMatching) -> GradientMatching:
        # two updates of a network, with a training of it in between
        return dataclasses.replace(stage, networks=1, passes=min(stage.passes or 2, 2), start="drawn", checks=0)

    def cost(self, stage: GradientMatching, context: Context) -> Cost:
        return Cost(stage.networks * (stage.passes or 1), None, stage.checks * stage.check_nets)
