"""Learning the images of a set by SGD so that each class resembles real images of its class in some measure, which
`dq.refine.distribution_matching` and `dq.refine.gradient_matching` define."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dq.config.condensation import Condensation
from dq.config.protocols import student_config
from dq.core.errors import RunError
from dq.core.seeds import derive_seed, generator
from dq.data.augment import dsa
from dq.data.zca import Whitening, fit_whitening, is_grey
from dq.refine.held_out import mean_accuracy, split_off
from dq.refine.inputs import check_set
from dq.refine.method import Callback, RealImages, Refined, State
from dq.refine.momentum import Learned
from dq.refine.optimize import SHOWN
from dq.refine.starts import first_images, one_channel, rows_by_class

TERMS = ("matching_loss",)  # columns of the trace
SAVE_SECONDS = 60.0  # between two states to go on from
STRIPS = 4  # pictures of the first images, spread over the steps
HARD_LOGIT = 20.0  # of an image's class: softmax gives it all but 1e-8


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
    seed: int,
    device: torch.device | str = "cpu",
    resume: State | None = None,
    callback: Callback | None = None,
) -> Refined:
    """Move the images of a set along a gradient by SGD; a pure function of its arguments.

    Args:
        images: (n, 3, S, S) float32 in [0, 1], the whole set.
        labels: (n,) classes.
        config: settings that the method has resolved.
        steps: updates of the images.
        real: the train images.
        gradient_of: the gradient, for batches of real images.
        device: where all of it happens.

    Returns:
        Images of the same shape, whose pixels may leave [0, 1].

    Raises:
        InputError: if a class of the set has no train image.
        RunError: if the images stop being finite numbers.
    """
    check_set(images, labels, classes, real, weights if config.weighted else None)
    device, callback = torch.device(device), callback or Callback()
    seen, held = split_off(real, config.held_out) if config.checks else (real, None)
    whitening, grey = fit_whitening(real.images, zca=False).to(device), is_grey(real.images)
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
        first = first_images(config.start, images, labels, seen, whitening.to("cpu"), seed).to(device)
        x = Learned.of(first)
        trace, strips = torch.zeros(steps, len(TERMS)), [whitening.invert(first[:SHOWN]).cpu()]
        facts = {"whitening": whitening.summary(), "net": config.net}
    check_steps = {-(-steps * i // config.checks) for i in range(1, config.checks + 1)} if config.checks else ()
    saved = time.perf_counter()
    for step in range(resume.steps if resume else 0, steps):
        loss, g = gradient(x.value, step, carried)
        trace[step] = loss.cpu()
        if not bool(torch.isfinite(g).all()):
            raise RunError(f"the gradient of {config.stage} is no finite number after {step} steps; lower its lr")
        x.step(one_channel(g) if grey else g, config.lr, config.momentum)
        if (step + 1) % max(1, steps // STRIPS) == 0:
            strips.append(whitening.invert(x.value[:SHOWN]).cpu())
        if held is not None and step + 1 in check_steps:
            score = _check(x.value, labels, classes, config, held, whitening, derive_seed(seed, step))
            if score > max((s for _, s in facts.setdefault("checks", [])), default=-1.0):
                best = x.value
            facts["checks"] = [*facts["checks"], [step + 1, round(score, 5)]]
        callback.step(step)
        if time.perf_counter() - saved >= SAVE_SECONDS and step + 1 < steps:
            tensors = {"x.value": x.value, "x.velocity": x.velocity, "trace": trace, "strips": torch.stack(strips)}
            tensors |= {f"carried.{k}": v for k, v in carried.items()} | ({} if best is None else {"best": best})
            callback.save(State({k: v.cpu().clone() for k, v in tensors.items()}, dict(facts), step + 1))
            saved = time.perf_counter()
    return Refined(
        whitening.invert(x.value if best is None else best).cpu(),
        trace,
        TERMS,
        torch.stack(strips).clamp(0, 1),
        bounded=False,
        uniform_weights=not config.weighted,
        facts=facts,
        preprocessing=whitening.to("cpu").tensors(),
    )


def _check(
    x: Tensor, labels: Tensor, classes: int, config: Condensation, held: RealImages, whitening: Whitening, seed: int
) -> float:
    """Mean accuracy on held-out train images of networks trained on the set by the protocol `classic`."""
    spec: dict[str, Any] = {"protocol": "classic", "net": config.net, "labels": "fixed", "augment": config.augment}
    spec |= {"epochs": config.check_epochs, "dtype": "float32"}
    student = student_config(spec, ipc=str(max(1, len(x) // classes)), classes=classes, image_size=x.shape[-1])
    logits = HARD_LOGIT * F.one_hot(labels, classes).float().to(x.device)
    return mean_accuracy(x, logits, held, whitening, student, nets=config.check_nets, seed=seed)


def class_weights(labels: Tensor, weights: Tensor) -> Tensor:
    """Share of each image in its class, (n,), which sum to 1 in every class, of weights (n,)."""
    totals = torch.zeros(int(labels.max()) + 1).index_add(0, labels, weights)
    return weights / totals[labels]
