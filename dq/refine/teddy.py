"""Teddy: a short refinement against a pool of weak teachers, and the pool as labeller (Yu et al., "Teddy: Efficient
Large-Scale Dataset Distillation via Taylor-Approximated Matching", ECCV 2024, arXiv 2410.07579).

The paper expands the loss along the training of a student to first order, so that statistics of features at different
stages of training are all that is left to match. Its hyper-parameters were not at hand: what is set here are SRe2L's,
shortened for images that look real already. Not a reproduction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dq.config.refinement import Teddy
from dq.networks.pool import member_of_step
from dq.networks.teacher import Teacher, pooled_logits
from dq.refine.matching import StatMatcher
from dq.refine.optimize import (
    MatchedTeacher,
    Progress,
    Refined,
    Schedule,
    check_alone,
    evaluating,
    match_teachers,
    optimize,
)


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
    resume: Progress | None = None,
    on_block: Callable[[Progress], None] | None = None,
    on_step: Callable[[int], None] | None = None,
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
        refined = Refined(images, empty, images[None])
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
            on_block=on_block,
            on_step=on_step,
        )
    if not config.ensemble_labels:
        return refined
    soft = pooled_logits(labellers or teachers, refined.images)
    return Refined(refined.images, refined.trace, refined.blocks, soft, refined.precision)


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
