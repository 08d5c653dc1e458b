"""FRePo: images and labels learned by the gradient of a ridge regression on the features of a pool of networks.

Zhou, Nezhadarya and Ba, "Dataset Distillation using Neural Feature Regression", NeurIPS 2022, arXiv 2206.00719; with
the settings of the released code. Its loss is in `dq.refine.ridge`, its optimizer in `dq.refine.lamb`, its networks in
`dq.networks.online_pool`, its preprocessing in `dq.data.zca`. Departures: regressions are in float64, images may start
from drawn ones, channel statistics are measured, every random number is seeded; `mode=latent` is not in the paper.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dq.config.refinement import BUDGETS, FRePo
from dq.core.errors import InputError
from dq.core.seeds import derive_seed, generator
from dq.data.regression_labels import centered_targets, first_labels, probabilities_to_labels
from dq.data.zca import Whitening, fit_whitening, is_gray, stride_of
from dq.diffusion.image_codec import ImageCodec
from dq.networks.online_pool import OnlinePool, PoolSettings
from dq.networks.teacher import Teacher, pooled_logits
from dq.refine.held_out import check_steps, held_out_accuracy, label_temperature, record_check, split_off
from dq.refine.inputs import check_set
from dq.refine.lamb import Lamb, cosine_lr
from dq.refine.method import Batch, Callback, Context, Cost, Method, Needs, RealImages, Refined, Resources, State
from dq.refine.optimize import SAVE_SECONDS, SHOWN, STRIPS
from dq.refine.rendering import Rendering
from dq.refine.ridge import duplicates, krr_loss, meta_gradient, temperature_cross_entropy
from dq.refine.starts import first_values, one_channel

TERMS = ("krr_loss", "label_margin", "condition", "ridge")  # columns of the trace
LARGEST_SIDE = 128  # px; whitening needs a matrix of all pairs of pixels of a quarter, and features grow with the side
FLIP_BELOW = 1000  # images of the set; the released code leaves mirror images out of larger ones for their cost
JITTER = 0.01  # of whitened pixels, or of the std of latents, of images that are copies of others
HELD_NUMBERS = 1 << 28  # of whitened real images that are held in memory


def resolve(config: FRePo, context: Context) -> FRePo:
    """The settings with steps, lr and architectures filled in.

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
    """Batches of real images as networks see them: all of them in a new order every epoch."""

    real: RealImages
    whitening: Whitening
    targets: Tensor  # (N, C)
    size: int
    seed: int
    held: Tensor | None  # (N, 3, S, S) whitened on the device, if they fit
    orders: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # (N,) rows of the present epoch

    @staticmethod
    def of(real: RealImages, whitening: Whitening, classes: int, size: int, seed: int) -> RealBatches:
        device = whitening.mean.device
        held = None
        if real.images.numel() <= HELD_NUMBERS:
            held = torch.cat([whitening(part.to(device)) for part in real.images.split(1000)])
        targets = centered_targets(real.labels, classes).to(device)
        return RealBatches(real, whitening, targets, min(size, len(targets)), seed, held)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) and targets (B, C) of a step; the rest of an epoch that fills no batch is left out."""
        per_epoch = len(self.targets) // self.size
        epoch, i = divmod(step, per_epoch)
        if epoch not in self.orders:
            self.orders.clear()
            self.orders[epoch] = torch.randperm(len(self.targets), generator=generator(self.seed, "real batch", epoch))
        rows = self.orders[epoch][i * self.size : (i + 1) * self.size]
        there = rows.to(self.targets.device)
        x = self.held[there] if self.held is not None else self.whitening(self.real.images[rows].to(there.device))
        return x, self.targets[there]


def start_labels(config: FRePo, images: Tensor, labels: Tensor, classes: int, teachers: Sequence[Teacher]) -> Tensor:
    """Where the labels (n, C) begin: centered classes, or the teachers' probabilities, scaled as released."""
    if config.first_labels == "teachers":
        return probabilities_to_labels(pooled_logits(teachers, images).softmax(1))
    return first_labels(centered_targets(labels, classes))


