"""Matching of training trajectories: learned images, soft labels and a learning rate.

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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dq.config.trajectories import GENERAL, PRESETS, Trajectory
from dq.config.validation import unknown_key
from dq.core.errors import InputError
from dq.core.files import read_json
from dq.core.plain import PlainDict
from dq.core.seeds import derive_seed, generator
from dq.data.zca import is_gray
from dq.networks.trajectories import CHUNK, MANIFEST, Experts
from dq.refine.held_out import HARD_LOGIT, HeldOut, check_steps, classic_accuracy, divide
from dq.refine.inputs import check_set
from dq.refine.matching import pad_drop
from dq.refine.method import Batch, Context, Cost, Method, Needs, RealImages, Refined, Resources, Session, State
from dq.refine.momentum import Learned
from dq.refine.optimize import SHOWN
from dq.refine.record import Record
from dq.refine.rendering import Rendering
from dq.refine.starts import first_values, one_channel
from dq.refine.unroll import GRADIENTS, MetaGradient, Segment, Student, draw_batches, last_start

log = logging.getLogger("dq")

TERMS = ("matching_loss", "start_epoch", "step_size")  # columns of the trace
LARGE_STEP = 1.0  # learning rate of a student
MANY = 1_000_000  # images of a class whose number is not known, or a loss that no step has
FIRST_PROBABILITY = 0.9  # of an image's class, where labels are learned and start from classes


def resolve(config: Trajectory, context: Context) -> Trajectory:
    """Fill in every None of the settings.

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
    settings: PlainDict = {
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
    """Mean logits (S, C) of the trained experts that classify an image correctly.

    Of all where none does, since the released code then divides by zero.

    Args:
        experts: trajectories.
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
    """Rows (n,) of correctly classified train images, of the classes of the set.

    Of each class in random order the first that the first expert classifies correctly, then those of the second, ...

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


def refine(batch: Batch, config: Trajectory, resources: Resources, session: Session | None = None) -> Refined:
    """Learn images, soft labels and step size by trajectory matching.

    A pure function of its arguments. In every step an expert and a start epoch t are drawn, a student starts from
    theta*_t and makes N steps of SGD on the set, and the set moves along the gradient of

        L = |m (theta_N - theta*_{t+M})|^2 / |m (theta*_t - theta*_{t+M})|^2

    with m of `Segment.mask`. With `mode=latent` the images are whiten(resize(decode(z))). They are decoded once a
    step, and z moves along their gradient pulled back through the decoder, in memory that N does not change.

    Args:
        batch: the whole set; its weights are not read.
        config: settings; what is None is filled in as `resolve` says.
        resources: experts; train images, for starts from these and for `config.checks`; and the codec, with
            `mode=latent`.
        session: seed, state to resume from and callbacks.

    Returns:
        Images of the same shape, whose pixels may leave [0, 1] with `mode=pixel`, logits and a step size.

    Raises:
        InputError: for settings or experts that do not fit, or an expert whose compared parameters did not move.
        RunError: if an expert's file cannot be read.
    """
    session = session or Session()
    problem = _problem(batch, config, resources, session.seed)
    config, rendering = problem.config, problem.rendering
    learning, record = _resumed(problem, session.resume) if session.resume else _start(problem, batch)
    tested, inner = check_steps(config.steps, config.checks), config.student_steps or 1
    for step in range(session.resume.steps // inner if session.resume else 0, config.steps):
        g, t = _gradient(problem, learning, step)
        record.trace[step] = torch.tensor([float(g.loss), t, float(learning.step_size.value)])
        if skipped := _skipped(g, config):
            record.facts[skipped] += 1
        else:
            learning.move(g, problem)
        record.add_picture(step, rendering, learning.x.value)
        if step + 1 in tested:
            score = _check(problem, learning, derive_seed(session.seed, step))
            record.add_check(step + 1, score, {f"best.{k}": v for k, v in learning.values().items()})
        for i in range(inner):  # the steps that take the time, in which costs are counted
            session.step(step * inner + i)
        if record.save_due(step + 1):
            session.save(State(record.tensors(learning.tensors()), dict(record.facts), (step + 1) * inner))
    _warn(record.facts, config.steps, float(learning.step_size.value))
    last = {k: record.best.get(f"best.{k}", v) for k, v in learning.values().items()}
    return Refined(
        rendering.pixels(last["x"]).cpu(),
        record.trace,
        TERMS,
        record.blocks(),
        soft_labels=last["y"].cpu(),
        label_kind="logits",
        step_size=float(last["s"]),
        bounded=config.mode == "latent",
        uniform_weights=True,  # the distance does not depend on weights
        facts=record.facts,
        preprocessing=problem.experts.whitening.tensors(),
    )


@dataclass(frozen=True)
class _Problem:
    """What is the same in all steps on a set."""

    config: Trajectory  # resolved
    experts: Experts
    rendering: Rendering
    real: RealImages | None  # train images that the experts saw
    held_out: HeldOut | None  # train images that they did not see
    gray: bool  # the three channels are one
    device: torch.device
    seed: int


def _problem(batch: Batch, config: Trajectory, resources: Resources, seed: int) -> _Problem:
    images, experts, real, device = batch.images, resources.experts, resources.real, resources.device
    if experts is None:
        raise InputError("trajectory matches experts; give them as `Resources.experts`")
    net = experts.net
    size = round(len(real.labels) / net.classes) if real is not None else None
    ipc = max(1, round(len(images) / net.classes))
    config = resolve(config, Context(images.shape[-1], 0, ipc, net.classes, size))
    check_set(images, batch.labels, net.classes, real)
    if images.shape[-1] != net.side:
        raise InputError(
            f"the experts in {experts.folder} saw images of {net.side} px, but those of the set have "
            f"{images.shape[-1]}; train experts at that size"
        )
    check_experts(experts, config)
    cut = net.cut(config.alpha or 0.0)
    if config.select == "depth" and cut.first:
        log.info("trajectory compares no parameter before %s, nor %.0f %% of it", cut.layer, 100 * cut.share)
    net.to(device)
    whitening = experts.whitening.to(device)
    seen, held_out = (None, None) if real is None else divide(real, experts.held_out_rows(real.labels))
    return _Problem(
        config,
        experts,
        Rendering.of("trajectory", config.mode, whitening, resources.codec, config.chunk),
        seen,
        None if held_out is None else HeldOut(held_out, experts.whitening, net.name, config.check_nets),
        # what a decoder makes of gray images need not be gray, so that the three channels count apart
        gray=config.mode == "pixel" and is_gray(images if real is None else real.images),
        device=device,
        seed=seed,
    )


@dataclass(frozen=True)
class _Learning:
    """The tensors that are learned."""

    x: Learned  # whitened images, or latents
    y: Learned  # (S, C) label logits
    step_size: Learned  # ()

    def values(self) -> dict[str, Tensor]:
        return {"x": self.x.value, "y": self.y.value, "s": self.step_size.value}

    def tensors(self) -> dict[str, Tensor]:
        return self.x.tensors("x") | self.y.tensors("y") | self.step_size.tensors("s")

    def move(self, g: MetaGradient, problem: _Problem) -> None:
        """Move along the gradient."""
        config = problem.config
        g_images = problem.rendering.pull_back(self.x.value, one_channel(g.images) if problem.gray else g.images)
        self.x.step(g_images, config.lr_images or 0.0, config.momentum_images)
        if config.learn_labels:
            self.y.step(g.labels, config.lr_labels or 0.0, config.momentum_labels)
        if config.learn_step:
            self.step_size.step(g.step_size, config.lr_step or 0.0, config.momentum_step)
            self.step_size.value = self.step_size.value.clamp(min=config.least_step)


def _gradient(problem: _Problem, learning: _Learning, step: int) -> tuple[MetaGradient, int]:
    """The gradient and the start epoch of a step; experts take turns."""
    config, experts, seed, device = problem.config, problem.experts, problem.seed, problem.device
    first, bound, end = config.start_epochs or (0, 1, 1)
    bound = last_start(step, first=bound, last=end, every=config.expand_every or 0)
    t = int(torch.randint(first, bound, (), generator=generator(seed, "start epoch", step)))
    turn, i = divmod(step, experts.number)
    e = int(torch.randperm(experts.number, generator=generator(seed, "experts", turn))[i])
    until = t + (config.expert_epochs or 1)
    start, target = (experts.parameters(e, epoch).to(device) for epoch in (t, until))
    share = config.alpha or 0.0
    cut = int(share * len(start)) if config.select == "depth" else 0
    if torch.equal(start[cut:], target[cut:]):
        raise InputError(
            f"the compared parameters of expert {e} are the same after {t} and after {until} epochs; train experts "
            "with a larger lr, or lower alpha"
        )
    x = problem.rendering.images(learning.x.value)
    batches = draw_batches(len(x), config.inner_batch or len(x), config.student_steps or 1, derive_seed(seed, step))
    student = Student(experts.net.to(device), batches, derive_seed(seed, "augment", step), config.augment)
    segment = Segment(start, target, share, config.select)
    return GRADIENTS[config.unroll](student, x, learning.y.value, learning.step_size.value, segment), t


def _skipped(g: MetaGradient, config: Trajectory) -> str | None:
    """Name of the count for a skipped step; None if it is not."""
    if not all(bool(torch.isfinite(v).all()) for v in g):
        return "skipped_not_finite"
    return "skipped_by_threshold" if config.threshold is not None and float(g.loss) > config.threshold else None


def _start(problem: _Problem, batch: Batch) -> tuple[_Learning, Record]:
    """The tensors that are learned at the start, and the record."""
    config, experts, rendering = problem.config, problem.experts, problem.rendering
    facts: PlainDict = {"whitening": experts.whitening.summary(), "net": experts.net.name}
    facts |= {"experts": experts.number, "skipped_by_threshold": 0, "skipped_not_finite": 0}
    facts["parameters"] = experts.net.size
    if config.select == "depth":
        cut = experts.net.cut(config.alpha or 0.0)
        facts["cut"] = {"parameters_left_out": cut.first, "layer": cut.layer, "share_of_layer": round(cut.share, 4)}
    x = Learned.of(_start_images(problem, batch))
    y = Learned.of(_start_labels(config, experts, rendering.images(x.value), batch.labels))
    step_size = Learned.of(torch.tensor(config.first_step, device=problem.device))
    facts |= {} if config.mode == "pixel" else {"latents": list(x.value.shape[1:])}
    trace, pictures = torch.zeros(config.steps, len(TERMS)), [rendering.pixels(x.value[:SHOWN]).cpu()]
    return _Learning(x, y, step_size), Record(trace, pictures, facts)


def _resumed(problem: _Problem, state: State) -> tuple[_Learning, Record]:
    """What `_start` gives, from a saved state."""
    x, y, step_size = (Learned.restored(state.tensors, name, problem.device) for name in "xys")
    return _Learning(x, y, step_size), Record.restored(state.tensors, state.facts, problem.device)


def _warn(facts: PlainDict, steps: int, step_size: float) -> None:
    """Warn of many skipped steps and of a large step size."""
    skipped = facts["skipped_by_threshold"] + facts["skipped_not_finite"]
    if 2 * skipped > steps:
        log.warning("trajectory skipped %d of %d steps; lower lr_images, lr_step or start_epochs", skipped, steps)
    if step_size > LARGE_STEP:
        log.warning("trajectory learned a step size of %g, with which students diverge; lower lr_step", step_size)


def _start_images(problem: _Problem, batch: Batch) -> Tensor:
    """First whitened images, or latents."""
    config, rendering, real, device = problem.config, problem.rendering, problem.real, problem.device
    if config.start == "drawn":
        return rendering.encode(batch.images.to(device)).to(device)
    if real is None:
        raise InputError(f"start={config.start} needs the train images; give them as `Resources.real`")
    if config.start == "correct":
        rows = correct_rows(problem.experts, batch.labels, real, device, problem.seed)
        return rendering.encode(real.images[rows].to(device)).to(device)
    return first_values(config.start or "real", batch.images, batch.labels, real, rendering, problem.seed).to(device)


def _start_labels(config: Trajectory, experts: Experts, x: Tensor, labels: Tensor) -> Tensor:
    """First label logits (S, C)."""
    if config.first_labels == "experts":
        return expert_labels(experts, x, labels)
    classes = experts.net.classes
    odds = math.log(FIRST_PROBABILITY * (classes - 1) / (1 - FIRST_PROBABILITY))
    logit = odds if config.learn_labels else HARD_LOGIT
    return logit * torch.nn.functional.one_hot(labels.to(x.device), classes).float()


def _check(problem: _Problem, learning: _Learning, seed: int) -> float:
    """Mean held-out accuracy of networks trained on the set by the protocol `classic`."""
    if problem.held_out is None:
        raise InputError("checks need the train images; give them as `Resources.real`, or set checks=0")
    x, config = problem.rendering.images(learning.x.value), problem.config
    return classic_accuracy(
        x,
        learning.y.value,
        problem.held_out,
        epochs=config.check_epochs,
        augment=config.augment,
        lr=float(learning.step_size.value),
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

    def run(self, batch: Batch, stage: Trajectory, resources: Resources, session: Session) -> Refined:
        return refine(batch, stage, resources, session.derived("trajectory"))

    def brief(self, stage: Trajectory) -> Trajectory:
        # few steps of the student, whose number decides the memory of the exact gradient
        inner = min(stage.student_steps or 1, 3)
        short = dataclasses.replace(stage, steps=min(stage.steps, 2), student_steps=inner)
        # few steps move a student so little that the loss may exceed any threshold; they are there for their time
        return dataclasses.replace(short, start="drawn", first_labels="classes", checks=0, threshold=MANY)

    def cost(self, stage: Trajectory, context: Context) -> Cost:
        return Cost(stage.steps * (stage.student_steps or 1), None, stage.checks * stage.check_nets)
