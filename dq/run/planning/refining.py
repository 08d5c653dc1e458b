"""What a step of a stage of refinement costs."""

from __future__ import annotations

from typing import Any

import torch

from dq.config.refinement import RefineConfig
from dq.diffusion.image_codec import ImageCodec
from dq.networks.teacher import Teacher
from dq.networks.trajectories import open_experts
from dq.refine.method import Batch, Context, RealImages, Resources, Session
from dq.refine.registry import method_of
from dq.run.planning.clock import Speed, random_pixels, timed

REAL_IMAGES = 1024  # train images that stand in for all
WHOLE_SET = 500  # images at most of a set that is refined as a whole


def refining_speed(
    stage: RefineConfig,
    teachers: tuple[Teacher, ...],
    classes: int,
    side: int,
    device: Any,
    *,
    images: int,
    codec: ImageCodec | None = None,
) -> Speed:
    """Time a step of a stage, forward and backward, over steps of every kind.

    Args:
        stage: settings of the stage.
        teachers: the teachers.
        classes: number of classes.
        side: side of the images in px.
        device: where to compute.
        images: images of the set.
        codec: the run's, for a stage that needs it.
    """
    method = method_of(stage)
    context = Context(side, sum(t.matched for t in teachers), classes=classes)
    short = method.brief(method.resolve(stage, context))
    cost = method.cost(short, context)
    steps = max(1, cost.steps)
    real = None
    if method.needs(short).real_images:
        real = RealImages(random_pixels(REAL_IMAGES, side), torch.arange(REAL_IMAGES) % classes)
    folder = method.needs(short).experts
    experts = open_experts(folder) if folder else None
    on = torch.device(device)
    resources = Resources(side, classes, teachers, real=real, experts=experts, codec=codec, device=on)
    set_size = min(images, WHOLE_SET)

    def prepare(size: int) -> Batch:
        return Batch(random_pixels(size, side).float() / 255, torch.arange(size) % 2)

    def work(batch: Batch) -> None:
        method.run(batch, short, resources, Session())

    # what a step of a whole set costs does not grow with its images alone, so that a part would not tell
    largest, smallest = (set_size, set_size) if cost.batch_size is None else (cost.batch_size, 1)
    timing = timed(work, largest, smallest=smallest, device=device, prepare=prepare)
    return Speed(timing.seconds / steps, timing.least / steps, timing.most / steps, timing.batch)
