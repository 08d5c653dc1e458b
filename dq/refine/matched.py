"""Matched teachers: their layers, weights, and calibrated r_bn."""

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
from dq.core.plain import PlainDict
from dq.networks.teacher import Teacher, evaluation_mode
from dq.refine.matching import Layer, StatMatcher, layer_weights, trace_layers
from dq.refine.method import Batch, Resources
from dq.refine.moments import Moments
from dq.refine.views import Schedule, apply_view, draw_view, resample

M = TypeVar("M", bound=MatchingConfig)
CALIBRATION_VIEWS = 8


@dataclass(frozen=True)
class MatchedTeacher:
    """A teacher with the layers whose statistics are matched."""

    teacher: Teacher
    layers: tuple[Layer, ...]  # in the order of calls; empty for a network without batch norm
    weights: Tensor  # (L,) of all layers
    matched_weights: Tensor  # (L,) of the layers that are matched; 0 for others
    r_bn: float
    classes: int  # outputs of the teacher
    class_means: Tensor | None = None  # (C, d) mean last feature of the real images of each class
    targets: tuple[Moments, ...] | None = None  # (C_l,) by layer, which are matched; None: the running statistics

    def matcher(self, weights: Tensor, config: MatchingConfig, image_weights: Tensor | None) -> StatMatcher:
        """A matcher of the layers with weights (L,), for images with weights (B,)."""
        options: PlainDict = {"norm": config.norm, "image_weights": image_weights, "targets": self.targets}
        return StatMatcher(self.layers, weights, **options)


def match_teachers(
    teachers: Sequence[Teacher],
    config: MatchingConfig,
    *,
    side: int,
    sizes: Sequence[int],
    class_means: Sequence[Tensor | None] | None = None,
) -> tuple[MatchedTeacher, ...]:
    """Find the layers and weights of teachers that are matched.

    Args:
        teachers: networks of the classes.
        config: settings.
        side: of the images, px.
        sizes: sides in px at which the teachers will see images.
        class_means: (C, d) mean features of real images, by teacher.

    Raises:
        InputError: for a teacher that cannot see images of one of these sizes; if none has batch norm.
    """
    if not teachers:
        raise InputError("refinement needs a teacher; set teachers, or refine.N.teachers")
    matched = []
    for i, teacher in enumerate(teachers):
        with evaluating([teacher]):
            classes = min(_check_side(teacher, size) for size in sorted({side, *sizes}))
            layers = trace_layers(teacher.net, functools.partial(_gray, teacher, side))
        weights, matched_weights = layer_weights(layers, config.depth, first_weight=config.first_bn_weight)
        means = class_means[i] if class_means else None
        matched.append(MatchedTeacher(teacher, tuple(layers), weights, matched_weights, config.r_bn, classes, means))
    if config.r_bn and not any(t.layers for t in matched):
        names = ", ".join(t.name for t in teachers)
        raise InputError(
            f"no teacher has batch norm ({names}), whose statistics are matched; add one that has, or set r_bn=0 "
            "for the cross-entropy alone"
        )
    return tuple(matched)


def check_alone(config: MatchingConfig) -> None:
    """Refuse settings that need other images than those of a batch.

    Raises:
        InputError: that names the first of them.
    """
    needs = {
        "bn_share": config.bn_share is not None,
        "class_weight": config.class_weight > 0,
        "depth.drop=null": config.depth.drop is None,
        "statistics=group": config.statistics == "group",
    }
    for name, is_set in needs.items():
        if is_set:
            raise InputError(
                f"{name} is worked out by a run; for a batch alone give `matched` that know it, or unset it"
            )


def alone(config: M, **changes: Any) -> M:
    """Settings without those that `check_alone` refuses, and with other changes."""
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
        message = " ".join(str(e).split())[:120]
        raise InputError(
            f"the teacher {teacher.name} cannot see images of {size} px ({message}); set sizes to the side it was "
            "made for, or its image_size, to which every image is then resized"
        ) from e


