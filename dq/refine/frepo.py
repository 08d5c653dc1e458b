"""FRePo: images and labels learned through ridge regression on features.

Zhou, Nezhadarya and Ba, "Dataset Distillation using Neural Feature Regression", NeurIPS 2022, arXiv 2206.00719; with
the settings of the released code. Its loss is in `dq.refine.ridge`, its optimizer in `dq.refine.lamb`, its networks in
`dq.networks.online_pool`, its preprocessing in `dq.data.zca`. Departures: regressions are in float64, images may start
from drawn ones, channel statistics are measured, every random number is seeded; `mode=latent` is not in the paper.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dq.config.refinement import BUDGETS, FRePo
from dq.core.errors import InputError
from dq.core.plain import PlainDict
from dq.core.seeds import derive_seed, generator
from dq.data.regression_labels import centered_targets, first_labels, probabilities_to_labels
from dq.data.zca import Whitening, fit_whitening, is_gray, stride_of
from dq.networks.online_pool import OnlinePool, PoolSettings
from dq.networks.teacher import Teacher, pooled_logits
from dq.refine.held_out import HeldOut, check_steps, held_out_accuracy, label_temperature, split_off
from dq.refine.inputs import check_set
from dq.refine.lamb import Lamb, cosine_lr
from dq.refine.method import Batch, Context, Cost, Method, Needs, RealImages, Refined, Resources, Session, State
from dq.refine.optimize import SHOWN
from dq.refine.record import Record
from dq.refine.rendering import Rendering
from dq.refine.ridge import (
    MetaGradient,
    Objective,
    duplicates,
    krr_loss,
    meta_gradient,
    temperature_cross_entropy,
)
from dq.refine.starts import first_values, one_channel

TERMS = ("krr_loss", "label_margin", "condition", "ridge")  # columns of the trace
LARGEST_SIDE = 128  # px; whitening needs a matrix of all pairs of pixels of a quarter, and features grow with the side
FLIP_BELOW = 1000  # images of the set; the released code leaves mirror images out of larger ones for their cost
JITTER = 0.01  # of whitened pixels, or of the std of latents, of images that are copies of others
HELD_NUMBERS = 1 << 28  # of whitened real images that are held in memory


def resolve(config: FRePo, context: Context) -> FRePo:
    """Fill in steps, lr and architectures.

    Raises:
        InputError: for images that are too large, or a single class.
    """
    if context.side > LARGEST_SIDE:
        raise InputError(
            f"frepo takes images of at most {LARGEST_SIDE} px, not {context.side}: it whitens by a matrix of all "
            "pairs of pixels and regresses on unpooled features; set source.image_size, or refine with fadrm or teddy"
        )
    if context.classes is not None and context.classes < 2:
        raise InputError("frepo regresses on labels and needs at least two classes, but there is one")
    steps, lr = BUDGETS[config.budget]
    if config.whiten is not False:
        stride_of(context.side)
    depth = 3 + (context.side >= 64) + (context.side >= 128)
    nets = config.nets or (f"frepoconv{depth}",)
    return dataclasses.replace(config, steps=config.steps or steps, lr=config.lr or lr, nets=nets)


@dataclass(frozen=True)
class RealBatches:
    """Batches of whitened real images in a new order every epoch."""

    real: RealImages
    whitening: Whitening
    targets: Tensor  # (N, C)
    size: int
    seed: int
    whitened: Tensor | None  # (N, 3, S, S) on the device, if they fit
    orders: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # (N,) rows of the present epoch

    @staticmethod
    def of(real: RealImages, whitening: Whitening, classes: int, size: int, seed: int) -> RealBatches:
        device = whitening.mean.device
        whitened = None
        if real.images.numel() <= HELD_NUMBERS:
            whitened = torch.cat([whitening(part.to(device)) for part in real.images.split(1000)])
        targets = centered_targets(real.labels, classes).to(device)
        return RealBatches(real, whitening, targets, min(size, len(targets)), seed, whitened)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) and targets (B, C) of a step; incomplete batches are dropped."""
        per_epoch = len(self.targets) // self.size
        epoch, i = divmod(step, per_epoch)
        if epoch not in self.orders:
            self.orders.clear()
            self.orders[epoch] = torch.randperm(len(self.targets), generator=generator(self.seed, "real batch", epoch))
        rows = self.orders[epoch][i * self.size : (i + 1) * self.size]
        index = rows.to(self.targets.device)
        if self.whitened is not None:
            return self.whitened[index], self.targets[index]
        return self.whitening(self.real.images[rows].to(index.device)), self.targets[index]


