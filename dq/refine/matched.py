"""Teachers as they are matched: layers, weights, and r_bn calibrated on the first images."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from dq.config.refinement import MatchingConfig
from dq.core.errors import InputError
from dq.networks.teacher import Teacher, evaluation_mode
from dq.refine.matching import Layer, StatMatcher, layer_weights, trace_layers
from dq.refine.method import Batch, Resources
from dq.refine.moments import Moments
from dq.refine.views import Schedule, draw_view, look, resample

M = TypeVar("M", bound=MatchingConfig)
CALIBRATION_VIEWS = 8


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
    targets: tuple[Moments, ...] | None = None  # (C_l,) by layer, which are matched; None: the running statistics


def match_teachers(
    teachers: Sequence[Teacher],
    config: MatchingConfig,
    *,
    side: int,
    sizes: Sequence[int],
    class_means: Sequence[Tensor | None] | None = None,
) -> tuple[MatchedTeacher, ...]:
    """Teachers as critics of images.

    Args:
        sizes: sides in px at which the teachers will see images.

    Raises:
        InputError: for a teacher that cannot see images of one of these sizes; if none has batch norm.
    """
    if not teachers:
        raise InputError("refinement needs a teacher; set teachers, or refine.N.teachers")
    critics = []
    for i, teacher in enumerate(teachers):
        with evaluating([teacher]):
            classes = min(_check_side(teacher, size) for size in sorted({side, *sizes}))
            layers = trace_layers(teacher.net, functools.partial(_gray, teacher, side))
        weights, kept = layer_weights(layers, config.depth, first_weight=config.first_bn_weight)
        means = class_means[i] if class_means else None
        critics.append(MatchedTeacher(teacher, tuple(layers), weights, kept, config.r_bn, classes, means))
    if config.r_bn and not any(c.layers for c in critics):
        names = ", ".join(t.name for t in teachers)
        raise InputError(
            f"no teacher has batch norm ({names}), whose statistics are matched; add one that has, or set r_bn=0 "
            "for the cross-entropy alone"
        )
    return tuple(critics)


def check_alone(config: MatchingConfig) -> None:
    """Refuse settings that a batch alone cannot follow, since they need other images or the whole set.

    Raises:
        InputError: that names the first of them.
    """
    needs = {
        "bn_share": config.bn_share is not None,
        "class_weight": config.class_weight > 0,
        "depth.drop=null": config.depth.drop is None,
        "statistics=group": config.statistics == "group",
    }
    for name, set_ in needs.items():
        if set_:
            raise InputError(
                f"{name} is worked out by a run; for a batch alone give `critics` that know it, or unset it"
            )


def alone(config: M, **changes: Any) -> M:
    """Settings without what a batch alone cannot follow, see `check_alone`, and with other changes."""
    depth = dataclasses.replace(config.depth, drop=config.depth.drop or 0.0)
    changes |= {"bn_share": None, "class_weight": 0.0, "depth": depth, "groups": "none", "statistics": "running"}
    return dataclasses.replace(config, **changes)


@torch.no_grad()
def _gray(teacher: Teacher, size: int) -> Tensor:
    device = next(teacher.net.parameters()).device
    return teacher(torch.full((2, 3, size, size), 0.5, device=device))


def _check_side(teacher: Teacher, size: int) -> int:
    """Outputs of a teacher for an image of this side."""
    try:
        return _gray(teacher, size).shape[1]
    except (AssertionError, RuntimeError, ValueError) as e:
        said = " ".join(str(e).split())[:120]
        raise InputError(
            f"the teacher {teacher.name} cannot see images of {size} px ({said}); set sizes to the side it was made "
            "for, or its image_size, to which every image is then resized"
        ) from e


@torch.no_grad()
def _ratio(
    critic: MatchedTeacher,
    pixels: Tensor,
    config: MatchingConfig,
    schedule: Schedule,
    seed: int,
    number: int,
    image_weights: Tensor | None,
) -> float:
    """How many times smaller the kept layers' sum is than that of all, at the first view of the start."""
    sums = []
    seen = look(pixels, draw_view(config, pixels.shape[-1], schedule.jitter, seed=seed, step=number))
    for weights in (critic.kept, critic.weights):
        options: dict[str, Any] = {"norm": config.norm, "image_weights": image_weights, "targets": critic.targets}
        with StatMatcher(critic.layers, weights, **options) as matcher:
            critic.teacher(seen)
            sums.append(float(matcher.distance()))
    return sums[1] / sums[0] if sums[0] > 0 else 1.0


@torch.no_grad()
def calibrate(
    critics: Sequence[MatchedTeacher],
    start: Tensor,
    config: MatchingConfig,
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
        options: dict[str, Any] = {"norm": config.norm, "image_weights": weights, "targets": critic.targets}
        matcher = StatMatcher(critic.layers, kept, **options)
        with evaluating([critic.teacher]), matcher:
            for step in range(CALIBRATION_VIEWS):
                view = draw_view(config, pixels.shape[-1], schedule.jitter, seed=seed, step=step)
                critic.teacher(look(pixels, view))
                sums.append(float(matcher.distance()))
        mean = sum(sums) / len(sums)
        rates.append(config.bn_share * math.log(classes) / mean if mean > 0 else config.r_bn)
    return rates


def matched_teachers(
    config: MatchingConfig, schedule: Schedule, resources: Resources, *, calibrated: bool = True
) -> tuple[MatchedTeacher, ...]:
    """The teachers of a run as they are matched; none without steps.

    Args:
        calibrated: with r_bn as `matching_facts` found them.
    """
    if not sum(schedule.steps):
        return ()

    def make() -> tuple[MatchedTeacher, ...]:
        return match_teachers(
            resources.matched,
            config,
            side=resources.side,
            sizes=schedule.sizes,
            class_means=resources.class_means,
        )

    matched = resources.once("matched", make)
    if not calibrated or "teachers" not in resources.facts:
        return matched
    rates = [t["r_bn"] for t in resources.facts["teachers"]]
    return tuple(dataclasses.replace(t, r_bn=rate) for t, rate in zip(matched, rates))


def with_statistics(
    matched: Sequence[MatchedTeacher], statistics: Sequence[Moments] | None
) -> tuple[MatchedTeacher, ...]:
    """Teachers whose layers are matched to the statistics of a batch, see `Batch.statistics`; None: as they are."""
    if statistics is None:
        return tuple(matched)
    teachers = []
    for t, moments in zip(matched, statistics):
        split = moments.split([a.channels for a in t.layers])
        targets = tuple(Moments(m.mean.to(a.mean), m.var.to(a.var)) for m, a in zip(split, t.layers))
        teachers.append(dataclasses.replace(t, targets=targets))
    return tuple(teachers)


def matching_facts(
    config: MatchingConfig, schedule: Schedule, resources: Resources, first: Batch, *, seed: int
) -> dict[str, Any]:
    """What all batches share: name, digest, layers and r_bn of every teacher; see `calibrate`."""
    matched = with_statistics(matched_teachers(config, schedule, resources, calibrated=False), first.statistics)
    rates = [t.r_bn for t in matched]
    if matched and config.bn_share is not None:
        rates = calibrate(
            matched, first.images, config, schedule, resources.classes, seed=seed, image_weights=first.weights
        )
    return {
        "teachers": [
            {
                "name": t.teacher.name,
                "digest": t.teacher.digest,
                "r_bn": rate,
                "layers": [{"name": a.name, "weight": w} for a, w in zip(t.layers, t.kept.tolist())],
            }
            for t, rate in zip(matched, rates)
        ]
    }


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
