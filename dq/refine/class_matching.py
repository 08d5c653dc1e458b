"""Learning images by SGD to match real images of each class.

`dq.refine.distribution_matching`, `dq.refine.gradient_matching` and `dq.refine.spectral_matching` define the distance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dq.config.condensation import Condensation
from dq.core.errors import InputError, RunError
from dq.core.plain import PlainDict
from dq.core.seeds import derive_seed, generator
from dq.data.augment import dsa
from dq.data.zca import Whitening, fit_whitening, is_gray
from dq.networks.trajectories import Experts
from dq.refine.held_out import HARD_LOGIT, HeldOut, check_steps, classic_accuracy, divide, split_off
from dq.refine.inputs import check_set
from dq.refine.method import Batch, Context, Cost, Method, Needs, RealImages, Refined, Resources, Session, State
from dq.refine.momentum import Learned
from dq.refine.optimize import SHOWN
from dq.refine.record import Record
from dq.refine.rendering import Rendering
from dq.refine.starts import first_values, one_channel, rows_by_class

TERMS = ("matching_loss",)  # columns of the trace


@dataclass(frozen=True)
class ClassBatches:
    """Batches of real images by class, and the augmentation of a step."""

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
        """Augment images of class c, real and learned ones alike in a step."""
        return dsa(x, generator(self.seed, "augment", step, c), shared=True) if self.augmented else x


# loss () and gradient (n, 3, S, S) of the images at a step; may change the tensors that it carries from step to step
Gradient = Callable[[Tensor, int, dict[str, Tensor]], tuple[Tensor, Tensor]]


def class_gradients(
    loss_of: Callable[[int, Tensor], Tensor], x: Tensor, rows: dict[int, Tensor], shared: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Sum a loss and its gradients over classes, one graph in memory.

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
    batch: Batch,
    config: Condensation,
    steps: int,
    resources: Resources,
    gradient_of: Callable[[ClassBatches], Gradient],
    session: Session,
) -> Refined:
    """Learn the images of a set by SGD along a gradient.

    A pure function of its arguments. With `mode=latent` the latents that they are decoded from move along the gradient
    pulled back through the decoder.

    Args:
        batch: the whole set, with weights for `config.weighted`.
        config: settings that the method has resolved.
        steps: updates of the images.
        resources: the train images and, with `mode=latent`, the codec. With experts, the images have their
            preprocessing, and checks are on their held-out images; else mean and std, and a share `config.held_out`.
        gradient_of: the gradient, for batches of real images.
        session: seed, state to resume from and callbacks.

    Returns:
        Images of the same shape, whose pixels may leave [0, 1] with `mode=pixel`.

    Raises:
        InputError: if there are no train images, or none of a class, or latents are learned without a codec.
        RunError: if the images stop being finite numbers.
    """
    problem = _problem(batch, config, resources, session)
    gradient, rendering = gradient_of(problem.batches), problem.rendering
    x, carried, record = _start(problem, batch, steps) if session.resume is None else _resumed(problem, session.resume)
    tested = check_steps(steps, config.checks)
    for step in range(session.resume.steps if session.resume else 0, steps):
        loss, g = gradient(rendering.images(x.value), step, carried)
        record.trace[step] = loss.cpu()
        if not bool(torch.isfinite(g).all()):
            raise RunError(f"the gradient of {config.stage} is no finite number after {step} steps; lower its lr")
        g = one_channel(g) if problem.gray else g
        x.step(rendering.pull_back(x.value, g), config.lr, config.momentum)
        record.add_picture(step, rendering, x.value)
        if step + 1 in tested:
            score = _check(problem, x.value, batch.labels, derive_seed(session.seed, step))
            record.add_check(step + 1, score, {"best": x.value})
        session.step(step)
        if record.save_due(step + 1):
            learned = x.tensors("x") | {f"carried.{k}": v for k, v in carried.items()}
            session.save(State(record.tensors(learned), dict(record.facts), step + 1))
    return Refined(
        rendering.pixels(record.best.get("best", x.value)).cpu(),
        record.trace,
        TERMS,
        record.blocks(),
        bounded=config.mode == "latent",
        uniform_weights=not config.weighted,
        facts=record.facts,
        preprocessing=rendering.whitening.to("cpu").tensors(),
    )


@dataclass(frozen=True)
class _Problem:
    """What is the same in all steps on a set."""

    config: Condensation
    batches: ClassBatches
    rendering: Rendering
    held_out: HeldOut | None  # None: no checks
    gray: bool  # the three channels are one
    classes: int
    device: torch.device


def _problem(batch: Batch, config: Condensation, resources: Resources, session: Session) -> _Problem:
    real, experts, device = resources.real, resources.experts, resources.device
    if real is None:
        raise InputError(f"{config.stage} compares with real images; give them as `Resources.real`")
    check_set(batch.images, batch.labels, resources.classes, real, batch.weights if config.weighted else None)
    compared, held_out = (real, None) if not config.checks else _divided(real, config, experts)
    whitening = (experts.whitening if experts else fit_whitening(real.images, zca=False)).to(device)
    rendering = Rendering.of(config.stage, config.mode, whitening, resources.codec, config.chunk)
    rows, augmented = rows_by_class(batch.labels, compared), config.augment == "dsa"
    return _Problem(
        config,
        ClassBatches(compared, rows, whitening, config.real_batch, augmented, session.seed),
        rendering,
        None if held_out is None else HeldOut(held_out, whitening, config.net, config.check_nets),
        # what a decoder makes of gray images need not be gray, so that the three channels count apart
        gray=config.mode == "pixel" and is_gray(real.images),
        classes=resources.classes,
        device=device,
    )


def _start(problem: _Problem, batch: Batch, steps: int) -> tuple[Learned, dict[str, Tensor], Record]:
    """First images, or latents, the tensors carried along, and the record."""
    config, rendering, batches = problem.config, problem.rendering, problem.batches
    first = first_values(config.start, batch.images, batch.labels, batches.real, rendering, batches.seed)
    x = Learned.of(first.to(problem.device))
    facts: PlainDict = {"whitening": rendering.whitening.summary(), "net": config.net}
    facts |= {} if config.mode == "pixel" else {"latents": list(x.value.shape[1:])}
    pictures = [rendering.pixels(x.value[:SHOWN]).cpu()]
    return x, {}, Record(torch.zeros(steps, len(TERMS)), pictures, facts)


def _resumed(problem: _Problem, state: State) -> tuple[Learned, dict[str, Tensor], Record]:
    """What `_start` gives, from a saved state."""
    tensors, device = state.tensors, problem.device
    carried = {k: v.to(device, copy=True) for k, v in tensors.items() if k.startswith("carried.")}
    carried = {k.removeprefix("carried."): v for k, v in carried.items()}
    return Learned.restored(tensors, "x", device), carried, Record.restored(tensors, state.facts, device)


def _check(problem: _Problem, values: Tensor, labels: Tensor, seed: int) -> float:
    """Mean held-out accuracy of networks trained on the set."""
    assert problem.held_out is not None
    config, logits = problem.config, HARD_LOGIT * F.one_hot(labels, problem.classes).float().to(problem.device)
    options: PlainDict = {"epochs": config.check_epochs, "augment": config.augment}
    return classic_accuracy(problem.rendering.images(values), logits, problem.held_out, **options, seed=seed)


def _divided(real: RealImages, config: Condensation, experts: Experts | None) -> tuple[RealImages, RealImages]:
    """Train images to compare with, and held-out ones."""
    if experts is None:
        return split_off(real, config.held_out)
    return divide(real, experts.held_out_rows(real.labels))


def image_shares(config: Condensation, batch: Batch) -> tuple[Tensor, Tensor]:
    """Weights (n,) of images in the loss, and shares (n,) in their classes.

    Weights are 1 unless the settings ask for those in the set; shares sum to 1 in every class.
    """
    labels, weights = batch.labels, batch.weights if config.weighted else None
    counted = torch.ones(len(labels)) if weights is None else weights.float()
    totals = torch.zeros(int(labels.max()) + 1).index_add(0, labels, counted)
    return counted, counted / totals[labels]


def class_rows(labels: Tensor, device: torch.device) -> dict[int, Tensor]:
    """Rows of each class in a set."""
    return {c: (labels == c).nonzero()[:, 0].to(device) for c in labels.unique().tolist()}


class ClassMatchingMethod(Method):
    """A method that matches classes, with settings and function of a subclass."""

    refine: Callable[[Batch, Any, Resources, Session], Refined]

    def needs(self, stage: Any) -> Needs:
        return Needs(teachers=False, real_images=True, codec=stage.mode == "latent")

    def brief(self, stage: Any) -> Any:
        return dataclasses.replace(stage, steps=min(stage.steps, 2), start="drawn", checks=0)

    def cost(self, stage: Any, context: Context) -> Cost:
        return Cost(stage.steps, None, stage.checks * stage.check_nets)

    def run(self, batch: Batch, stage: Any, resources: Resources, session: Session) -> Refined:
        return self.refine(batch, stage, resources, session.derived(stage.stage))
