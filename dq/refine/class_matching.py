"""Learning the images of a set by SGD so that each class resembles real images of its class in some measure, which
`dq.refine.distribution_matching`, `dq.refine.gradient_matching` and `dq.refine.spectral_matching` define."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dq.config.condensation import Condensation
from dq.core.errors import InputError, RunError
from dq.core.seeds import derive_seed, generator
from dq.data.augment import dsa
from dq.data.zca import Whitening, fit_whitening, is_gray
from dq.diffusion.image_codec import ImageCodec
from dq.networks.trajectories import Experts
from dq.refine.held_out import HARD_LOGIT, check_steps, classic_accuracy, divide, record_check, split_off
from dq.refine.inputs import check_set
from dq.refine.method import Batch, Callback, Context, Cost, Method, Needs, RealImages, Refined, Resources, State
from dq.refine.momentum import Learned
from dq.refine.optimize import SAVE_SECONDS, SHOWN, STRIPS
from dq.refine.rendering import Rendering
from dq.refine.starts import first_values, one_channel, rows_by_class

TERMS = ("matching_loss",)  # columns of the trace


@dataclass(frozen=True)
class ClassBatches:
    """Real and learned images of a class as networks see them, augmented alike."""

    real: RealImages
    rows: dict[int, Tensor]  # of each class in `real`
    whitening: Whitening
    size: int
    augmented: bool
    seed: int

    def images(self, c: int, step: int, device: torch.device) -> Tensor:
        """Real images (B, 3, S, S) of class c, drawn without replacement."""
        order = torch.randperm(len(self.rows[c]), generator=generator(self.seed, "real batch", step, c))
        images = self.real.images[self.rows[c][order[: self.size]]]
        return self.augment(self.whitening(images.to(device)), c, step)

    def augment(self, x: Tensor, c: int, step: int) -> Tensor:
        """Images of class c behind the operation of a step, which is the same for real and learned ones."""
        return dsa(x, generator(self.seed, "augment", step, c), shared=True) if self.augmented else x


# loss () and gradient (n, 3, S, S) of the images at a step; may change the tensors that it carries from step to step
Gradient = Callable[[Tensor, int, dict[str, Tensor]], tuple[Tensor, Tensor]]


def class_gradients(
    loss_of: Callable[[int, Tensor], Tensor], x: Tensor, rows: dict[int, Tensor], shared: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The sum over classes of a loss, (), and its gradients, with the graph of one class in memory at a time.

    Args:
        loss_of: loss () of a class and its images (m, 3, S, S).
        x: (n, 3, S, S) images.
        rows: of each class in `x`.
        shared: tensors of which the losses of all classes are functions.

    Returns:
        The sum, its gradient with respect to `x`, (n, 3, S, S), and those with respect to `shared`.
    """
    total, g = torch.zeros((), device=x.device), torch.zeros_like(x)
    g_shared = [torch.zeros_like(v) for v in shared]
    for c, class_rows in rows.items():
        part = x[class_rows].requires_grad_(True)
        with torch.enable_grad():
            loss = loss_of(c, part)
        g[class_rows], *more = torch.autograd.grad(loss, [part, *shared])
        g_shared = [a + b for a, b in zip(g_shared, more, strict=True)]
        total += loss.detach()
    return total, g, g_shared


