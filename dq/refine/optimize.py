"""Optimization of pixels by Adam against frozen teachers, in blocks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dq.config.refinement import MatchingConfig
from dq.core.devices import resolve_dtype
from dq.core.errors import InputError, RunError
from dq.diffusion.codec import DTYPES
from dq.networks.teacher import Teacher, head_inputs
from dq.refine.matched import MatchedTeacher, depth_ratio, evaluating
from dq.refine.method import Refined, Session, State
from dq.refine.views import Schedule, StepViews, resample

log = logging.getLogger("dq")

TERMS = ("cross_entropy", "statistics", "classes", "proximity")  # the weighted terms of the loss, columns of a trace
SCALE = 65536.0  # first loss scale of float16
BAD_SHARE = 0.05  # of the steps of a block that may be lost to overflow in float16 before it is done again
SHOWN = 10  # first images of a batch, of which pictures are kept


@dataclass(frozen=True)
class Progress:
    """State of a batch between two blocks.

    Nothing else is needed to resume, since Adam restarts and the draws of a step depend on its number.
    """

    block: int  # finished blocks
    x: Tensor  # (B, 3, D, D) normalized, not yet merged
    trace: Tensor  # (steps so far, 4)
    blocks: Tensor  # (block + 1, n, 3, S, S) in [0, 1]: the first images at the start and behind every block
    precision: str  # of the blocks to come
    scale: float  # of losses in float16

    def after(self, block: Block, picture: Tensor) -> Progress:
        """The state behind another block, with a picture (1, n, 3, S, S) of its first images."""
        trace, blocks = torch.cat([self.trace, block.trace]), torch.cat([self.blocks, picture])
        return Progress(self.block + 1, block.x, trace, blocks, block.precision, block.scale)

    def state(self) -> State:
        facts = {"block": self.block, "precision": self.precision, "scale": self.scale}
        return State({"x": self.x.cpu(), "trace": self.trace, "blocks": self.blocks}, facts, len(self.trace))

    @staticmethod
    def of(state: State, device: torch.device) -> Progress:
        t, f = state.tensors, state.facts
        return Progress(f["block"], t["x"].to(device), t["trace"], t["blocks"], f["precision"], f["scale"])


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


@dataclass(frozen=True)
class Matching:
    """The loss on pixels: settings, blocks, and teachers by step."""

    config: MatchingConfig
    schedule: Schedule
    teachers: Sequence[MatchedTeacher]
    teacher_of: Callable[[int], int]  # number of a step to that of its teacher


def optimize(
    start: Tensor,
    labels: Tensor,
    matching: Matching,
    session: Session,
    *,
    anchors: Tensor | Callable[[Tensor, int], Tensor] | None = None,
    image_weights: Tensor | None = None,
) -> Refined:
    """Minimize the matching loss over the pixels of a batch.

        L = CE(f(A(x)), y) + r_bn S_f(A(x)) + ...

    x is kept in the normalization of the first teacher, in which the learning rate is meant, and within the range of
    pixels. The view A of step t is drawn from (seed, t). Every block has an Adam of its own, so that no moment
    describes another image (FADRM's released code). A state is saved behind every block but the last.

    Args:
        start: (B, 3, S, S) float32 in [0, 1], where the first block begins.
        labels: (B,) classes.
        matching: the loss.
        session: seed, state to resume from and callbacks.
        anchors: (B, 3, S, S) in [0, 1], blended in by merges; or a function of the present images (B, 3, S, S) in
            [0, 1] and the number of the merge that returns them; None: `start`.
        image_weights: (B,) for `config.weighted`.

    Raises:
        RunError: if the loss stops being a number.
    """
    _check_batch(start, labels, min(t.classes for t in matching.teachers))
    config, schedule, side = matching.config, matching.schedule, start.shape[-1]
    device = next(matching.teachers[0].teacher.net.parameters()).device
    space = PixelSpace.of(matching.teachers[0].teacher, start.to(device))
    start, labels = start.to(device), labels.to(device)
    weights = image_weights.to(device) if config.weighted and image_weights is not None else None
    x0 = space.normalize(start)
    with evaluating([t.teacher for t in matching.teachers]):
        loss = BatchLoss(matching, space, x0, labels, weights, session.seed)
        if session.resume:
            progress = Progress.of(session.resume, device)
        else:
            precision = resolve_dtype(config.dtype, device, "training")
            first = resample(x0, schedule.sizes[0])
            progress = Progress(0, first, torch.zeros(0, len(TERMS)), start[None, :SHOWN].cpu(), precision, SCALE)
        for number in range(progress.block, len(schedule.sizes)):
            x = progress.x
            if number:
                back = anchors(space.pixels(x, side).cpu(), number - 1) if callable(anchors) else anchors
                x = _merged(x, x0 if back is None else space.normalize(back.to(device)), schedule, number)
            block = _run_block(x, number, loss, session, progress)
            progress = progress.after(block, space.pixels(block.x[:SHOWN], side)[None].cpu())
            if number + 1 < len(schedule.sizes):
                session.save(progress.state())
        images = space.pixels(progress.x, side).cpu()
        return Refined(images, progress.trace, TERMS, progress.blocks, precision=progress.precision)


@dataclass(frozen=True)
class PixelSpace:
    """Pixels in the normalization of a teacher."""

    mean: Tensor  # (1, 3, 1, 1)
    std: Tensor  # (1, 3, 1, 1)

    @staticmethod
    def of(teacher: Teacher, like: Tensor) -> PixelSpace:
        """The normalization of a teacher, in dtype and device of a tensor."""
        mean, std = (like.new_tensor(v).view(1, -1, 1, 1) for v in (teacher.mean, teacher.std))
        return PixelSpace(mean, std)

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """The least and the largest value of a pixel."""
        return -self.mean / self.std, (1 - self.mean) / self.std

    def normalize(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def denormalize(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean

    def pixels(self, x: Tensor, side: int) -> Tensor:
        """Images in [0, 1] of a side."""
        return resample(self.denormalize(x).clamp(0, 1), side)


def _merged(x: Tensor, anchor: Tensor, schedule: Schedule, number: int) -> Tensor:
    """Images at the size of block `number`, with the anchors blended in."""
    size = schedule.sizes[number]
    x = resample(x, size)
    return schedule.alpha * x + (1 - schedule.alpha) * resample(anchor, size) if schedule.alpha < 1 else x


class BatchLoss:
    """The terms of the loss of a batch at each step."""

    def __init__(
        self, matching: Matching, space: PixelSpace, x0: Tensor, labels: Tensor, weights: Tensor | None, seed: int
    ) -> None:
        """Prepare the matchers, and the ratios of `depth.renorm=scale`.

        Args:
            matching: settings and teachers.
            space: normalization of the pixels.
            x0: (B, 3, S, S) normalized, the images at the start.
            labels: (B,) classes.
            weights: (B,) of the images in batch statistics.
            seed: of the views.
        """
        self.matching, self.space, self.x0, self.labels, self.seed = matching, space, x0, labels, seed
        config, schedule, teachers = matching.config, matching.schedule, matching.teachers
        self.ratios = [1.0] * len(teachers)
        if config.depth.renorm == "scale" and any((t.matched_weights != t.weights).any() for t in teachers):
            first = space.denormalize(resample(x0, schedule.sizes[0]))
            self.ratios = [depth_ratio(t, first, config, schedule, seed, i, weights) for i, t in enumerate(teachers)]
        self.views: dict[int, StepViews] = {}  # by side in px
        self.matchers = [t.matcher(t.matched_weights, config, weights) for t in teachers]

    def _views_at(self, size: int, device: torch.device) -> StepViews:
        if size not in self.views:
            jitter = self.matching.schedule.jitter
            self.views[size] = StepViews(self.matching.config, size, jitter, seed=self.seed, device=device)
        return self.views[size]

    def __call__(self, x: Tensor, step: int, precision: str) -> Tensor:
        """Weighted terms (4,) for normalized images (B, 3, D, D)."""
        config, i, size = self.matching.config, self.matching.teacher_of(step), x.shape[-1]
        matched = self.matching.teachers[i]
        images = self.space.denormalize(self._views_at(size, x.device).apply(x, step))
        half = torch.autocast(x.device.type, DTYPES[precision], enabled=precision != "float32")
        heads = head_inputs(matched.teacher.net, enabled=matched.class_means is not None)
        with self.matchers[i] as matcher, heads as features:
            with half:
                logits = matched.teacher.differentiable(images)
            zero = x.new_zeros(())
            statistics = matched.r_bn * self.ratios[i] * matcher.distance() if matched.layers else zero
        entropy = F.cross_entropy(logits, self.labels)
        classes = zero
        if matched.class_means is not None and config.class_weight:
            classes = config.class_weight * class_distance(features[-1], self.labels, matched.class_means)
        near = zero
        if config.proximity:
            near = config.proximity * F.mse_loss(x, resample(self.x0, size))
        return torch.stack([entropy, statistics, classes, near])


@dataclass(frozen=True)
class Block:
    """The result of one block."""

    x: Tensor  # (B, 3, D, D) normalized
    trace: Tensor  # (steps, 4) on the CPU
    scale: float  # last scale of the losses
    overflowed: bool  # so many steps were lost to overflow that the block should not stand
    precision: str


def _run_block(x: Tensor, number: int, loss: BatchLoss, session: Session, progress: Progress) -> Block:
    """Run one block, again in float32 where float16 overflows too often.

    Raises:
        RunError: if the loss stops being a number.
    """
    schedule = loss.matching.schedule
    first_step = sum(schedule.steps[:number])
    attempt = functools.partial(
        _attempt_block, x, range(first_step, first_step + schedule.steps[number]), loss, session.step
    )
    block = attempt(progress.precision, progress.scale)
    if block.overflowed and torch.isfinite(block.trace).all() and block.scale >= 1:
        # the scale was far too large at first: the same steps again with the one that it came down to
        block = attempt(progress.precision, block.scale)
    if block.overflowed:
        log.warning("note: too many losses or gradients overflow in float16; a block is done again in float32")
        block = attempt("float32", SCALE)
    if not (torch.isfinite(block.trace).all() or block.precision == "float16") or not torch.isfinite(block.x).all():
        bad = first_step + int((~torch.isfinite(block.trace)).any(1).float().argmax())
        teacher = loss.matching.teachers[loss.matching.teacher_of(bad)].teacher
        raise RunError(
            f"the loss of the refinement is not a number in step {bad} of {sum(schedule.steps)} (teacher "
            f"{teacher.name}, {block.precision}); lower its lr, now {schedule.lr:g}, or r_bn"
        )
    return block


def _attempt_block(
    x: Tensor, steps: range, loss: BatchLoss, on_step: Callable[[int], None], precision: str, scale: float
) -> Block:
    """Run Adam on normalized images; float16 losses are scaled, first by `scale`."""
    config, schedule, scaled = loss.matching.config, loss.matching.schedule, precision == "float16"
    bounds = loss.space.bounds
    x = x.detach().clone().contiguous().requires_grad_(True)
    # one kernel on CUDA, where it also skips the steps of a scale that is too large without a wait of the host
    fused = x.is_cuda or None
    optimizer = torch.optim.Adam([x], lr=schedule.lr, betas=config.betas, fused=fused)  # type: ignore[arg-type]
    # The released code shares one scaler among all batches; here a batch has its own, as results must not depend on
    # which process did what before
    scaler = torch.amp.GradScaler(x.device.type, init_scale=scale, enabled=scaled)
    trace = torch.zeros(len(steps), len(TERMS), device=x.device)  # read at the end: no wait within a step
    skipped = torch.zeros((), device=x.device)
    for i, step in enumerate(steps):
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        terms = loss(x, step, precision)
        optimizer.zero_grad()
        scaler.scale(terms.sum()).backward()
        scaler.step(optimizer)
        if scaled:
            current = _scale_of(scaler)
            before = current.clone()
            scaler.update()
            skipped += current < before
        with torch.no_grad():
            x.clamp_(*bounds)
            trace[i] = terms.detach()
        on_step(step)
    overflowed = float(skipped) > BAD_SHARE * len(steps)
    return Block(x.detach(), trace.cpu(), scaler.get_scale() if scaled else scale, overflowed, precision)


def _scale_of(scaler: torch.amp.GradScaler) -> Tensor:
    """Return the scale () on the device, which `update` changes in place; `get_scale` waits for the device."""
    scale = scaler._get_scale_async()
    assert scale is not None, "no loss has been scaled yet"
    return scale


def class_distance(features: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Mean distance of the mean features of classes to their targets.

    Args:
        features: (B, ...) last features.
        labels: (B,) classes.
        targets: (C, d) mean feature of the real images of each class.
    """
    x = features.flatten(1).float()
    member = F.one_hot(labels, len(targets)).to(x.dtype)  # (B, C)
    counts = member.sum(0)
    present = counts > 0
    means = (member.T @ x)[present] / counts[present, None]
    return torch.linalg.vector_norm(means - targets.to(x)[present], dim=1).mean()
