"""The one loop of the stages that optimize pixels: Adam on a batch of images against frozen teachers, in blocks."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dq.config.refinement import RefineConfig
from dq.core.errors import InputError, RunError
from dq.diffusion.codec import DTYPES
from dq.networks.teacher import Teacher, evaluation_mode, head_inputs
from dq.refine.matching import Layer, StatMatcher, layer_weights, trace_layers
from dq.refine.views import draw_view, look

log = logging.getLogger("dq")

TERMS = ("cross_entropy", "statistics", "classes", "proximity")  # the weighted terms of the loss, columns of a trace
SCALE = 65536.0  # first loss scale of float16
BAD_SHARE = 0.05  # of the steps of a block that may be lost to overflow in float16 before it is done again
CALIBRATION_VIEWS = 8
SHOWN = 10  # images of a batch that are kept from the end of every block


@dataclass(frozen=True)
class Schedule:
    """Blocks of steps at one size each; behind each but the last the anchor is merged in."""

    sizes: tuple[int, ...]  # side in px in each block
    steps: tuple[int, ...]
    lr: float
    alpha: float = 1.0  # share of the optimised image in a merge; 1: no merge
    jitter: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step from 0: one cosine from lr to 0 over all blocks."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / sum(self.steps)))


@dataclass(frozen=True)
class MatchedTeacher:
    """A teacher with what is matched of it."""

    teacher: Teacher
    layers: tuple[Layer, ...]  # in the order of calls; empty for a network without batch norm
    weights: Tensor  # (L,) of all layers
    kept: Tensor  # (L,) of the layers that are matched
    r_bn: float
    classes: int  # outputs of the teacher
    class_means: Tensor | None = None  # (C, d) mean last feature of the real images of each class


@dataclass(frozen=True)
class Refined:
    """What a stage makes of a batch."""

    images: Tensor  # (B, 3, S, S) float32 in [0, 1]
    trace: Tensor  # (steps, 4) float32, the terms of the loss by `TERMS`
    # (blocks + 1, n, 3, S, S) float32 in [0, 1]: the first n <= SHOWN images at the start and at the end of each block
    blocks: Tensor
    soft_labels: Tensor | None = None  # (B, C) logits
    precision: str = "float32"  # of the teachers; "float32" also where a block in float16 had to be done again


@dataclass(frozen=True)
class Progress:
    """Where an interrupted batch goes on: behind a block nothing else is remembered, since Adam starts anew there and
    the draws of a step depend on its number."""

    block: int  # finished blocks
    x: Tensor  # (B, 3, D, D) normalised, not yet merged
    trace: Tensor  # (steps so far, 4)
    blocks: Tensor
    precision: str  # of the blocks to come
    scale: float  # of losses in float16


def match_teachers(
    teachers: Sequence[Teacher],
    config: RefineConfig,
    *,
    side: int,
    sizes: Sequence[int],
    drop: float | None = None,
    class_means: Sequence[Tensor | None] | None = None,
) -> tuple[MatchedTeacher, ...]:
    """Teachers as critics of images.

    Args:
        sizes: sides in px at which the teachers will see images.
        drop: in place of `config.depth.drop`, if that is left to a rule.

    Raises:
        InputError: for a teacher that cannot see images of one of these sizes; if none has batch norm.
    """
    if not teachers:
        raise InputError("refinement needs a teacher; set teachers, or refine.N.teachers")
    critics = []
    for i, teacher in enumerate(teachers):
        with evaluating([teacher]):
            classes = min(_check_side(teacher, size) for size in sorted({side, *sizes}))
            layers = trace_layers(teacher.net, functools.partial(_grey, teacher, side))
        weights, kept = layer_weights(layers, config.depth, first_weight=config.first_bn_weight, drop=drop)
        means = class_means[i] if class_means else None
        critics.append(MatchedTeacher(teacher, tuple(layers), weights, kept, config.r_bn, classes, means))
    if config.r_bn and not any(c.layers for c in critics):
        names = ", ".join(t.name for t in teachers)
        raise InputError(
            f"no teacher has batch norm ({names}), whose statistics are matched; add one that has, or set r_bn=0 "
            "for the cross-entropy alone"
        )
    return tuple(critics)


def check_alone(config: RefineConfig) -> None:
    """Refuse settings that a batch alone cannot follow, since they need other images or the whole set.

    Raises:
        InputError: that names the first of them.
    """
    needs = {
        "bn_share": config.bn_share is not None,
        "class_weight": config.class_weight > 0,
        "depth.drop=null": config.depth.drop is None,
    }
    for name, set_ in needs.items():
        if set_:
            raise InputError(
                f"{name} is worked out by a run; for a batch alone give `critics` that know it, or unset it"
            )


@torch.no_grad()
def _grey(teacher: Teacher, size: int) -> Tensor:
    device = next(teacher.net.parameters()).device
    return teacher(torch.full((2, 3, size, size), 0.5, device=device))


def _check_side(teacher: Teacher, size: int) -> int:
    """Outputs of a teacher for an image of this side."""
    try:
        return _grey(teacher, size).shape[1]
    except (AssertionError, RuntimeError, ValueError) as e:
        said = " ".join(str(e).split())[:120]
        raise InputError(
            f"the teacher {teacher.name} cannot see images of {size} px ({said}); set sizes to the side it was made "
            "for, or its image_size, to which every image is then resized"
        ) from e


def _check_batch(images: Tensor, labels: Tensor, classes: int) -> None:
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[2] != shape[3] or labels.shape != shape[:1] or not images.is_floating_point():
        raise InputError(
            f"refinement needs square float images (B, 3, S, S) with labels (B,), not {shape} {images.dtype} and "
            f"{tuple(labels.shape)}"
        )
    if not (images.min() >= 0 and images.max() <= 1):
        raise InputError(
            f"images to refine go from {images.min().item():.3g} to {images.max().item():.3g} but must lie in [0, 1]; "
            "a decoder's [-1, 1] has to be shifted first"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"labels go from {int(labels.min())} to {int(labels.max())} but a teacher has {classes} outputs; give a "
            "teacher of these classes"
        )


def optimize(
    start: Tensor,
    labels: Tensor,
    *,
    config: RefineConfig,
    schedule: Schedule,
    critics: Sequence[MatchedTeacher],
    choose: Callable[[int], int],
    seed: int,
    anchors: Tensor | Callable[[Tensor, int], Tensor] | None = None,
    image_weights: Tensor | None = None,
    resume: Progress | None = None,
    on_block: Callable[[Progress], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Refined:
    """Minimise CE(f(A(x)), y) + r_bn S_f(A(x)) + ... over the pixels of a batch.

    x is kept in the normalisation of the first teacher, in which the learning rate is meant, and within the range of
    pixels. The teacher f of step t is `critics[choose(t)]`, the view A of step t is drawn from (seed, t). Every block
    has an Adam of its own, so that no moment describes another image (FADRM's released code).

    Args:
        start: (B, 3, S, S) float32 in [0, 1], where the first block begins.
        labels: (B,) classes.
        anchors: (B, 3, S, S) in [0, 1], what merges bring back; or a function of the images at hand (B, 3, S, S) in
            [0, 1] and the number of the merge that gives them; None: `start`.
        image_weights: (B,) for `config.weighted`.
        on_block: told after every block but the last what `resume` takes to go on from there.

    Raises:
        RunError: if the loss stops being a number.
    """
    _check_batch(start, labels, min(c.classes for c in critics))
    teacher = critics[0].teacher
    device = next(teacher.net.parameters()).device
    mean, std = (start.new_tensor(v, device=device).view(1, -1, 1, 1) for v in (teacher.mean, teacher.std))
    low, high = -mean / std, (1 - mean) / std
    side = start.shape[-1]
    start, labels = start.to(device), labels.to(device)
    x0 = (start - mean) / std
    weights = image_weights.to(device) if config.weighted and image_weights is not None else None
    precision, scale = (resume.precision, resume.scale) if resume else (config.dtype, SCALE)
    with evaluating([c.teacher for c in critics]):
        ratios = [1.0] * len(critics)
        if config.depth.renorm == "scale" and any((c.kept != c.weights).any() for c in critics):
            first = resample(x0, schedule.sizes[0])
            ratios = [_ratio(c, first * std + mean, config, schedule, seed, i, weights) for i, c in enumerate(critics)]
        matchers = [StatMatcher(c.layers, c.kept, norm=config.norm, image_weights=weights) for c in critics]

        def step_loss(x: Tensor, step: int) -> Tensor:
            """The terms of the loss (4,) at a step."""
            i = choose(step)
            critic = critics[i]
            size = x.shape[-1]
            seen = look(x, draw_view(config, size, schedule.jitter, seed=seed, step=step)) * std + mean
            half = torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32")
            heads = head_inputs(critic.teacher.net, wanted=critic.class_means is not None)
            with matchers[i] as matcher, heads as features:
                with half:
                    logits = critic.teacher.differentiable(seen)
                zero = x.new_zeros(())
                statistics = critic.r_bn * ratios[i] * matcher.distance() if critic.layers else zero
            entropy = F.cross_entropy(logits, labels)
            classes = zero
            if critic.class_means is not None and config.class_weight:
                classes = config.class_weight * class_distance(features[-1], labels, critic.class_means)
            near = zero
            if config.proximity:
                near = config.proximity * F.mse_loss(x, resample(x0, size))
            return torch.stack([entropy, statistics, classes, near])

        done = resume.block if resume else 0
        trace = [resume.trace] if resume else []
        ends = [resume.blocks] if resume else [start[None, :SHOWN].cpu()]

        def pixels(x: Tensor) -> Tensor:
            return resample((x * std + mean).clamp(0, 1), side)

        x = resume.x.to(device) if resume else resample(x0, schedule.sizes[0])
        for block in range(done, len(schedule.sizes)):
            if block:  # merge behind the block before
                given = anchors(pixels(x).cpu(), block - 1) if callable(anchors) else anchors
                x = resample(x, schedule.sizes[block])
                if schedule.alpha < 1:
                    anchor = x0 if given is None else (given.to(device) - mean) / std
                    x = schedule.alpha * x + (1 - schedule.alpha) * resample(anchor, schedule.sizes[block])
            first_step = sum(schedule.steps[:block])
            steps = range(first_step, first_step + schedule.steps[block])
            walk = (x, steps, step_loss, schedule, config, (low, high), on_step)
            moved, found, ended, lost = _block(*walk, scale=scale if precision == "float16" else None)
            if lost and torch.isfinite(found).all() and ended >= 1:
                # the scale was far too large at first: the same steps again with the one that it came down to
                moved, found, ended, lost = _block(*walk, scale=ended)
            if lost:
                log.warning("note: too many losses or gradients overflow in float16; a block is done again in float32")
                precision = "float32"
                moved, found, ended, _ = _block(*walk, scale=None)
            x, scale = moved, ended
            if not (torch.isfinite(found).all() or precision == "float16") or not torch.isfinite(x).all():
                bad = first_step + int((~torch.isfinite(found)).any(1).float().argmax())
                raise RunError(
                    f"the loss of the refinement is not a number in step {bad} of {sum(schedule.steps)} (teacher "
                    f"{critics[choose(bad)].teacher.name}, {precision}); lower its lr, now {schedule.lr:g}, or r_bn"
                )
            trace.append(found)
            ends.append(pixels(x[:SHOWN])[None].cpu())
            if on_block is not None and block + 1 < len(schedule.sizes):
                on_block(Progress(block + 1, x.cpu(), torch.cat(trace), torch.cat(ends), precision, scale))
        return Refined(pixels(x).cpu(), torch.cat(trace), torch.cat(ends), precision=precision)


def _block(
    x: Tensor,
    steps: range,
    step_loss: Callable[[Tensor, int], Tensor],
    schedule: Schedule,
    config: RefineConfig,
    bounds: tuple[Tensor, Tensor],
    on_step: Callable[[int], None] | None,
    *,
    scale: float | None,
) -> tuple[Tensor, Tensor, float, bool]:
    """One block: the images at its end, the terms of its losses (steps, 4) on the CPU, the last scale of the losses,
    and whether so many steps were lost to overflow that the block should not stand. Losses are scaled for float16;
    without a `scale` they are not."""
    x = x.detach().clone().contiguous().requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=schedule.lr, betas=config.betas)  # type: ignore[arg-type]
    # The released code shares one scaler among all batches; here a batch has its own, as results must not depend on
    # which process did what before
    scaler = torch.amp.GradScaler(x.device.type, init_scale=scale or SCALE, enabled=scale is not None)
    trace = torch.zeros(len(steps), len(TERMS), device=x.device)  # read at the end: no wait within a step
    skipped = 0
    for i, step in enumerate(steps):
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        terms = step_loss(x, step)
        optimizer.zero_grad()
        scaler.scale(terms.sum()).backward()
        scaler.step(optimizer)
        before = scaler.get_scale() if scale is not None else 0.0
        scaler.update()
        if scale is not None:
            skipped += scaler.get_scale() < before
        with torch.no_grad():
            x.clamp_(*bounds)
            trace[i] = terms.detach()
        if on_step is not None:
            on_step(step)
    return (
        x.detach(),
        trace.cpu(),
        scaler.get_scale() if scale is not None else SCALE,
        skipped > BAD_SHARE * len(steps),
    )


def resample(x: Tensor, size: int) -> Tensor:
    """Images (B, C, S, S) at another side: bilinear, half-pixel centres, no antialiasing (FADRM's released code)."""
    if x.shape[-1] == size:
        return x
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


def class_distance(features: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Mean over the classes of a batch of | mean feature of its images - target |_2.

    Args:
        features: (B, ...) last features.
        targets: (C, d) mean feature of the real images of each class.
    """
    x = features.flatten(1).float()
    member = F.one_hot(labels, len(targets)).to(x.dtype)  # (B, C)
    counts = member.sum(0)
    present = counts > 0
    means = (member.T @ x)[present] / counts[present, None]
    return torch.linalg.vector_norm(means - targets.to(x)[present], dim=1).mean()


@torch.no_grad()
def _ratio(
    critic: MatchedTeacher,
    pixels: Tensor,
    config: RefineConfig,
    schedule: Schedule,
    seed: int,
    number: int,
    image_weights: Tensor | None,
) -> float:
    """How many times smaller the kept layers' sum is than that of all, at the first view of the start."""
    sums = []
    seen = look(pixels, draw_view(config, pixels.shape[-1], schedule.jitter, seed=seed, step=number))
    for weights in (critic.kept, critic.weights):
        with StatMatcher(critic.layers, weights, norm=config.norm, image_weights=image_weights) as matcher:
            critic.teacher(seen)
            sums.append(float(matcher.distance()))
    return sums[1] / sums[0] if sums[0] > 0 else 1.0


@torch.no_grad()
def calibrate(
    critics: Sequence[MatchedTeacher],
    start: Tensor,
    config: RefineConfig,
    schedule: Schedule,
    classes: int,
    *,
    seed: int,
    image_weights: Tensor | None = None,
) -> list[float]:
    """r_bn of every teacher such that r_bn S at the start is `config.bn_share` times ln(classes), the cross-entropy of
    a guess; S is the mean over a few views of images (B, 3, S, S) in [0, 1]. As it is without `bn_share`.

    What a distance of statistics weighs depends on the depth and the width of a network: r_bn = 0.01 is FADRM's for a
    ResNet-18, and users report a hundred times the distance for a ResNet-50.
    """
    if config.bn_share is None:
        return [c.r_bn for c in critics]
    rates = []
    for critic in critics:
        if not critic.layers:
            rates.append(0.0)
            continue
        device = next(critic.teacher.net.parameters()).device
        pixels = resample(start.to(device), schedule.sizes[0])
        sums = []
        # with renorm=scale the sum of the kept layers begins as large as that of all
        kept = critic.weights if config.depth.renorm == "scale" else critic.kept
        weights = None if image_weights is None else image_weights.to(device)
        matcher = StatMatcher(critic.layers, kept, norm=config.norm, image_weights=weights)
        with evaluating([critic.teacher]), matcher:
            for step in range(CALIBRATION_VIEWS):
                view = draw_view(config, pixels.shape[-1], schedule.jitter, seed=seed, step=step)
                critic.teacher(look(pixels, view))
                sums.append(float(matcher.distance()))
        mean = sum(sums) / len(sums)
        rates.append(config.bn_share * math.log(classes) / mean if mean > 0 else config.r_bn)
    return rates


@contextlib.contextmanager
def evaluating(teachers: Sequence[Teacher]) -> Iterator[None]:
    """The teachers' networks in evaluation mode and without gradients of weights, and as they were after it."""
    learning = [p for t in teachers for p in t.net.parameters() if p.requires_grad]
    with contextlib.ExitStack() as stack:
        for t in teachers:
            stack.enter_context(evaluation_mode(t.net))
        for p in learning:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in learning:
                p.requires_grad_(True)
