"""Matching of trajectories: images, soft labels and a learning rate with which networks train as on real images.

Cazenavette et al., "Dataset Distillation by Matching Training Trajectories" (MTT), CVPR 2022; Guo et al., DATM, ICLR
2024: learned soft labels, a range of start epochs that grows; PAD (arXiv 2408.03360): a part of the parameters is left
out, experts by a curriculum. The gradients are in `dq.refine.unroll`, experts in `dq.networks.trajectories`.
Departures: the learning rate stays positive, gradients that are not finite are skipped too, the best set is chosen on
held-out train images, the settings are those of the papers and not of the released configurations. `mode=latent` is in
none of the papers.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq.config.trajectories import GENERAL, PRESETS, Trajectory
from dq.config.validation import unknown_key
from dq.core.errors import InputError
from dq.core.files import read_json
from dq.core.seeds import derive_seed, generator
from dq.data.zca import is_gray
from dq.diffusion.image_codec import ImageCodec
from dq.networks.trajectories import CHUNK, MANIFEST, Experts
from dq.refine.held_out import HARD_LOGIT, check_steps, classic_accuracy, divide, record_check
from dq.refine.inputs import check_set
from dq.refine.matching import pad_drop
from dq.refine.method import Batch, Callback, Context, Cost, Method, Needs, RealImages, Refined, Resources, State
from dq.refine.momentum import Learned
from dq.refine.optimize import SAVE_SECONDS, SHOWN, STRIPS
from dq.refine.rendering import Rendering
from dq.refine.starts import first_values, one_channel
from dq.refine.unroll import GRADIENTS, MetaGradient, Student, draw_batches, last_start

log = logging.getLogger("dq")

TERMS = ("matching_loss", "start_epoch", "step_size")  # columns of the trace
LARGE_STEP = 1.0  # learning rate of a student
MANY = 1_000_000  # images of a class whose number is not known, or a loss that no step has
FIRST_PROBABILITY = 0.9  # of an image's class, where labels are learned and start from classes


def resolve(config: Trajectory, context: Context) -> Trajectory:
    """The settings with every None filled in.

    Raises:
        InputError: for an unknown preset, an ipc that it has no settings for, or epochs that experts do not have.
    """
    published = GENERAL
    if config.preset is not None:
        if config.preset not in PRESETS:
            raise InputError(unknown_key(config.preset, config.preset, list(PRESETS), kind="preset"))
        preset = PRESETS[config.preset]
        if context.ipc is not None and context.ipc not in preset:
            raise InputError(
                f"preset {config.preset!r} has settings for {', '.join(map(str, preset))} images per class, not for "
                f"{context.ipc}; leave preset out"
            )
        published = preset[min(preset) if context.ipc is None else context.ipc]
    settings: dict[str, Any] = {
        k: v for k, v in published._asdict().items() if hasattr(config, k) and getattr(config, k) is None
    }
    if config.preset is None and config.alpha is None:
        settings["alpha"] = pad_drop(context.ipc or 1, context.class_size or MANY)
    if config.min_accuracy is None:
        settings["min_accuracy"] = 2 / (context.classes or 2)
    epochs = int(read_json(Path(config.experts) / MANIFEST)["facts"]["epochs"])
    ahead = int(settings.get("expert_epochs") or config.expert_epochs or 1)
    if config.preset is None and config.start_epochs is None:  # the general ones fit the experts
        end = max(1, epochs - ahead + 1)
        settings["start_epochs"] = tuple(min(e, end) for e in GENERAL.start_epochs)
    filled = dataclasses.replace(config, **settings)
    last = (filled.start_epochs or (0, 1, 1))[2] - 1
    if last + ahead > epochs:
        raise InputError(
            f"start_epochs={list(filled.start_epochs or ())} with expert_epochs={ahead} need experts of "
            f"{last + ahead} epochs, but those in {config.experts} have {epochs}; train longer ones, or lower these"
        )
    return filled


def check_experts(experts: Experts, config: Trajectory) -> None:
    """Refuse experts that have learned too little.

    Raises:
        InputError: that names them.
    """
    low = config.min_accuracy or 0.0
    weak = [f"expert {i} ({a:.1%})" for i, a in enumerate(experts.accuracies) if a < low]
    if weak:
        raise InputError(
            f"of the experts in {experts.folder}, {len(weak)} know fewer than {low:.1%} of held-out images: "
            f"{', '.join(weak[:3])}; train them longer or with another lr, or lower min_accuracy"
        )


@torch.no_grad()
def expert_labels(experts: Experts, x: Tensor, labels: Tensor) -> Tensor:
    """Mean logits (S, C) of the trained experts that classify an image rightly; of all where none does, since the
    released code then divides by zero.

    Args:
        x: (S, 3, H, H) images as networks see them.
        labels: (S,) their classes.
    """
    net, device = experts.net.to(x.device), x.device
    y = labels.to(device)
    sums = torch.zeros(2, len(y), experts.net.classes, device=device)
    counts = torch.zeros(len(y), 1, device=device)
    for i in range(experts.number):
        theta = experts.parameters(i, experts.epochs).to(device)
        logits = torch.cat([net(theta, part) for part in x.split(CHUNK)])
        right = (logits.argmax(1) == y)[:, None].float()
        sums += torch.stack([logits, right * logits])
        counts += right
    return torch.where(counts > 0, sums[1] / counts.clamp(min=1), sums[0] / experts.number)


@torch.no_grad()
def correct_rows(experts: Experts, labels: Tensor, real: RealImages, device: torch.device, seed: int) -> Tensor:
    """Train images (n,) for the images of the set, of their class and classified rightly: of each class in random
    order the first that the first expert knows, then those that the second knows, ...

    Raises:
        InputError: if all experts together know too few images of a class.
    """
    net, rows = experts.net.to(device), torch.empty_like(labels)
    thetas: dict[int, Tensor] = {}
    for c in labels.unique().tolist():
        candidates, places = (real.labels == c).nonzero()[:, 0], (labels == c).nonzero()[:, 0]
        left = candidates[torch.randperm(len(candidates), generator=generator(seed, "correct", c))]
        chosen = left[:0]
        for i in range(experts.number):
            if len(chosen) == len(places):
                break
            if i not in thetas:
                thetas[i] = experts.parameters(i, experts.epochs).to(device)
            images = real.images[left].split(CHUNK)
            right = [net(thetas[i], experts.whitening(x.to(device))).argmax(1).cpu() == c for x in images]
            hits = torch.cat([*right, torch.empty(0, dtype=torch.bool)])
            chosen = torch.cat([chosen, left[hits]])[: len(places)]
            left = left[~hits]
        if len(chosen) < len(places):
            raise InputError(
                f"experts know {len(chosen)} train images of class {c}, but start=correct needs {len(places)}; set "
                "start=real or drawn"
            )
        rows[places] = chosen
    return rows


def refine(
    images: Tensor,
    labels: Tensor,
    config: Trajectory,
    experts: Experts,
    real: RealImages | None = None,
    *,
    ipc: int | None = None,
    codec: ImageCodec | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    resume: State | None = None,
    callback: Callback | None = None,
) -> Refined:
    """Learn a set's images, soft labels and step size; a pure function of its arguments. In every step an expert and
    a start epoch t are drawn, a student starts from theta*_t and makes N steps of SGD on the set, and the set moves
    along the gradient of

        L = |m (theta_N - theta*_{t+M})|^2 / |m (theta*_t - theta*_{t+M})|^2

    with m of `kept_parameters`. With `mode=latent` the images are whiten(resize(decode(z))). They are decoded once a
    step, and z moves along their gradient pulled back through the decoder, in memory that N does not change.

    Args:
        images: (n, 3, S, S) float32 in [0, 1], the whole set.
        labels: (n,) classes.
        config: settings that `resolve` fills in.
        experts: trajectories.
        real: all train images, for starts from these and for `config.checks`.
        ipc: images per class, for presets; None: n by the number of classes.
        codec: whose latents are learned, with `mode=latent`.
        device: where all of it happens.

    Returns:
        Images of the same shape, whose pixels may leave [0, 1] with `mode=pixel`, logits and a step size.

    Raises:
        InputError: for settings or experts that do not fit, or an expert whose compared parameters did not move.
        RunError: if an expert's file cannot be read.
    """
    device, net = torch.device(device), experts.net
    classes = net.classes
    size = round(len(real.labels) / classes) if real is not None else None
    context = Context(images.shape[-1], 0, ipc or max(1, round(len(images) / classes)), classes, size)
    config = resolve(config, context)
    check_set(images, labels, classes, real)
    if images.shape[-1] != net.side:
        raise InputError(
            f"the experts in {experts.folder} saw images of {net.side} px, but those of the set have "
            f"{images.shape[-1]}; train experts at that size"
        )
    check_experts(experts, config)
    net.to(device)
    callback, whitening = callback or Callback(), experts.whitening.to(device)
    rendering = Rendering.of("trajectory", config.mode, whitening, codec, config.chunk)
    seen, held = _divided(experts, real)
    # what a decoder makes of gray images need not be gray, so that the three channels count apart
    gray = config.mode == "pixel" and is_gray(images if real is None else real.images)
    share, cut = config.alpha or 0.0, net.cut(config.alpha or 0.0)
    facts: dict[str, Any] = {"whitening": experts.whitening.summary(), "net": net.name, "experts": experts.number}
    facts |= {"skipped_by_threshold": 0, "skipped_not_finite": 0, "parameters": net.size}
    if config.select == "depth":
        facts["cut"] = {"parameters_left_out": cut.first, "layer": cut.layer, "share_of_layer": round(cut.share, 4)}
        if cut.first:
            log.info("trajectory compares no parameter before %s, nor %.0f %% of it", cut.layer, 100 * cut.share)
    if resume:
        parts = {k: resume.tensors[k].to(device, copy=True) for k in resume.tensors if k[:2] in ("x.", "y.", "s.")}
        x, y, step_size = (Learned(parts[f"{n}.value"], parts[f"{n}.velocity"]) for n in "xys")
        trace, strips = resume.tensors["trace"].clone(), list(resume.tensors["strips"])
        facts = dict(resume.facts)
    else:
        x = Learned.of(_start(config, images, labels, experts, seen, rendering, device, seed))
        y = Learned.of(_start_labels(config, experts, rendering.images(x.value), labels))
        step_size = Learned.of(torch.tensor(config.first_step, device=device))
        trace, strips = torch.zeros(config.steps, len(TERMS)), [rendering.pixels(x.value[:SHOWN]).cpu()]
        facts |= {} if config.mode == "pixel" else {"latents": list(x.value.shape[1:])}
    best = {k[5:]: v.to(device) for k, v in resume.tensors.items() if k.startswith("best.")} if resume else {}
    tested = check_steps(config.steps, config.checks)
    saved = time.perf_counter()
    inner = config.student_steps or 1
    for step in range(resume.steps // inner if resume else 0, config.steps):
        shown = rendering.images(x.value)
        g, t = _matched(shown, y.value, step_size.value, config, experts, step, share, seed, device)
        loss = float(g.loss)
        trace[step] = torch.tensor([loss, t, float(step_size.value)])
        if not all(bool(torch.isfinite(v).all()) for v in g):
            facts["skipped_not_finite"] += 1
        elif config.threshold is not None and loss > config.threshold:
            facts["skipped_by_threshold"] += 1
        else:
            g_images = one_channel(g.images) if gray else g.images
            x.step(rendering.pull_back(x.value, g_images), config.lr_images or 0.0, config.momentum_images)
            if config.learn_labels:
                y.step(g.labels, config.lr_labels or 0.0, config.momentum_labels)
            if config.learn_step:
                step_size.step(g.step_size, config.lr_step or 0.0, config.momentum_step)
                step_size.value = step_size.value.clamp(min=config.least_step)
        if (step + 1) % max(1, config.steps // STRIPS) == 0:
            strips.append(rendering.pixels(x.value[:SHOWN]).cpu())
        if step + 1 in tested:
            shown, check_seed = rendering.images(x.value), derive_seed(seed, step)
            score = _check(shown, y.value, float(step_size.value), config, experts, held, check_seed)
            if record_check(facts, step + 1, score):
                best = {"x": x.value, "y": y.value, "s": step_size.value}
        for i in range(inner):  # the steps that take the time, in which costs are counted
            callback.step(step * inner + i)
        if time.perf_counter() - saved >= SAVE_SECONDS and step + 1 < config.steps:
            tensors = {f"{n}.value": v.value for n, v in zip("xys", (x, y, step_size))}
            tensors |= {f"{n}.velocity": v.velocity for n, v in zip("xys", (x, y, step_size))}
            tensors |= {f"best.{k}": v for k, v in best.items()} | {"trace": trace, "strips": torch.stack(strips)}
            callback.save(State({k: v.cpu().clone() for k, v in tensors.items()}, dict(facts), (step + 1) * inner))
            saved = time.perf_counter()
    skipped = facts["skipped_by_threshold"] + facts["skipped_not_finite"]
    if 2 * skipped > config.steps:
        log.warning(
            "trajectory skipped %d of %d steps; lower lr_images, lr_step or start_epochs", skipped, config.steps
        )
    if float(step_size.value) > LARGE_STEP:
        log.warning(
            "trajectory learned a step size of %g, with which students diverge; lower lr_step", step_size.value
        )
    last = best or {"x": x.value, "y": y.value, "s": step_size.value}
    return Refined(
        rendering.pixels(last["x"]).cpu(),
        trace,
        TERMS,
        torch.stack(strips).clamp(0, 1),
        soft_labels=last["y"].cpu(),
        label_kind="logits",
        step_size=float(last["s"]),
        bounded=config.mode == "latent",
        uniform_weights=True,  # the distance knows no weights
        facts=facts,
        preprocessing=experts.whitening.tensors(),
    )


def _matched(
    x: Tensor,
    y: Tensor,
    step_size: Tensor,
    config: Trajectory,
    experts: Experts,
    step: int,
    share: float,
    seed: int,
    device: torch.device,
) -> tuple[MetaGradient, int]:
    """The gradient of a step, and the start epoch; experts take turns in a new order every time."""
    first, bound, end = config.start_epochs or (0, 1, 1)
    bound = last_start(step, first=bound, last=end, every=config.expand_every or 0)
    t = int(torch.randint(first, bound, (), generator=generator(seed, "start epoch", step)))
    turn, i = divmod(step, experts.number)
    e = int(torch.randperm(experts.number, generator=generator(seed, "experts", turn))[i])
    until = t + (config.expert_epochs or 1)
    start, target = (experts.parameters(e, epoch).to(device) for epoch in (t, until))
    cut = int(share * len(start)) if config.select == "depth" else 0
    if torch.equal(start[cut:], target[cut:]):
        raise InputError(
            f"the compared parameters of expert {e} are the same after {t} and after {until} epochs; train experts "
            "with a larger lr, or lower alpha"
        )
    batches = draw_batches(len(x), config.inner_batch or len(x), config.student_steps or 1, derive_seed(seed, step))
    student = Student(experts.net.to(device), batches, derive_seed(seed, "augment", step), config.augment)
    gradient = GRADIENTS[config.unroll]
    return gradient(student, x, y, step_size, start, target, share=share, select=config.select), t


def _divided(experts: Experts, real: RealImages | None) -> tuple[RealImages | None, RealImages | None]:
    """Train images that the experts saw, and those that were held out from them."""
    if real is None:
        return None, None
    return divide(real, experts.held_out_rows(real.labels))


def _start(
    config: Trajectory,
    images: Tensor,
    labels: Tensor,
    experts: Experts,
    seen: RealImages | None,
    rendering: Rendering,
    device: torch.device,
    seed: int,
) -> Tensor:
    """Where whitened images, or latents, begin."""
    if config.start == "drawn":
        return rendering.encode(images.to(device)).to(device)
    if seen is None:
        raise InputError(f"start={config.start} needs the train images; give them as `real`")
    if config.start == "correct":
        rows = correct_rows(experts, labels, seen, device, seed)
        return rendering.encode(seen.images[rows].to(device)).to(device)
    return first_values(config.start or "real", images, labels, seen, rendering, seed).to(device)


def _start_labels(config: Trajectory, experts: Experts, x: Tensor, labels: Tensor) -> Tensor:
    """Where label logits (S, C) begin."""
    if config.first_labels == "experts":
        return expert_labels(experts, x, labels)
    classes = experts.net.classes
    odds = math.log(FIRST_PROBABILITY * (classes - 1) / (1 - FIRST_PROBABILITY))
    logit = odds if config.learn_labels else HARD_LOGIT
    return logit * torch.nn.functional.one_hot(labels.to(x.device), classes).float()


def _check(
    x: Tensor, y: Tensor, step_size: float, config: Trajectory, experts: Experts, held: RealImages | None, seed: int
) -> float:
    """Mean accuracy on held-out train images of networks trained on the set by the protocol `classic`."""
    if held is None:
        raise InputError("checks need the train images; give them as `real`, or set checks=0")
    return classic_accuracy(
        x,
        y,
        held,
        experts.whitening,
        net=experts.net.name,
        epochs=config.check_epochs,
        augment=config.augment,
        lr=step_size,
        nets=config.check_nets,
        seed=seed,
    )


class TrajectoryMethod(Method):
    """Matching of trajectories as a stage of a run."""

    config = Trajectory

    def resolve(self, stage: Trajectory, context: Context) -> Trajectory:
        return resolve(stage, context)

    def needs(self, stage: Trajectory) -> Needs:
        real = stage.start != "drawn" or stage.checks > 0
        return Needs(teachers=False, real_images=real, experts=stage.experts, codec=stage.mode == "latent")

    def run(
        self,
        batch: Batch,
        stage: Trajectory,
        resources: Resources,
        *,
        seed: int,
        resume: State | None = None,
        callback: Callback | None = None,
    ) -> Refined:
        if resources.experts is None:
            raise InputError("trajectory matches experts; give them as `Resources.experts`")
        return refine(
            batch.images,
            batch.labels,
            stage,
            resources.experts,
            resources.real,
            codec=resources.codec,
            seed=derive_seed(seed, "trajectory"),
            device=resources.device,
            resume=resume,
            callback=callback,
        )

    def brief(self, stage: Trajectory) -> Trajectory:
        # few steps of the student, whose number decides the memory of the exact gradient
        inner = min(stage.student_steps or 1, 3)
        short = dataclasses.replace(stage, steps=min(stage.steps, 2), student_steps=inner)
        # few steps move a student so little that the loss may exceed any threshold; they are there for their time
        return dataclasses.replace(short, start="drawn", first_labels="classes", checks=0, threshold=MANY)

    def cost(self, stage: Trajectory, context: Context) -> Cost:
        return Cost(stage.steps * (stage.student_steps or 1), None, stage.checks * stage.check_nets)
