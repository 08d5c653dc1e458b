"""Teddy: a short refinement against a pool of labeling teachers.

Yu et al., "Teddy: Efficient Large-Scale Dataset Distillation via Taylor-Approximated Matching", ECCV 2024, arXiv
2410.07579. The paper expands the loss along the training of a student to first order, so that statistics of features
at different stages of training are all that is left to match. Its hyper-parameters were not at hand: what is set here
are SRe2L's, shortened for images that look real already. Not a reproduction.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from dq.config.refinement import Teddy
from dq.core.plain import PlainDict
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
from dq.refine.method import Batch, Context, Cost, GroupNeeds, Method, Needs, Refined, Resources, Session
from dq.refine.optimize import SHOWN, TERMS, Matching, optimize
from dq.refine.views import Schedule


def schedule_of(config: Teddy, *, side: int) -> Schedule:
    """One block at the images' own size."""
    jitter = side // 8 if config.jitter is None else config.jitter
    return Schedule((side,), (config.steps,), config.lr, jitter=jitter)


def refine(
    batch: Batch,
    config: Teddy,
    teachers: Sequence[Teacher],
    session: Session | None = None,
    *,
    matched: Sequence[MatchedTeacher] | None = None,
    labelers: Sequence[Teacher] = (),
) -> Refined:
    """Refine one batch against a pool and label it by the ensemble.

        L = CE(f(A(x)), y) + r_bn S_f(A(x)) + class_weight D_f(A(x)) + proximity |x - x_0|^2 / numel

    A pure function of its arguments, which are as for `dq.refine.fadrm.refine`; `labelers` label the result with
    `config.ensemble_labels`, or the teachers if there are none.

    Returns:
        Images of the same shape; with `config.ensemble_labels`, soft labels (B, C).
    """
    session, side = session or Session(), batch.images.shape[-1]
    if matched is None:
        check_alone(config)
    if config.steps == 0:
        refined = Refined(batch.images, torch.zeros(0, len(TERMS)), TERMS, batch.images[None, :SHOWN])
    else:
        matched = matched or match_teachers(teachers, config, side=side, sizes=(side,))
        teacher_of = functools.partial(member_of_step, members=len(teachers), seed=session.seed)
        matching = Matching(config, schedule_of(config, side=side), matched, teacher_of)
        refined = optimize(batch.images, batch.labels, matching, session, image_weights=batch.weights)
    if not config.ensemble_labels:
        return refined
    soft = pooled_logits(labelers or teachers, refined.images)
    return dataclasses.replace(refined, soft_labels=soft, label_kind="logits")


class TeddyMethod(Method):
    """Teddy as a stage of a run."""

    config = Teddy

    def resolve(self, stage: Teddy, context: Context) -> Teddy:
        return resolve_depth(stage, context)

    def needs(self, stage: Teddy) -> Needs:
        groups = None if stage.groups == "none" else GroupNeeds(stage.groups, stage.statistics == "group")
        return Needs(class_features=stage.class_weight > 0, groups=groups)

    def prepare(self, stage: Teddy, resources: Resources, first: Batch, *, seed: int) -> PlainDict:
        return matching_facts(stage, schedule_of(stage, side=resources.side), resources, first, seed=seed)

    def run(self, batch: Batch, stage: Teddy, resources: Resources, session: Session) -> Refined:
        matched = matched_teachers(stage, schedule_of(stage, side=resources.side), resources)
        matched = with_statistics(matched, batch.statistics)
        return refine(batch, stage, resources.matched, session, matched=matched, labelers=resources.teachers)

    def brief(self, stage: Teddy) -> Teddy:
        return dataclasses.replace(alone(stage), steps=min(stage.steps, 4), ensemble_labels=False)

    def cost(self, stage: Teddy, context: Context) -> Cost:
        return Cost(stage.steps, largest_batch(stage.compose, stage.batch_size, context.classes))


@torch.no_grad()
def score(images: Tensor, teachers: Sequence[Teacher], config: Teddy | None = None) -> Tensor:
    """Distances (M, L) of a batch to running statistics of teachers by layer.

    Without weights of layers; NaN where a teacher has fewer layers. Images (B, 3, S, S) float32 in [0, 1] are seen as
    they are.
    """
    config = config or Teddy()
    side = images.shape[-1]
    rows = []
    with evaluating(teachers):
        for t in match_teachers(teachers, config, side=side, sizes=(side,)):
            with StatMatcher(t.layers, torch.ones(len(t.layers)), norm=config.norm) as matcher:
                t.teacher(images.to(next(t.teacher.net.parameters()).device))
                rows.append(matcher.terms().cpu())
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))