def start_labels(config: FRePo, images: Tensor, labels: Tensor, classes: int, teachers: Sequence[Teacher]) -> Tensor:
    """First labels (n, C), scaled as released: classes, or teachers' probabilities."""
    if config.first_labels == "teachers":
        return probabilities_to_labels(pooled_logits(teachers, images).softmax(1))
    return first_labels(centered_targets(labels, classes))


def refine(batch: Batch, config: FRePo, resources: Resources, session: Session | None = None) -> Refined:
    """Learn the images and labels of a set by FRePo.

    A pure function of its arguments. In every step, with a network f of the pool:

        A = f(X) f(X)^T + ridge s I,  P = f(X_real) f(X)^T A^-1 Y,  L = mean 1/2 |P - Y_real|^2 - label margin

    (or cross-entropy of softmax(P / temperature) with `outer_loss=ce_temp`). LAMB moves X, or z of X =
    whiten(resize(decode(z))) with `mode=latent`, and Y along its gradient; then f is trained by a step, or replaced.

    Args:
        batch: the whole set, with weights in the regression and in the networks' training for `config.weighted`.
        config: settings; what is None is filled in as `resolve` says.
        resources: the train images; teachers, with `first_labels=teachers`; and the codec, with `mode=latent`.
        session: seed, state to resume from and callbacks.

    Returns:
        Images of the same shape, whose pixels may leave [0, 1] with `mode=pixel`, and regression labels.

    Raises:
        InputError: for settings or images that do not fit.
        RunError: if features, images or labels stop being finite numbers.
    """
    session = session or Session()
    problem = _problem(batch, config, resources, session.seed)
    config, pool, rendering = problem.config, problem.pool, problem.rendering
    steps, weights, learns = config.steps or 0, problem.objective.weights, problem.objective.learn_images
    x, y, record = _resumed(problem, session.resume) if session.resume else _start(problem, batch, resources)
    tested = check_steps(steps, config.checks)
    for step in range(session.resume.steps if session.resume else 0, steps):
        lr, i = cosine_lr(step, steps, config.lr or 0.0, config.lr_floor), pool.pick(step)
        g = _gradient(problem, x.value, y.value, i, step)
        record.trace[step, :3] = torch.stack([g.krr, g.margin, g.condition])
        record.trace[step, 3].fill_(g.ridge)  # no copy from the host
        if g.images is not None:
            x.step(one_channel(g.images) if problem.gray and config.mode == "pixel" else g.images, lr)
        if config.learn_labels:
            y.step(g.labels, lr)
        pool.advance(i, rendering.images(x.value), y.value, step, weights)  # on the updated set, as released
        record.add_picture(step, rendering, x.value)
        if problem.held_out is not None and step + 1 in tested:
            shown, check_seed = rendering.images(x.value), derive_seed(session.seed, "check", step)
            score = held_out_accuracy(shown, y.value, problem.held_out, seed=check_seed)
            record.add_check(step + 1, score, {"best.x": x.value.clone(), "best.y": y.value.clone()})
        session.step(step)
        if record.save_due(step + 1):
            session.save(_state(x, y, record, pool, step + 1))
    last_x, last_y = record.best.get("best.x", x.value), record.best.get("best.y", y.value)
    return Refined(
        rendering.pixels(last_x).cpu() if learns else batch.images,
        record.trace.float().cpu(),
        TERMS,
        record.blocks(),
        soft_labels=last_y.cpu(),
        label_kind="regression",
        bounded=config.mode != "pixel",
        uniform_weights=not config.weighted,  # learned labels absorb importance
        facts=record.facts | _final_facts(problem, x.value, last_x, last_y),
        preprocessing=rendering.whitening.to("cpu").tensors(),
    )


