"""Distribution matching: images whose mean features on random networks are those of real images.

Zhao and Bilen, "Dataset Condensation with Distribution Matching" (DM), WACV 2023, arXiv 2110.04181, with the settings
of the released code, and PAD's choice of layers (arXiv 2408.03360) as an option. Departures: images may start from
drawn ones, channel statistics are measured, every random number is seeded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dq.config.condensation import DistributionMatching
from dq.core.errors import InputError
from dq.core.seeds import derive_seed, generator
from dq.data.augment import dsa
from dq.data.zca import fit_whitening
from dq.networks.teacher import head_inputs
from dq.networks.zoo import fast_layout, make_net
from dq.refine.method import Batch, Callback, Context, Cost, Method, Needs, RealImages, Refined, Resources, State
from dq.refine.momentum import Learned
from dq.refine.optimize import SHOWN
from dq.refine.starts import first_images, rows_by_class

TERMS = ("distribution_loss",)
SAVE_SECONDS = 60.0  # between two states to go on from
STRIPS = 4  # pictures of the first images, spread over the steps


def distance(real: list[Tensor], learned: list[Tensor]) -> Tensor:
    """sum over layers of |mean of real features - mean of learned features|^2, ().

    Args:
        real, learned: of each layer, features of images of one class, (N, ...) and (n, ...).
    """
    means = [(a.flatten(1).mean(0), b.flatten(1).mean(0)) for a, b in zip(real, learned, strict=True)]
    return torch.stack([(a - b).square().sum() for a, b in means]).sum()


@contextlib.contextmanager
def compared_features(net: nn.Module, alpha: float | None) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """The features that are compared, as a function of images within the block: of the last embedding, or of the
    blocks of a ConvNet behind its first int(alpha L)."""
    if alpha is None:
        with head_inputs(net) as seen:

            def embed(x: Tensor) -> list[Tensor]:
                seen.clear()
                net(x)
                return [seen.pop()]

            yield embed
        return
    ends = [m for m in net.modules() if isinstance(m, nn.AvgPool2d)]  # of the blocks, from the shallowest
    outputs: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda m, args, y: outputs.append(y)) for m in ends[int(alpha * len(ends)) :]]

    def embed_all(x: Tensor) -> list[Tensor]:
        outputs.clear()
        net(x)
        return list(outputs)

    try:
        yield embed_all
    finally:
        for hook in hooks:
            hook.remove()


def refine(
    images: Tensor,
    labels: Tensor,
    config: DistributionMatching,
    real: RealImages,
    *,
    classes: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    resume: State | None = None,
    callback: Callback | None = None,
) -> Refined:
    """Learn a set's images; a pure function of its arguments. In every step a network f is drawn, and the images of
    all classes c move along the gradient of

        L = sum_c |mean over real x of c of f(A_c(x)) - mean over learned s of c of f(A_c(s))|^2

    with one augmentation A_c for both.

    Args:
        images: (n, 3, S, S) float32 in [0, 1], the whole set.
        labels: (n,) classes.
        real: all train images.
        device: where all of it happens.

    Returns:
        Images of the same shape whose pixels may leave [0, 1].

    Raises:
        InputError: if a class of the set has no train image.
    """
    device = torch.device(device)
    callback = callback or Callback()
    whitening, rows = fit_whitening(real.images, zca=False), rows_by_class(labels, real)
    if resume:
        x = Learned(*(resume.tensors[k].to(device, copy=True) for k in ("x", "velocity")))
        trace, strips = resume.tensors["trace"].clone(), list(resume.tensors["strips"])
    else:
        x = Learned.of(first_images(config.start, images, labels, real, whitening, seed).to(device))
        trace, strips = torch.zeros(config.steps, 1), [whitening.invert(x.value[:SHOWN]).cpu()]
    saved = time.perf_counter()
    for step in range(resume.steps if resume else 0, config.steps):
        net = make_net(config.net, classes, images.shape[-1], seed=derive_seed(seed, "network", step))
        net.to(device, memory_format=fast_layout(net)).requires_grad_(False)  # type: ignore[call-overload]
        gradient, total = torch.zeros_like(x.value), 0.0
        with compared_features(net, config.alpha) as features:
            for c, candidates in rows.items():
                chosen = torch.randperm(len(candidates), generator=generator(seed, "real", step, c))
                x_real = whitening(real.images[candidates[chosen[: config.real_batch]]].to(device))
                s = x.value[(labels == c).to(device)].requires_grad_(True)
                if config.augment == "dsa":
                    own = seed, "augmentation", step, c
                    x_real, seen = (dsa(v, generator(*own), shared=True) for v in (x_real, s))
                else:
                    seen = s
                with torch.no_grad():
                    f_real = features(x_real)
                loss = distance(f_real, features(seen))
                gradient[(labels == c).to(device)] = torch.autograd.grad(loss, s)[0]
                total += float(loss.detach())
        trace[step] = total
        x.step(gradient, config.lr, config.momentum)
        if (step + 1) % max(1, config.steps // STRIPS) == 0:
            strips.append(whitening.invert(x.value[:SHOWN]).cpu())
        callback.step(step)
        if time.perf_counter() - saved >= SAVE_SECONDS and step + 1 < config.steps:
            tensors = {"x": x.value, "velocity": x.velocity, "trace": trace, "strips": torch.stack(strips)}
            callback.save(State({k: v.cpu().clone() for k, v in tensors.items()}, {}, step + 1))
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


class DistributionMethod(Method):
    """Distribution matching as a stage of a run."""

    config = DistributionMatching

    def resolve(self, stage: DistributionMatching, context: Context) -> DistributionMatching:
        make_net(stage.net, context.classes or 2, context.side, seed=0)  # complains of an unknown or too deep one
        return stage

    def needs(self, stage: DistributionMatching) -> Needs:
        return Needs(teachers=False, real_images=True)

    def run(
        self,
        batch: Batch,
        stage: DistributionMatching,
        resources: Resources,
        *,
        seed: int,
        resume: State | None = None,
        callback: Callback | None = None,
    ) -> Refined:
        if resources.real is None:
            raise InputError("distribution matches real train images; give them as `Resources.real`")
        return refine(
            batch.images,
            batch.labels,
            stage,
            resources.real,
            classes=resources.classes,
            seed=derive_seed(seed, "distribution"),
            device=resources.device,
            resume=resume,
            callback=callback,
        )

    def brief(self, stage: DistributionMatching) -> DistributionMatching:
        return dataclasses.replace(stage, steps=min(stage.steps, 4))

    def cost(self, stage: DistributionMatching, context: Context) -> Cost:
        return Cost(stage.steps, None)
