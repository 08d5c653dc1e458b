"""Gradient matching: images on which networks have the gradients that they have on real images.

Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient Matching" (DC), ICLR 2021, arXiv 2006.05929; with
differentiable Siamese augmentation (DSA, arXiv 2102.08259), and the settings of the released code; PAD's choice of
layers (arXiv 2408.03360) as an option. Departures: images may start from drawn ones, channel statistics are measured,
every random number is seeded.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq.config.condensation import LOOPS, GradientMatching
from dq.core.errors import InputError
from dq.core.seeds import derive_seed, generator
from dq.data.augment import dsa
from dq.data.zca import fit_whitening
from dq.networks.zoo import fast_layout, make_net
from dq.refine.method import Batch, Callback, Context, Cost, Method, Needs, RealImages, Refined, Resources, State
from dq.refine.momentum import Learned
from dq.refine.optimize import SHOWN
from dq.refine.starts import first_images, rows_by_class

TERMS = ("gradient_loss",)
SAVE_SECONDS = 60.0  # between two states to go on from
STRIPS = 4  # pictures of the first images, spread over the networks
NET_MOMENTUM = 0.5
EPS = 1e-6  # as released


def resolve(config: GradientMatching, context: Context) -> GradientMatching:
    """The settings with the loops filled in.

    Raises:
        InputError: for an unknown network, or one that gathers statistics over batches.
    """
    net = make_net(config.net, context.classes or 2, context.side, seed=0)
    if list(net.buffers()):
        raise InputError(
            f"network {config.net!r} gathers statistics over batches, which are other ones over a single class; take "
            "one with instance norm, such as convnet3"
        )
    ipc = context.ipc or 1
    passes, epochs = LOOPS[max(k for k in LOOPS if k <= ipc)]
    if config.net_epochs is not None:
        epochs = config.net_epochs
    return dataclasses.replace(config, passes=config.passes or passes, net_epochs=epochs)


def distance(real: Sequence[Tensor], learned: Sequence[Tensor]) -> Tensor:
    """sum over layers and their outputs j of 1 - cos(g_j, g'_j), ().

    Args:
        real, learned: gradients of the weights of each layer, (outputs, ...). Biases and norms are not compared.
    """
    total = torch.zeros((), device=learned[0].device)
    for a, b in zip(real, learned, strict=True):
        a, b = a.flatten(1), b.flatten(1)
        total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + EPS)).sum()
    return total


def compared_weights(net: nn.Module, alpha: float) -> list[nn.Parameter]:
    """The weights of layers whose gradients are compared: of L those behind the first int(alpha L)."""
    weights = [p for p in net.parameters() if p.ndim > 1]
    return weights[int(alpha * len(weights)) :]


def refine(
    images: Tensor,
    labels: Tensor,
    config: GradientMatching,
    real: RealImages,
    *,
    classes: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    resume: State | None = None,
    callback: Callback | None = None,
) -> Refined:
    """Learn a set's images; a pure function of its arguments. For every drawn network, `passes` times, the images of
    all classes c move along the gradient of

        L = sum_c D(grad CE(real images of c), grad CE(learned images of c))

    with D of `distance`, and the network trains on the set in between. Real and learned images have one augmentation.

    Args:
        images: (n, 3, S, S) float32 in [0, 1], the whole set.
        labels: (n,) classes.
        config: settings that `resolve` fills in.
        real: all train images.
        device: where all of it happens.

    Returns:
        Images of the same shape whose pixels may leave [0, 1].

    Raises:
        InputError: for settings that do not fit, or if a class of the set has no train image.
    """
    device, side = torch.device(device), images.shape[-1]
    config = resolve(config, Context(side, 0, max(1, round(len(images) / classes)), classes))
    passes, callback = config.passes or 1, callback or Callback()
    whitening, rows, y = fit_whitening(real.images, zca=False), rows_by_class(labels, real), labels.to(device)
    if resume:
        x = Learned(*(resume.tensors[k].to(device, copy=True) for k in ("x", "velocity")))
        trace, strips = resume.tensors["trace"].clone(), list(resume.tensors["strips"])
    else:
        x = Learned.of(first_images(config.start, images, labels, real, whitening, seed).to(device))
        trace, strips = torch.zeros(config.networks * passes, 1), [whitening.invert(x.value[:SHOWN]).cpu()]
    saved = time.perf_counter()
    for n in range(resume.steps // passes if resume else 0, config.networks):
        net = make_net(config.net, classes, side, seed=derive_seed(seed, "network", n))
        net.to(device, memory_format=fast_layout(net))  # type: ignore[call-overload]  # a keyword the stubs lack
        optimizer = torch.optim.SGD(net.parameters(), lr=config.net_lr, momentum=NET_MOMENTUM)
        weights = compared_weights(net, config.alpha)
        for i in range(passes):
            gradient, total = torch.zeros_like(x.value), 0.0
            for c, candidates in rows.items():
                chosen = torch.randperm(len(candidates), generator=generator(seed, "real", n, i, c))
                x_real = whitening(real.images[candidates[chosen[: config.real_batch]]].to(device))
                s = x.value[y == c].requires_grad_(True)
                seen = s
                if config.augment == "dsa":
                    own = seed, "augmentation", n, i, c
                    x_real, seen = (dsa(v, generator(*own), shared=True) for v in (x_real, s))
                g_real = torch.autograd.grad(F.cross_entropy(net(x_real), y.new_full((len(x_real),), c)), weights)
                g = torch.autograd.grad(F.cross_entropy(net(seen), y[y == c]), weights, create_graph=True)
                loss = distance(g_real, g)
                gradient[y == c] = torch.autograd.grad(loss, s)[0]
                total += float(loss.detach())
            trace[n * passes + i] = total
            x.step(gradient, config.lr, config.momentum)
            callback.step(n * passes + i)
            if i + 1 < passes:
                _train(net, optimizer, x.value, y, config, derive_seed(seed, "train", n, i))
        if (n + 1) % max(1, config.networks // STRIPS) == 0:
            strips.append(whitening.invert(x.value[:SHOWN]).cpu())
        if time.perf_counter() - saved >= SAVE_SECONDS and n + 1 < config.networks:
            tensors = {"x": x.value, "velocity": x.velocity, "trace": trace, "strips": torch.stack(strips)}
            callback.save(State({k: v.cpu().clone() for k, v in tensors.items()}, {}, (n + 1) * passes))
            saved = time.perf_counter()
    facts: dict[str, Any] = {"whitening": whitening.summary(), "net": config.net}
    return Refined(
        whitening.invert(x.value).cpu(),
        trace,
        TERMS,
        torch.stack(strips).clamp(0, 1),
        bounded=False,
        facts=facts,
        preprocessing=whitening.tensors(),
    )


def _train(
    net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, config: GradientMatching, seed: int
) -> None:
    """Train the network on the set for `net_epochs`."""
    draws = generator(seed)
    for _ in range(config.net_epochs or 0):
        for batch in torch.randperm(len(x), generator=draws).split(config.net_batch):
            rows = batch.to(x.device)
            seen = dsa(x[rows], draws) if config.augment == "dsa" else x[rows]
            optimizer.zero_grad()
            F.cross_entropy(net(seen), y[rows]).backward()
            optimizer.step()


class GradientMethod(Method):
    """Gradient matching as a stage of a run."""

    config = GradientMatching

    def resolve(self, stage: GradientMatching, context: Context) -> GradientMatching:
        return resolve(stage, context)

    def needs(self, stage: GradientMatching) -> Needs:
        return Needs(teachers=False, real_images=True)

    def run(
        self,
        batch: Batch,
        stage: GradientMatching,
        resources: Resources,
        *,
        seed: int,
        resume: State | None = None,
        callback: Callback | None = None,
    ) -> Refined:
        if resources.real is None:
            raise InputError("gradient matches real train images; give them as `Resources.real`")
        return refine(
            batch.images,
            batch.labels,
            stage,
            resources.real,
            classes=resources.classes,
            seed=derive_seed(seed, "gradient"),
            device=resources.device,
            resume=resume,
            callback=callback,
        )

    def brief(self, stage: GradientMatching) -> GradientMatching:
        return dataclasses.replace(stage, networks=1, passes=min(stage.passes or 2, 2))

    def cost(self, stage: GradientMatching, context: Context) -> Cost:
        return Cost(stage.networks * (stage.passes or 1), None)