def _final_facts(problem: _Problem, end: Tensor, x: Tensor, y: Tensor) -> PlainDict:
    """Facts of the last images, and the fitted temperature of labels y."""
    config, pool = problem.config, problem.pool
    facts: PlainDict = {"networks_replaced": sum(m.generation for m in pool.members)}
    facts["end_std"] = round(float(problem.rendering.images(end).std()), 4)
    if problem.held_out is not None and config.fit_temperature:
        options: PlainDict = {"ridge": config.ridge, "weights": problem.objective.weights}
        temperature = label_temperature(pool, problem.rendering.images(x), y, problem.held_out, **options)
        facts["label_temperature"] = round(temperature, 6)
    return facts


@dataclass(frozen=True)
class _Problem:
    """What is the same in all steps on a set."""

    config: FRePo  # resolved
    real: RealImages  # all train images
    batches: RealBatches  # without those that are held out
    held_out: HeldOut | None  # for checks and the temperature of labels
    rendering: Rendering
    pool: OnlinePool
    objective: Objective
    gray: bool  # the three channels of real images are one
    classes: int
    device: torch.device
    seed: int


def _problem(batch: Batch, config: FRePo, resources: Resources, seed: int) -> _Problem:
    images, classes, device, real = batch.images, resources.classes, resources.device, resources.real
    if device.type == "mps":
        raise InputError("frepo solves in float64, which mps does not have; run on the CPU with --cpu")
    if real is None:
        raise InputError("frepo predicts real train images; give them as `Resources.real`")
    check_set(images, batch.labels, classes, real, batch.weights if config.weighted else None)
    config = resolve(config, Context(images.shape[-1], len(resources.teachers), classes=classes))
    if config.first_labels == "teachers" and not resources.teachers:
        raise InputError("first_labels=teachers needs teachers; give some, or set first_labels=classes")
    if len(real.images) == 0:
        raise InputError("frepo predicts real train images, but there are none; check the train split")
    whitening = resources.once(f"whitening {config.whiten}", lambda: fit_whitening(real.images, zca=config.whiten)).to(
        device
    )
    rendering = Rendering.of("frepo", config.mode, whitening, resources.codec, config.chunk)
    holds_out = config.checks or config.fit_temperature
    predicted, held_out = split_off(real, config.held_out) if holds_out else (real, None)
    batches = RealBatches.of(predicted, whitening, classes, config.real_batch, seed)
    pool = OnlinePool(
        config.nets,
        classes,
        images.shape[-1],
        PoolSettings(config.pool_size, config.max_online, config.online_lr, config.online_batch, config.norm),
        seed=seed,
        device=device,
    )
    gray = is_gray(real.images)
    return _Problem(
        config,
        real,
        batches,
        None if held_out is None else HeldOut(held_out, whitening, config.nets[0], config.check_nets),
        rendering,
        pool,
        _objective(config, batch, rendering, gray, device),
        gray,
        classes,
        device,
        seed,
    )


def _objective(config: FRePo, batch: Batch, rendering: Rendering, gray: bool, device: torch.device) -> Objective:
    outer_loss: Callable[[Tensor, Tensor], Tensor] = krr_loss
    if config.outer_loss == "ce_temp":
        outer_loss = functools.partial(temperature_cross_entropy, temperature=config.outer_temperature)
    weights = None
    if config.weighted and batch.weights is not None:
        weights = (batch.weights / batch.weights.mean()).to(device)
    return Objective(
        chunk=config.chunk,
        flip=config.flip if config.flip is not None else len(batch.images) < FLIP_BELOW and not gray,
        margin_weight=config.label_margin if config.learn_labels else 0.0,
        ridge=config.ridge,
        weights=weights,
        learn_images=config.mode != "labels_only",
        render=None if rendering.codec is None else rendering,
        outer_loss=outer_loss,
    )