def refine(
    images: Tensor,
    labels: Tensor,
    config: FRePo,
    real: RealImages,
    *,
    classes: int,
    weights: Tensor | None = None,
    teachers: Sequence[Teacher] = (),
    whitening: Whitening | None = None,
    codec: ImageCodec | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    resume: State | None = None,
    callback: Callback | None = None,
) -> Refined:
    """Learn a set's images and labels; a pure function of its arguments. In every step, with a network f of the pool:

        A = f(X) f(X)^T + ridge s I,  P = f(X_real) f(X)^T A^-1 Y,  L = mean 1/2 |P - Y_real|^2 - label margin

    (with `outer_loss=ce_temp`, cross-entropy of softmax(P / temperature) takes the place of the squared error).
    LAMB moves X and Y along the gradient of L, each as one tensor; then f is trained by a step on them, or replaced.
    With `mode=latent` X is whiten(resize(decode(z))), and LAMB moves z.

    Args:
        images: (n, 3, S, S) float32 in [0, 1], the whole set.
        labels: (n,) classes.
        config: settings that `resolve` has filled in.
        real: the train images.
        weights: (n,) of the images in the regression and in the networks' training, for `config.weighted`.
        teachers: whose probabilities the labels start from, with `first_labels=teachers`.
        whitening: fitted on the train images; None: it is fitted here.
        codec: whose latents are learned, with `mode=latent`.
        device: where all of it happens.

    Returns:
        Images of the same shape, whose pixels may leave [0, 1] with `mode=pixel`, and regression labels.

    Raises:
        InputError: for settings or images that do not fit.
        RunError: if features, images or labels stop being finite numbers.
    """
    device, side = torch.device(device), images.shape[-1]
    if device.type == "mps":
        raise InputError("frepo solves in float64, which mps does not have; run on the CPU with --cpu")
    check_set(images, labels, classes, real, weights if config.weighted else None)
    config = resolve(config, Context(side, len(teachers), classes=classes))
    if config.first_labels == "teachers" and not teachers:
        raise InputError("first_labels=teachers needs teachers; give some, or set first_labels=classes")
    steps, top_lr = config.steps or 0, config.lr or 0.0  # which `resolve` has set
    callback, learns = callback or Callback(), config.mode != "labels_only"
    if len(real.images) == 0:
        raise InputError("frepo predicts real train images, but there are none; check the train split")
    whitening = (whitening or fit_whitening(real.images, zca=config.whiten)).to(device)
    rendering = Rendering.of("frepo", config.mode, whitening, codec, config.chunk)
    seen, held = split_off(real, config.held_out) if config.checks or config.fit_temperature else (real, None)
    batches = RealBatches.of(seen, whitening, classes, config.real_batch, seed)
    gray = is_gray(real.images)
    flip = config.flip if config.flip is not None else len(images) < FLIP_BELOW and not gray
    w = None
    if config.weighted and weights is not None:
        w = (weights / weights.mean()).to(device)
    pool = OnlinePool(
        config.nets,
        classes,
        side,
        PoolSettings(config.pool_size, config.max_online, config.online_lr, config.online_batch, config.norm),
        seed=seed,
        device=device,
    )
    outer_loss = krr_loss
    if config.outer_loss == "ce_temp":
        outer_loss = functools.partial(temperature_cross_entropy, temperature=config.outer_temperature)
    facts: dict[str, Any] = {"whitening": whitening.summary(), "flip": flip, "nets": list(config.nets)}
    if resume:
        x, y, trace, strips, facts = _restored(resume, pool, device)
    else:
        start = config.start if learns else "drawn"
        first = first_values(start, images, labels, real, rendering, seed).to(device)
        if rendering.codec is not None:
            facts["latents"] = list(first.shape[1:])
        start_std = float(rendering.images(first).std())
        facts |= {"start_std": round(start_std, 4), "copies": 0}  # 0.44 for real images of CIFAR-10
        if learns:
            first, facts["copies"] = _apart(first, rendering, pool, seed)
        x, y = Lamb.of(first), Lamb.of(start_labels(config, images, labels, classes, teachers).to(device))
        trace = torch.zeros(steps, len(TERMS), device=device)
        strips = [rendering.pixels(first[:SHOWN]).cpu()]
    best = _best_of(resume, device)
    tested = check_steps(steps, config.checks)
    saved = time.perf_counter()
    for step in range(resume.steps if resume else 0, steps):
        lr = cosine_lr(step, steps, top_lr, config.lr_floor)
        i = pool.pick(step)
        x_real, y_real = batches(step)
        with pool.features(i) as features:
            with torch.no_grad():
                parts = x_real.split(config.chunk or len(x_real))
                f_real = torch.cat([features(part) for part in parts])
            g = meta_gradient(
                features,
                x.value,
                y.value,
                f_real,
                y_real,
                chunk=config.chunk,
                flip=flip,
                margin_weight=config.label_margin if config.learn_labels else 0.0,
                ridge=config.ridge,
                weights=w,
                learn_images=learns,
                render=None if rendering.codec is None else rendering,
                outer_loss=outer_loss,
            )
        trace[step, :3] = torch.stack([g.krr, g.margin, g.condition])
        trace[step, 3].fill_(g.ridge)  # no copy from the host
        if g.images is not None:
            x.step(one_channel(g.images) if gray and config.mode == "pixel" else g.images, lr)
        if config.learn_labels:
            y.step(g.labels, lr)
        pool.advance(i, rendering.images(x.value), y.value, step, w)  # on the updated set, as released
        if (step + 1) % max(1, steps // STRIPS) == 0:
            strips.append(rendering.pixels(x.value[:SHOWN]).cpu())
        if held is not None and step + 1 in tested:
            score = held_out_accuracy(
                rendering.images(x.value),
                y.value,
                held,
                whitening,
                net=config.nets[0],
                classes=classes,
                nets=config.check_nets,
                seed=derive_seed(seed, "check", step),
            )
            if record_check(facts, step + 1, score):
                best = (x.value.clone(), y.value.clone())
        callback.step(step)
        if time.perf_counter() - saved >= SAVE_SECONDS and step + 1 < steps:
            callback.save(_state(x, y, best, trace, strips, facts, pool, step + 1))
            saved = time.perf_counter()
    facts["networks_replaced"] = sum(m.generation for m in pool.members)
    facts["end_std"] = round(float(rendering.images(x.value).std()), 4)
    last_x, last_y = best or (x.value, y.value)
    if held is not None and config.fit_temperature:
        shown = rendering.images(last_x)
        temperature = label_temperature(pool, shown, last_y, held, whitening, ridge=config.ridge, weights=w)
        facts["label_temperature"] = round(temperature, 6)
    return Refined(
        rendering.pixels(last_x).cpu() if learns else images,
        trace.float().cpu(),
        TERMS,
        torch.stack(strips).clamp(0, 1),
        soft_labels=last_y.cpu(),
        label_kind="regression",
        bounded=config.mode != "pixel",
        uniform_weights=not config.weighted,  # learned labels absorb importance
        facts=facts,
        preprocessing=whitening.to("cpu").tensors(),
    )


def _apart(values: Tensor, rendering: Rendering, pool: OnlinePool, seed: int) -> tuple[Tensor, int]:
    """Images, or latents, with a little noise on those that are nearly copies of others, and their number."""
    with pool.features(0) as features, torch.no_grad():
        copied = duplicates(torch.cat([features(part) for part in rendering.images(values).split(1000)]))
    size = JITTER if rendering.codec is None else JITTER * float(values.std())
    noise = size * torch.randn(values.shape, generator=generator(seed, "jitter")).to(values.device)
    return torch.where(copied.view(-1, 1, 1, 1), values + noise, values), int(copied.sum())


Best = tuple[Tensor, Tensor] | None  # images or latents, and labels, of the best check


def _best_of(resume: State | None, device: torch.device) -> Best:
    if resume is None or "best.x" not in resume.tensors:
        return None
    return resume.tensors["best.x"].to(device), resume.tensors["best.y"].to(device)


def _state(
    x: Lamb,
    y: Lamb,
    best: Best,
    trace: Tensor,
    strips: list[Tensor],
    facts: dict[str, Any],
    pool: OnlinePool,
    steps: int,
) -> State:
    tensors, pool_facts = pool.state()
    tensors = {f"pool.{k}": v for k, v in tensors.items()}
    for name, lamb in (("x", x), ("y", y)):
        tensors |= {f"{name}.{k}": getattr(lamb, k).detach().cpu().clone() for k in ("value", "first", "second")}
    if best is not None:
        tensors |= {"best.x": best[0].cpu(), "best.y": best[1].cpu()}
    tensors |= {"trace": trace.cpu().clone(), "strips": torch.stack(strips)}
    return State(tensors, {"pool": pool_facts, "facts": dict(facts), "lamb": [x.steps, y.steps]}, steps)


def _restored(
    state: State, pool: OnlinePool, device: torch.device
) -> tuple[Lamb, Lamb, Tensor, list[Tensor], dict[str, Any]]:
    t = state.tensors
    pool.restore({k.removeprefix("pool."): v for k, v in t.items() if k.startswith("pool.")}, state.facts["pool"])

    def lamb(name: str, steps: int) -> Lamb:
        value, first, second = (t[f"{name}.{k}"].to(device, copy=True) for k in ("value", "first", "second"))
        return Lamb(value, first, second, steps)

    x, y = (lamb(name, steps) for name, steps in zip("xy", state.facts["lamb"]))
    return x, y, t["trace"].to(device, copy=True), list(t["strips"]), dict(state.facts["facts"])


class FrepoMethod(Method):
    """FRePo as a stage of a run."""

    config = FRePo

    def resolve(self, stage: FRePo, context: Context) -> FRePo:
        return resolve(stage, context)

    def needs(self, stage: FRePo) -> Needs:
        return Needs(teachers=stage.first_labels == "teachers", real_images=True, codec=stage.mode == "latent")

    def run(
        self,
        batch: Batch,
        stage: FRePo,
        resources: Resources,
        *,
        seed: int,
        resume: State | None = None,
        callback: Callback | None = None,
    ) -> Refined:
        real = resources.real
        if real is None:
            raise InputError("frepo predicts real train images; give them as `Resources.real`")
        return refine(
            batch.images,
            batch.labels,
            stage,
            real,
            classes=resources.classes,
            weights=batch.weights,
            teachers=resources.teachers,
            whitening=resources.once("whitening", lambda: fit_whitening(real.images, zca=stage.whiten)),
            codec=resources.codec,
            seed=derive_seed(seed, "frepo"),
            device=resources.device,
            resume=resume,
            callback=callback,
        )

    def brief(self, stage: FRePo) -> FRePo:
        # whitening is fitted once and costs no step
        steps = min(stage.steps or 4, 4)
        return dataclasses.replace(
            stage, steps=steps, whiten=False, first_labels="classes", checks=0, fit_temperature=False
        )

    def cost(self, stage: FRePo, context: Context) -> Cost:
        return Cost(stage.steps or 0, None, stage.checks * stage.check_nets)