@torch.no_grad()
def depth_ratio(
    teacher: MatchedTeacher,
    pixels: Tensor,
    config: MatchingConfig,
    schedule: Schedule,
    seed: int,
    number: int,
    image_weights: Tensor | None,
) -> float:
    """Ratio of the distance over all layers to that over the matched ones.

    At the start, in the view of step `number`.
    """
    sums = []
    images = apply_view(pixels, draw_view(config, pixels.shape[-1], schedule.jitter, seed=seed, step=number))
    for weights in (teacher.matched_weights, teacher.weights):
        with teacher.matcher(weights, config, image_weights) as matcher:
            teacher.teacher(images)
            sums.append(float(matcher.distance()))
    return sums[1] / sums[0] if sums[0] > 0 else 1.0


@torch.no_grad()
def calibrate(
    matched: Sequence[MatchedTeacher],
    start: Tensor,
    config: MatchingConfig,
    schedule: Schedule,
    classes: int,
    *,
    seed: int,
    image_weights: Tensor | None = None,
) -> list[float]:
    """Calibrate r_bn of every teacher by `config.bn_share`.

    r_bn S at the start is `bn_share` times ln(classes), the cross-entropy of a guess; S is the mean over a few views
    of images (B, 3, S, S) in [0, 1]. Without `bn_share` r_bn stays.

    What a distance of statistics weighs depends on the depth and the width of a network: r_bn = 0.01 is FADRM's for a
    ResNet-18, and users report a hundred times the distance for a ResNet-50.
    """
    if config.bn_share is None:
        return [t.r_bn for t in matched]
    rates = []
    for teacher in matched:
        if not teacher.layers:
            rates.append(0.0)
            continue
        device = next(teacher.teacher.net.parameters()).device
        pixels = resample(start.to(device), schedule.sizes[0])
        sums = []
        # with renorm=scale the sum of the kept layers begins as large as that of all
        layer_weights = teacher.weights if config.depth.renorm == "scale" else teacher.matched_weights
        weights = None if image_weights is None else image_weights.to(device)
        with evaluating([teacher.teacher]), teacher.matcher(layer_weights, config, weights) as matcher:
            for step in range(CALIBRATION_VIEWS):
                view = draw_view(config, pixels.shape[-1], schedule.jitter, seed=seed, step=step)
                teacher.teacher(apply_view(pixels, view))
                sums.append(float(matcher.distance()))
        mean = sum(sums) / len(sums)
        rates.append(config.bn_share * math.log(classes) / mean if mean > 0 else config.r_bn)
    return rates


def matched_teachers(
    config: MatchingConfig, schedule: Schedule, resources: Resources, *, calibrated: bool = True
) -> tuple[MatchedTeacher, ...]:
    """Match the teachers of a run; none without steps.

    With `calibrated` r_bn is that of `matching_facts`.
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
    return tuple(dataclasses.replace(t, r_bn=rate) for t, rate in zip(matched, rates, strict=True))


def with_statistics(
    matched: Sequence[MatchedTeacher], statistics: Sequence[Moments] | None
) -> tuple[MatchedTeacher, ...]:
    """Match teachers to the statistics of a batch, see `Batch.statistics`; None: unchanged."""
    if statistics is None:
        return tuple(matched)
    teachers = []
    for t, moments in zip(matched, statistics, strict=True):
        split = zip(moments.split([a.channels for a in t.layers]), t.layers, strict=True)
        targets = tuple(Moments(m.mean.to(a.mean), m.var.to(a.var)) for m, a in split)
        teachers.append(dataclasses.replace(t, targets=targets))
    return tuple(teachers)


def matching_facts(
    config: MatchingConfig, schedule: Schedule, resources: Resources, first: Batch, *, seed: int
) -> PlainDict:
    """Name, digest, layers and r_bn of every teacher, which all batches share."""
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
                "layers": [{"name": a.name, "weight": w} for a, w in _weighted_layers(t)],
            }
            for t, rate in zip(matched, rates, strict=True)
        ]
    }


def _weighted_layers(t: MatchedTeacher) -> Iterator[tuple[Layer, float]]:
    return zip(t.layers, t.matched_weights.tolist(), strict=True)


@contextlib.contextmanager
def evaluating(teachers: Sequence[Teacher]) -> Iterator[None]:
    """Put the teachers' networks in evaluation mode without gradients, and back."""
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
