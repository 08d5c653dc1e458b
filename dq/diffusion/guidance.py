"""Guidance of images by their prototypes and by one another.

Each kind changes the predicted x_0 in an interval of the time grid and recomputes the model output from it, so that it
works with any scheduler. Guidance of a class needs its images in one call: they go through the model in chunks, and
each depends on the others, so that neither batch size nor the number of processes matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dq.config.schema import GenerateConfig
from dq.core.memory import run_with_batch_backoff
from dq.core.sinkhorn import sinkhorn
from dq.diffusion.sampling import Level, Predict, Start, clean_and_noise, grid_levels, prediction_type
from dq.diffusion.weaker_models import ClassPredict


def by_prototypes(
    predicts: Sequence[Predict],
    scheduler: object,
    start: Start,
    points: Tensor,
    config: GenerateConfig,
    masses: Tensor | None = None,
) -> list[Predict]:
    """Apply `prototype_guidance`, `measure_guidance` and `repulsion`, in this order.

    Without any of them `predicts` is returned as it is.

    Args:
        predicts: one for every entry of `scheduler.timesteps`.
        scheduler: with its time grid set.
        start: where the trajectory begins.
        points: (B, C, h, w), the prototype of each image. For `measure_guidance` and `repulsion` the batch holds all
            images of a class.
        config: strengths and intervals.
        masses: (B,) of the images; None: uniform.
    """
    steps = toward(
        predicts, scheduler, start, points, share=config.prototype_guidance, stop=config.prototype_guidance_stop
    )
    if config.measure_guidance:
        weights = points.new_ones(len(points)) if masses is None else masses.to(points)
        weights = weights / weights.sum()

        def to_measure(clean: Tensor) -> Tensor:
            return measure_step(
                clean,
                points,
                weights,
                share=config.measure_guidance,
                entropy=config.measure_entropy,
                n_iter=config.measure_iterations,
                image_masses=weights if config.measure_weights == "mass" else None,
            )

        steps = moved_by(to_measure, steps, scheduler, start, config.measure_interval)
    if config.repulsion:

        def apart(clean: Tensor) -> Tensor:
            return repulsion_step(clean, rate=config.repulsion, ridge=config.repulsion_ridge)

        steps = moved_by(apart, steps, scheduler, start, config.repulsion_interval)
    return steps


def toward(
    predicts: Sequence[Predict], scheduler: object, start: Start, target: Tensor, *, share: float, stop: float
) -> list[Predict]:
    """Prototype guidance: x_0' = x_0 + share * (target - x_0).

    It acts in the first `stop` share of the model evaluations from `start` on. MGD3 (Chan-Santiago et al. 2025) adds a
    multiple of (target - x_0) times the noise level to the predicted noise, which moves x_0 most where the noise is
    strong; here x_0 moves by the same share at every level, and 1 sets it to the target whatever the schedule.

    `predicts` has one entry for every one of `scheduler.timesteps`, and `target` (B, C, h, w) holds the prototypes.
    With `share` 0 `predicts` is returned as it is.
    """
    if share == 0:
        return list(predicts)
    kind = prediction_type(scheduler)

    def pulled(predict: Predict, level: Level) -> Predict:
        a, b = level.signal, level.noise

        def moved(x: Tensor, t: Tensor) -> Tensor:
            out = predict(x, t)
            if kind == "epsilon":  # without dividing by the signal, which is 0 where the grid starts in pure noise
                return out - share / b * (a * target - (x - b * out))
            clean, _ = clean_and_noise(out, x, level, kind)
            step = share * (target - clean)
            return out + step if kind == "sample" else out - step / b

        return moved

    levels = grid_levels(scheduler)
    end = start.index + round(stop * start.calls)
    return [pulled(p, levels[i]) if start.index <= i < end else p for i, p in enumerate(predicts)]


def moved_by(
    move: Callable[[Tensor], Tensor],
    predicts: Sequence[Predict],
    scheduler: object,
    start: Start,
    interval: Sequence[float],
) -> list[Predict]:
    """Predictions whose x_0 is x_0 + move(x_0) in an interval.

    `move` maps the predicted x_0 (B, C, h, w) of all images to their steps, of the same shape. `predicts` has one
    entry for every one of `scheduler.timesteps`. `interval` holds two rising shares, in [0, 1], of the model
    evaluations that are left at `start`. An entry at which predicted noise does not depend on the image (signal 0) is
    left out.
    """
    kind = prediction_type(scheduler)

    def at(predict: Predict, level: Level) -> Predict:
        def moved(x: Tensor, t: Tensor) -> Tensor:
            out = predict(x, t)
            step = move(clean_and_noise(out, x, level, kind)[0])
            if kind == "epsilon":
                return out - level.signal / level.noise * step
            return out + step if kind == "sample" else out - step / level.noise

        return moved

    levels = grid_levels(scheduler)
    first, end = (start.index + round(share * start.calls) for share in interval)
    blind = [kind == "epsilon" and level.signal == 0 for level in levels]
    return [at(p, levels[i]) if first <= i < end and not blind[i] else p for i, p in enumerate(predicts)]


def measure_step(
    clean: Tensor,
    points: Tensor,
    masses: Tensor,
    *,
    share: float,
    entropy: float,
    n_iter: int,
    image_masses: Tensor | None = None,
) -> Tensor:
    """Step of a class's images towards the prototypes as a measure.

    share * (T points / rowsum T - x_0), T the entropic plan from the images to the points with their masses (DMGD,
    arXiv 2605.03877). Points that come several times, each with a part of their mass, count as one.

    Args:
        clean: (B, C, h, w), the predicted images of a class, all of them.
        points: (K, C, h, w).
        masses: (K,), sums to 1.
        share: of the step to the barycentric projection.
        entropy: in units of the mean cost between images and points by their masses. The paper has 0.1.
        n_iter: Sinkhorn iterations. The paper has 5.
        image_masses: (B,), sums to 1; None: uniform, as in the paper.
    """
    x, y = clean.flatten(1), points.to(clean).flatten(1)
    rows = x.new_full((len(x),), 1 / len(x)) if image_masses is None else image_masses.to(x)
    columns, cost = masses.to(x), torch.cdist(x, y).square()
    scaled = -cost / (entropy * (rows @ cost @ columns).clamp(min=1e-30))
    log_a, log_b = rows.log()[None, :, None], columns.log()[None, None]
    plan = sinkhorn(scaled[None], log_a=log_a, log_b=log_b, n_iter=n_iter)[0]
    target = plan @ y / plan.sum(1, keepdim=True)
    return share * (target - x).view_as(clean)


def repulsion_step(clean: Tensor, *, rate: float, ridge: float) -> Tensor:
    """Repulsion: -rate |x|^2 times the gradient of -log det(K + ridge I).

    K holds the cosines of the images of a class. The published step (CVPR 2026, of which only a note was available)
    moves the noisy latents. Here it moves the predicted images, whose directions are not those of the noise, and |x|^2
    makes it grow with the latents, so that `rate` does not depend on their length. The gradient is closed: with u = x
    / |x| it is -2 (K + ridge I)^-1 u, less its part along u, over |x|.

    Args:
        clean: (B, C, h, w), the predicted images of a class, all of them.
        rate: 0 is no step.
        ridge: positive; keeps equal images from an infinite step.
    """
    x = clean.flatten(1)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-12)
    u = x / length
    gram = u @ u.T + ridge * torch.eye(len(u), dtype=u.dtype, device=u.device)
    gradient = -2 * torch.linalg.solve(gram, u)
    tangent = gradient - (gradient * u).sum(1, keepdim=True) * u
    return (-rate * length * tangent).view_as(clean)


def in_chunks(predict: ClassPredict, size: int) -> ClassPredict:
    """Call a model on at most `size` images at a time.

    Fewer where memory is short. The result is the same, up to the rounding with which batch sizes differ.
    """

    def chunked(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        def part(first: int) -> Tensor:
            rows = slice(first, first + size)
            xs, conditions = x[rows], condition[rows]
            return run_with_batch_backoff(
                "denoise", len(xs), lambda s: predict(xs[s], t, conditions[s]), like=tuple(x.shape[1:])
            )

        return torch.cat([part(first) for first in range(0, len(x), size)])

    return chunked