def _gradient(problem: _Problem, x: Tensor, y: Tensor, i: int, step: int) -> MetaGradient:
    """The gradient of a step, with network i of the pool."""
    x_real, y_real = problem.batches(step)
    with problem.pool.features(i) as features:
        with torch.no_grad():
            parts = x_real.split(problem.config.chunk or len(x_real))
            f_real = torch.cat([features(part) for part in parts])
        return meta_gradient(features, x, y, f_real, y_real, problem.objective)


def _start(problem: _Problem, batch: Batch, resources: Resources) -> tuple[Lamb, Lamb, Record]:
    """Images, or latents, and labels at the start, and the record."""
    config, rendering, labels, device = problem.config, problem.rendering, batch.labels, problem.device
    learns = problem.objective.learn_images
    start = config.start if learns else "drawn"
    first = first_values(start, batch.images, labels, problem.real, rendering, problem.seed).to(device)
    facts: PlainDict = {"whitening": rendering.whitening.summary(), "flip": problem.objective.flip}
    facts["nets"] = list(config.nets)
    if rendering.codec is not None:
        facts["latents"] = list(first.shape[1:])
    start_std = float(rendering.images(first).std())
    facts |= {"start_std": round(start_std, 4), "copies": 0}  # 0.44 for real images of CIFAR-10
    if learns:
        first, facts["copies"] = _apart(first, rendering, problem.pool, problem.seed)
    y = start_labels(config, batch.images, labels, problem.classes, resources.teachers).to(device)
    trace = torch.zeros(config.steps or 0, len(TERMS), device=device)
    return Lamb.of(first), Lamb.of(y), Record(trace, [rendering.pixels(first[:SHOWN]).cpu()], facts)


def _apart(values: Tensor, rendering: Rendering, pool: OnlinePool, seed: int) -> tuple[Tensor, int]:
    """Add noise to images, or latents, that nearly copy others; and their number."""
    with pool.features(0) as features, torch.no_grad():
        copied = duplicates(torch.cat([features(part) for part in rendering.images(values).split(1000)]))
    size = JITTER if rendering.codec is None else JITTER * float(values.std())
    noise = size * torch.randn(values.shape, generator=generator(seed, "jitter")).to(values.device)
    return torch.where(copied.view(-1, 1, 1, 1), values + noise, values), int(copied.sum())


def _state(x: Lamb, y: Lamb, record: Record, pool: OnlinePool, steps: int) -> State:
    tensors, pool_facts = pool.state()
    tensors = {f"pool.{k}": v for k, v in tensors.items()} | record.tensors(x.tensors("x") | y.tensors("y"))
    return State(tensors, {"pool": pool_facts, "facts": dict(record.facts), "lamb": [x.steps, y.steps]}, steps)


def _resumed(problem: _Problem, state: State) -> tuple[Lamb, Lamb, Record]:
    """What `_start` gives, and the pool, from a saved state."""
    tensors, device = state.tensors, problem.device
    in_pool = {k.removeprefix("pool."): v for k, v in tensors.items() if k.startswith("pool.")}
    problem.pool.restore(in_pool, state.facts["pool"])
    x, y = (Lamb.restored(tensors, n, k, device) for n, k in zip("xy", state.facts["lamb"], strict=True))
    record = Record.restored(tensors, state.facts["facts"], device)
    record.trace = record.trace.to(device)
    return x, y, record


class FrepoMethod(Method):
    """FRePo as a stage of a run."""

    config = FRePo

    def resolve(self, stage: FRePo, context: Context) -> FRePo:
        return resolve(stage, context)

    def needs(self, stage: FRePo) -> Needs:
        return Needs(teachers=stage.first_labels == "teachers", real_images=True, codec=stage.mode == "latent")

    def run(self, batch: Batch, stage: FRePo, resources: Resources, session: Session) -> Refined:
        return refine(batch, stage, resources, session.derived("frepo"))

    def brief(self, stage: FRePo) -> FRePo:
        # whitening is fitted once and costs no step
        steps = min(stage.steps or 4, 4)
        return dataclasses.replace(
            stage, steps=steps, whiten=False, first_labels="classes", checks=0, fit_temperature=False
        )

    def cost(self, stage: FRePo, context: Context) -> Cost:
        return Cost(stage.steps or 0, None, stage.checks * stage.check_nets)
