"""Distribution matching: equal mean features of classes under random networks.

Zhao and Bilen, "Dataset Condensation with Distribution Matching" (DM), WACV 2023, arXiv 2110.04181, with the settings
of the released code; the choice of layers is PAD's (arXiv 2408.03360).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dq.config.condensation import DistributionMatching
from dq.core.errors import InputError
from dq.core.seeds import derive_seed
from dq.networks.flat_parameters import FlatNet
from dq.networks.zoo import make_net
from dq.refine.class_matching import (
    ClassBatches,
    ClassMatchingMethod,
    Gradient,
    class_gradients,
    class_rows,
    image_shares,
    learn_images,
)
from dq.refine.method import Batch, Context, Refined, Resources, Session


def resolve(config: DistributionMatching, context: Context) -> DistributionMatching:
    """Fill in the settings: `lr: auto` is the number of images per class.

    Raises:
        InputError: for a network that gathers statistics over batches, or has no blocks to choose from.
    """
    net = FlatNet(config.net, context.classes or 2, context.side).net
    with block_outputs(net, config.alpha):
        return config if config.lr is not None else dataclasses.replace(config, lr=float(context.ipc or 1))


def distance(real: Tensor, learned: Tensor, shares: Tensor) -> Tensor:
    """Squared distance of means, |mean_i real_i - sum_j shares_j learned_j|^2 (DM, equation 6).

    Args:
        real: (B, ...) features of real images of a class.
        learned: (m, ...) features of its learned images.
        shares: (m,) of these, which sum to 1.
    """
    return (real.mean(0) - torch.tensordot(shares, learned, 1)).square().sum()


@contextmanager
def block_outputs(net: nn.Module, alpha: float | None) -> Iterator[list[Tensor]]:
    """Collect the pooled maps of each matched block in a forward pass.

    Raises:
        InputError: for a network that has no pooled blocks.
    """
    layers = list(getattr(net, "features", ()))
    blocks = [m for m in layers if isinstance(m, nn.AvgPool2d | nn.MaxPool2d)]
    if not blocks:
        raise InputError(
            f"matching of features needs a network of pooled blocks, such as convnet3, not {type(net).__name__}"
        )
    matched = blocks[-1:] if alpha is None else blocks[int(alpha * len(blocks)) :]
    outputs: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda _module, _args, out: outputs.append(out)) for m in matched]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def refine(
    batch: Batch, config: DistributionMatching, resources: Resources, session: Session | None = None
) -> Refined:
    """Learn the images of a set by distribution matching; see `learn_images`.

    In every step, with a freshly drawn network f and the same augmentation a on both sides, the images move along the
    gradient of

        L = sum_c |mean_{real x of c} f(a(x)) - mean_{learned x of c} f(a(x))|^2

    With `config.weighted` the weights of the batch weigh the images in the means.
    """
    session, classes, device = session or Session(), resources.classes, resources.device
    seed = session.seed
    shares = image_shares(config, batch)[1].to(device)
    rows = class_rows(batch.labels, device)
    context = Context(batch.images.shape[-1], 0, ipc=len(batch.images) // classes, classes=classes)
    config = resolve(config, context)

    def gradient_of(batches: ClassBatches) -> Gradient:
        def gradient(x: Tensor, step: int, carried: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            net = make_net(config.net, classes, x.shape[-1], seed=derive_seed(seed, "network", step)).to(device)
            net.requires_grad_(False)

            def loss_of(c: int, part: Tensor) -> Tensor:
                real = block_features(net, batches.images(c, step, device), config.alpha)
                learned = block_features(net, batches.augment(part, c, step), config.alpha)
                blocks = zip(real, learned, strict=True)
                return torch.stack([distance(r, s, shares[rows[c]]) for r, s in blocks]).sum()

            return class_gradients(loss_of, x, rows)[:2]

        return gradient

    return learn_images(batch, config, config.steps, resources, gradient_of, session)


def block_features(net: nn.Module, x: Tensor, alpha: float | None) -> Sequence[Tensor]:
    """Pooled maps (B, C, h, w) of the matched blocks for images (B, 3, S, S).

    Raises:
        InputError: for a network that has no pooled blocks.
    """
    with block_outputs(net, alpha) as outputs:
        net(x)
    return outputs


class DistributionMethod(ClassMatchingMethod):
    """Distribution matching as a stage of a run."""

    config = DistributionMatching
    refine = staticmethod(refine)

    def resolve(self, stage: DistributionMatching, context: Context) -> DistributionMatching:
        return resolve(stage, context)
