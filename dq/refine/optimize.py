"""The one loop of the stages that optimize pixels: Adam on a batch of images against frozen teachers, in blocks."""

from __future__ import annotations

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
from dq.networks.teacher import head_inputs
from dq.refine.matched import MatchedTeacher, _ratio, evaluating
from dq.refine.matching import StatMatcher
from dq.refine.method import Callback, Refined, State
from dq.refine.views import Schedule, draw_view, look, resample

log = logging.getLogger("dq")

TERMS = ("cross_entropy", "statistics", "classes", "proximity")  # the weighted terms of the loss, columns of a trace
SCALE = 65536.0  # first loss scale of float16
BAD_SHARE = 0.05  # of the steps of a block that may be lost to overflow in float16 before it is done again
SHOWN = 10  # images of a batch that are kept from the end of every block
SAVE_SECONDS = 60.0  # between two states to go on from, of methods without blocks
STRIPS = 4  # pictures of the first images, spread over the steps, of methods without blocks


@dataclass(frozen=True)
class Progress:
    """Where an interrupted batch goes on: behind a block nothing else is remembered, since Adam starts anew there and
    the draws of a step depend on its number."""

    block: int  # finished blocks
    x: Tensor  # (B, 3, D, D) normalized, not yet merged
    trace: Tensor  # (steps so far, 4)
    blocks: Tensor
    precision: str  # of the blocks to come
    scale: float  # of losses in float16

    def state(self) -> State:
        facts = {"block": self.block, "precision": self.precision, "scale": self.scale}
        return State({"x": self.x, "trace": self.trace, "blocks": self.blocks}, facts, len(self.trace))

    @staticmethod
    def of(state: State) -> Progress:
        t, f = state.tensors, state.facts
        return Progress(f["block"], t["x"], t["trace"], t["blocks"], f["precision"], f["scale"])


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
    config: MatchingConfig,
    schedule: Schedule,
    critics: Sequence[MatchedTeacher],
    choose: Callable[[int], int],
    seed: int,
    anchors: Tensor | Callable[[Tensor, int], Tensor] | None = None,
    image_weights: Tensor | None = None,
    resume: State | None = None,
    callback: Callback | None = None,
) -> Refined:
    """Minimise CE(f(A(x)), y) + r_bn S_f(A(x)) + ... over the pixels of a batch.

    x is kept in the normalization of the first teacher, in which the learning rate is meant, and within the range of
    pixels. The teacher f of step t is `critics[choose(t)]`, the view A of step t is drawn from (seed, t). Every block
    has an Adam of its own, so that no moment describes another image (FADRM's released code).

    Args:
        start: (B, 3, S, S) float32 in [0, 1], where the first block begins.
        labels: (B,) classes.
        anchors: (B, 3, S, S) in [0, 1], what merges bring back; or a function of the images at hand (B, 3, S, S) in
            [0, 1] and the number of the merge that gives them; None: `start`.
        image_weights: (B,) for `config.weighted`.
        callback: told of every step, and behind every block but the last what `resume` takes to go on from there.

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
    callback = callback or Callback()
    start_at = Progress.of(resume) if resume else None
    precision, scale = (
        (start_at.precision, start_at.scale) if start_at else (resolve_dtype(config.dtype, device, "training"), SCALE)
    )
    with evaluating([c.teacher for c in critics]):
        ratios = [1.0] * len(critics)
        if config.depth.renorm == "scale" and any((c.kept != c.weights).any() for c in critics):
            first = resample(x0, schedule.sizes[0])
            ratios = [_ratio(c, first * std + mean, config, schedule, seed, i, weights) for i, c in enumerate(critics)]
        matchers = [
            StatMatcher(c.layers, c.kept, norm=config.norm, image_weights=weights, targets=c.targets) for c in critics
        ]

        def step_loss(x: Tensor, step: int) -> Tensor:
            """The terms of the loss (4,) at a step."""
            i = choose(step)
            critic = critics[i]
            size = x.shape[-1]
            seen = look(x, draw_view(config, size, schedule.jitter, seed=seed, step=step)) * std + mean
            half = torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32")
            heads = head_inputs(critic.teacher.net, enabled=critic.class_means is not None)
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

        done = start_at.block if start_at else 0
        trace = [start_at.trace] if start_at else []
        ends = [start_at.blocks] if start_at else [start[None, :SHOWN].cpu()]

        def pixels(x: Tensor) -> Tensor:
            return resample((x * std + mean).clamp(0, 1), side)

        x = start_at.x.to(device) if start_at else resample(x0, schedule.sizes[0])
        for block in range(done, len(schedule.sizes)):
            if block:  # merge behind the block before
                given = anchors(pixels(x).cpu(), block - 1) if callable(anchors) else anchors
                x = resample(x, schedule.sizes[block])
                if schedule.alpha < 1:
                    anchor = x0 if given is None else (given.to(device) - mean) / std
                    x = schedule.alpha * x + (1 - schedule.alpha) * resample(anchor, schedule.sizes[block])
            first_step = sum(schedule.steps[:block])
            steps = range(first_step, first_step + schedule.steps[block])
            walk = (x, steps, step_loss, schedule, config, (low, high), callback.step)
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
            if block + 1 < len(schedule.sizes):
                progress = Progress(block + 1, x.cpu(), torch.cat(trace), torch.cat(ends), precision, scale)
                callback.save(progress.state())
        return Refined(pixels(x).cpu(), torch.cat(trace), TERMS, torch.cat(ends), precision=precision)


def _block(
    x: Tensor,
    steps: range,
    step_loss: Callable[[Tensor, int], Tensor],
    schedule: Schedule,
    config: MatchingConfig,
    bounds: tuple[Tensor, Tensor],
    on_step: Callable[[int], None],
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
    skipped, scale_now = 0, scale or SCALE
    for i, step in enumerate(steps):
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        terms = step_loss(x, step)
        optimizer.zero_grad()
        scaler.scale(terms.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if scale is not None:
            before, scale_now = scale_now, scaler.get_scale()  # read once in a step, since the host waits for it
            skipped += scale_now < before
        with torch.no_grad():
            x.clamp_(*bounds)
            trace[i] = terms.detach()
        on_step(step)
    return (
        x.detach(),
        trace.cpu(),
        scale_now,
        skipped > BAD_SHARE * len(steps),
    )


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
