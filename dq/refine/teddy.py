"""Teddy: a short refinement against a pool of weak teachers, and the pool as labeller (Yu et al., "Teddy: Efficient
Large-Scale Dataset Distillation via Taylor-Approximated Matching", ECCV 2024, arXiv 2410.07579).

The paper expands the loss along the training of a student to first order, so that statistics of features at different
stages of training are all that is left to match. Its hyper-parameters were not at hand: what is set here are SRe2L's,
shortened for images that look real already. Not a reproduction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dq.config.refinement import Teddy
from dq.networks.pool import member_of_step
from dq.networks.teacher import Teacher, pooled_logits
from dq.refine.batches import largest_batch
from dq.refine.matched import (
    MatchedTeacher,
    alone,
    check_alone,
    evaluating,
    match_teachers,
    matched_teachers,
    matching_facts,
    with_statistics,
)
from dq.refine.matching import StatMatcher, resolve_depth
from dq.refine.method import Batch, Callback, Context, Cost, Method, Needs, Refined, Resources, State
from dq.refine.optimize import SHOWN, TERMS, optimize
from dq.refine.views import Schedule


def schedule_of(config: Teddy, *, side: int) -> Schedule:
    """One block at the images' own size."""
    jitter = side // 8 if config.jitter is None else config.jitter
    return Schedule((side,), (config.steps,), config.lr, jitter=jitter)


def refine(
    images: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    config: Teddy,
    teachers: Sequence[Teacher],
    *,
    critics: Sequence[MatchedTeacher] | None = None,
    labellers: Sequence[Teacher] = (),
    seed: int = 0,
    resume: State | None = None,
    callback: Callback | None = None,
) -> Refined:
    """Refine one batch against the statistics of a pool, one teacher per step, and label it by the ensemble; a pure
    function of its arguments.

        L = CE(f(A(x)), y) + r_bn S_f(A(x)) + class_weight D_f(A(x)) + proximity |x - x_0|^2 / numel

    Args:
        images, labels, weights, config, teachers, critics: as for `dq.refine.fadrm.refine`.
        labellers: who label the result with `config.ensemble_labels`; none: the teachers.

    Returns:
        Images of the same shape; with `config.ensemble_labels`, soft labels (B, C).
    """
    if critics is None:
        check_alone(config)
    side = images.shape[-1]
    schedule = schedule_of(config, side=side)
    if config.steps == 0:
        empty = torch.zeros(0, 4)
        refined = Refined(images, empty, TERMS, images[None, :SHOWN])
    else:
        critics = critics or match_teachers(teachers, config, side=side, sizes=(side,))
        refined = optimize(
            images,
            labels,
            config=config,
            schedule=schedule,
            critics=critics,
            choose=lambda step: member_of_step(step, len(teachers), seed),
            seed=seed,
            image_weights=weights,
            resume=resume,
            callback=callback,
        )
    if not config.ensemble_labels:
        return refined
    soft = pooled_logits(labellers or teachers, refined.images)
    return dataclasses.replace(refined, soft_labels=soft, label_kind="logits")


class TeddyMethod(Method):
    """Teddy as a stage of a run."""

    config = Teddy

    def resolve(self, stage: Teddy, context: Context) -> Teddy:
        return resolve_depth(stage, context)

    def needs(self, stage: Teddy) -> Needs:
        return Needs(
            groups=None if stage.groups == "none" else stage.groups,
            group_statistics=stage.statistics == "group",
            class_features=stage.class_weight > 0,
        )

    def prepare(self, stage: Teddy, resources: Resources, first: Batch, *, seed: int) -> dict[str, Any]:
        return matching_facts(stage, schedule_of(stage, side=resources.side), resources, first, seed=seed)

    def run(
        self,
        batch: Batch,
        stage: Teddy,
        resources: Resources,
        *,
        seed: int,
        resume: State | None = None,
        callback: Callback | None = None,
    ) -> Refined:
        matched = matched_teachers(stage, schedule_of(stage, side=resources.side), resources)
        return refine(
            batch.images,
            batch.labels,
            batch.weights,
            stage,
            resources.matched,
            critics=with_statistics(matched, batch.statistics),
            labellers=resources.teachers,
            seed=seed,
            resume=resume,
            callback=callback,
        )

    def brief(self, stage: Teddy) -> Teddy:
        return dataclasses.replace(alone(stage), steps=min(stage.steps, 4), ensemble_labels=False)

    def cost(self, stage: Teddy, context: Context) -> Cost:
        return Cost(stage.steps, largest_batch(stage.compose, stage.batch_size, context.classes))


@torch.no_grad()
def score(images: Tensor, teachers: Sequence[Teacher], config: Teddy | None = None) -> Tensor:
    """How far a batch is from the teachers' data at each depth: for every teacher the distances of its layers, without
    weights; (M, L) padded with NaN where a teacher has fewer layers.

    Args:
        images: (B, 3, S, S) float32 in [0, 1], seen as they are.
    """
    config = config or Teddy()
    side = images.shape[-1]
    critics = match_teachers(teachers, config, side=side, sizes=(side,))
    rows = []
    with evaluating(teachers):
        for critic in critics:
            with StatMatcher(critic.layers, torch.ones(len(critic.layers)), norm=config.norm) as matcher:
                critic.teacher(images.to(next(critic.teacher.net.parameters()).device))
                rows.append(torch.stack([t.cpu() for t in matcher.terms()]) if critic.layers else torch.zeros(0))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))