def learn_images(
    images: Tensor,
    labels: Tensor,
    config: Condensation,
    steps: int,
    real: RealImages,
    gradient_of: Callable[[ClassBatches], Gradient],
    *,
    classes: int,
    weights: Tensor | None = None,
    experts: Experts | None = None,
    codec: ImageCodec | None = None,
    seed: int,
    device: torch.device | str = "cpu",
    resume: State | None = None,
    callback: Callback | None = None,
) -> Refined:
    """Move the images of a set along a gradient by SGD; a pure function of its arguments.

    With `mode=latent` the latents that they are decoded from move along the gradient pulled back through the decoder.

    Args:
        images: (n, 3, S, S) float32 in [0, 1], the whole set.
        labels: (n,) classes.
        config: settings that the method has resolved.
        steps: updates of the images.
        real: the train images.
        gradient_of: the gradient, for batches of real images.
        experts: whose preprocessing the images have, and whose held-out images serve for checks; None: mean and std,
            and a share `config.held_out`.
        codec: whose latents are learned, with `mode=latent`.
        device: where all of it happens.

    Returns:
        Images of the same shape, whose pixels may leave [0, 1] with `mode=pixel`.

    Raises:
        InputError: if a class of the set has no train image, or latents are learned without a codec.
        RunError: if the images stop being finite numbers.
    """
    check_set(images, labels, classes, real, weights if config.weighted else None)
    device, callback = torch.device(device), callback or Callback()
    seen, held = (real, None) if not config.checks else _divided(real, config, experts)
    whitening = (experts.whitening if experts else fit_whitening(real.images, zca=False)).to(device)
    rendering = Rendering.of(config.stage, config.mode, whitening, codec, config.chunk)
    # what a decoder makes of gray images need not be gray, so that the three channels count apart
    gray = config.mode == "pixel" and is_gray(real.images)
    rows = rows_by_class(labels, seen)
    batches = ClassBatches(seen, rows, whitening, config.real_batch, config.augment == "dsa", seed)
    gradient = gradient_of(batches)
    carried: dict[str, Tensor] = {}
    best: Tensor | None = None
    if resume:
        t = {k: v.to(device, copy=True) for k, v in resume.tensors.items()}
        x, best = Learned(t["x.value"], t["x.velocity"]), t.get("best")
        trace, strips, facts = t["trace"].cpu(), list(t["strips"].cpu()), dict(resume.facts)
        carried = {k.removeprefix("carried."): v for k, v in t.items() if k.startswith("carried.")}
    else:
        x = Learned.of(first_values(config.start, images, labels, seen, rendering, seed).to(device))
        trace, strips = torch.zeros(steps, len(TERMS)), [rendering.pixels(x.value[:SHOWN]).cpu()]
        facts = {"whitening": whitening.summary(), "net": config.net}
        facts |= {} if config.mode == "pixel" else {"latents": list(x.value.shape[1:])}
    tested = check_steps(steps, config.checks)
    saved = time.perf_counter()
    for step in range(resume.steps if resume else 0, steps):
        loss, g = gradient(rendering.images(x.value), step, carried)
        trace[step] = loss.cpu()
        if not bool(torch.isfinite(g).all()):
            raise RunError(f"the gradient of {config.stage} is no finite number after {step} steps; lower its lr")
        x.step(rendering.pull_back(x.value, one_channel(g) if gray else g), config.lr, config.momentum)
        if (step + 1) % max(1, steps // STRIPS) == 0:
            strips.append(rendering.pixels(x.value[:SHOWN]).cpu())
        if held is not None and step + 1 in tested:
            score = classic_accuracy(
                rendering.images(x.value),
                HARD_LOGIT * F.one_hot(labels, classes).float().to(device),
                held,
                whitening,
                net=config.net,
                epochs=config.check_epochs,
                augment=config.augment,
                nets=config.check_nets,
                seed=derive_seed(seed, step),
            )
            if record_check(facts, step + 1, score):
                best = x.value
        callback.step(step)
        if time.perf_counter() - saved >= SAVE_SECONDS and step + 1 < steps:
            tensors = {"x.value": x.value, "x.velocity": x.velocity, "trace": trace, "strips": torch.stack(strips)}
            tensors |= {f"carried.{k}": v for k, v in carried.items()} | ({} if best is None else {"best": best})
            callback.save(State({k: v.cpu().clone() for k, v in tensors.items()}, dict(facts), step + 1))
            saved = time.perf_counter()
    return Refined(
        rendering.pixels(x.value if best is None else best).cpu(),
        trace,
        TERMS,
        torch.stack(strips).clamp(0, 1),
        bounded=config.mode == "latent",
        uniform_weights=not config.weighted,
        facts=facts,
        preprocessing=whitening.to("cpu").tensors(),
    )


def _divided(real: RealImages, config: Condensation, experts: Experts | None) -> tuple[RealImages, RealImages]:
    """Train images to compare with, and held-out ones."""
    if experts is None:
        return split_off(real, config.held_out)
    return divide(real, experts.held_out_rows(real.labels))


def image_weights(config: Condensation, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """How much each image counts, (n,), 1 unless the settings ask for its weight in the set; and its share in its
    class, (n,), which sums to 1 in every class."""
    counted = weights.float() if config.weighted and weights is not None else torch.ones(len(labels))
    totals = torch.zeros(int(labels.max()) + 1).index_add(0, labels, counted)
    return counted, counted / totals[labels]


class ClassMatchingMethod(Method):
    """A method that matches classes, as a stage of a run. A subclass names its settings and its function."""

    learn: Callable[..., Refined]  # images, labels, settings, real images -> result

    def needs(self, stage: Any) -> Needs:
        return Needs(teachers=False, real_images=True, codec=stage.mode == "latent")

    def brief(self, stage: Any) -> Any:
        return dataclasses.replace(stage, steps=min(stage.steps, 2), start="drawn", checks=0)

    def cost(self, stage: Any, context: Context) -> Cost:
        return Cost(stage.steps, None, stage.checks * stage.check_nets)

    def options(self, resources: Resources) -> dict[str, Any]:
        """Further arguments of `learn`."""
        return {}

    def run(
        self,
        batch: Batch,
        stage: Any,
        resources: Resources,
        *,
        seed: int,
        resume: State | None = None,
        callback: Callback | None = None,
    ) -> Refined:
        if resources.real is None:
            raise InputError(f"{stage.stage} compares with real images; give them as `Resources.real`")
        return self.learn(
            batch.images,
            batch.labels,
            stage,
            resources.real,
            classes=resources.classes,
            weights=batch.weights,
            codec=resources.codec,
            **self.options(resources),
            seed=derive_seed(seed, stage.stage),
            device=resources.device,
            resume=resume,
            callback=callback,
        )
