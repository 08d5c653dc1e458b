"""Seconds and bytes of stages: counts of operations times measured seconds of one.

Symbols and a worked example are in docs/how-to/many-machines.md.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dq.config.pruning import PruneConfig
from dq.config.schema import ClusterConfig, GenerateConfig, RunConfig
from dq.core.plain import PlainMapping
from dq.core.processes import cut
from dq.core.seeds import digest_of
from dq.core.text import plural
from dq.data.image_cache import MAX_IMAGES, MIN_IMAGES
from dq.evaluation.baselines import BY_FEATURES, BY_PREDICTION
from dq.run.planning.sets import PlannedSet, planned_sets

if TYPE_CHECKING:
    from dq.data.source import ImageSource

CELL = 2  # bytes of a latent's number in the cache (float16)
POINT_CELL = 8  # bytes of a prototype's number: centroid and medoid in float32
ROW = 12  # bytes of a row number and a label beside each latent
SCORED = 32  # bytes of an image's difficulty scores and its row, of one run
POINT = 24  # bytes of mass, squared error and row beside each prototype
MEMBER = 12  # bytes of the row and the cell of each image that is quantized


@dataclass
class StagePlan:
    """What one stage asks for, over all processes."""

    stage: str
    units: str  # in words
    calls: dict[str, float] = field(default_factory=dict)  # operation -> how many times
    each: dict[str, float] = field(default_factory=dict)  # ... and what every process does for itself
    share: float = 1.0  # of the busiest process in `calls`; 1 / processes if the work divides evenly
    bytes: float | None = 0.0  # on disk at its end; None: the shape of latents is not known

    def call(self, operation: str, times: float) -> None:
        self.calls[operation] = self.calls.get(operation, 0.0) + times


def seconds_of(plan: StagePlan, speeds: Mapping[str, float], *, overlap: bool) -> float | None:
    """Seconds until the busiest process is done; None if an operation has no known speed.

    Args:
        plan: operations and bytes of the stage.
        speeds: seconds of one call, by operation.
        overlap: reading runs beside an accelerator, so that the slower of the two counts in `encode`.
    """
    needed = {k: n * plan.share for k, n in plan.calls.items()}
    for operation, times in plan.each.items():
        needed[operation] = needed.get(operation, 0.0) + times
    if any(operation not in speeds for operation, times in needed.items() if times):
        return None
    spent = {operation: times * speeds[operation] for operation, times in needed.items() if times}
    if overlap and plan.stage == "encode":
        return max(spent.values(), default=0.0)
    return sum(spent.values())


def busiest(costs: Sequence[float], processes: int) -> float:
    """Share of all work that the busiest of P processes has.

    The largest unit goes first to the least loaded process (`dq.core.processes.assign_units`).
    """
    total = sum(costs)
    if processes == 1 or not total:
        return 1.0
    loads = [0.0] * processes
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(loads, loads[0] + cost)
    return max(loads) / total


# --- the stages ---------------------------------------------------------------------------------------------------


def stage_plans(
    config: RunConfig,
    source: ImageSource,
    *,
    latent: tuple[int, int, int] | None,
    denoiser_steps: int | None,
    processes: int = 1,
) -> list[StagePlan]:
    """What the stages of `dq run` ask for.

    Args:
        config: what to distill, and how.
        source: the images.
        latent: (C, h, w) of a latent, if known.
        denoiser_steps: denoiser steps of an image; None: all of `num_inference_steps`.
        processes: among which the units are divided.
    """
    sets = planned_sets(config, source)
    counts = source.class_counts().tolist()
    cells = latent[0] * latent[1] * latent[2] if latent else None
    plans = [
        _encode(counts, cells, processes),
        _prune(config, counts, processes),
        _cluster(sets, counts, cells, processes),
        _generate(config, sets, sum(counts), denoiser_steps, processes),
        _refine(config, sets, counts, processes),
        _label(config, sets, processes),
        _evaluate(config, source, sets, processes),
    ]
    return [p for p in plans if p.calls or p.bytes]


def _encode(counts: Sequence[int], cells: int | None, processes: int) -> StagePlan:
    n = sum(counts)
    parts = [float(len(p)) for p in cut(n, smallest=MIN_IMAGES, largest=MAX_IMAGES)]
    size = None if cells is None else float(n * (cells * CELL + ROW))
    share = busiest(parts, processes)
    return StagePlan(
        "encode",
        f"{plural(n, 'image')} in {plural(len(parts), 'part')}",
        {"read": n, "encode": n},
        share=share,
        bytes=size,
    )


def _prune(config: RunConfig, counts: Sequence[int], processes: int) -> StagePlan:
    """Runs of agents, each on all train images, which are scored after every epoch."""
    from dq.run.stages.prune import scored_settings

    plan = StagePlan("prune", "", bytes=0)
    n, costs = sum(counts), []
    for p in scored_settings(config):
        epochs = p.runs * p.trained_epochs
        plan.call(agent_operation(p), n * epochs)
        plan.call(f"test {agent_operation(p)}", n * epochs)
        plan.each["read"] = plan.each.get("read", 0.0) + n
        costs += [float(n * p.trained_epochs)] * p.runs
        plan.bytes = (plan.bytes or 0) + p.runs * n * SCORED
    plan.units = f"{plural(len(costs), 'run')} of {plural(n, 'image')}"
    plan.share = busiest(costs, processes)
    return plan


def agent_operation(prune: PruneConfig) -> str:
    """Names a step of an agent by what decides its cost."""
    return f"agent {prune.net} {prune.batch_size} {prune.augment} {prune.dtype}"


def _cluster(sets: Sequence[PlannedSet], counts: Sequence[int], cells: int | None, processes: int) -> StagePlan:
    distinct = {s.points: s for s in sets}
    plan = StagePlan("cluster", plural(len(distinct) * len(counts), "clustering"), bytes=None if cells is None else 0)
    costs: list[float] = []
    for s in distinct.values():
        plan.call(cluster_operation(s.cluster, s.prototypes), sum(counts))
        costs += [float(n * s.prototypes) for n in counts]
        if plan.bytes is not None and cells is not None:
            plan.bytes += sum(min(n, s.prototypes) for n in counts) * (cells * POINT_CELL + POINT)
            plan.bytes += sum(counts) * MEMBER
    if any(s.cluster.uses_features for s in sets):
        plan.call("read", sum(counts))
        plan.call("teacher", sum(counts))
    plan.share = busiest(costs, processes)
    return plan


def cluster_operation(cluster: ClusterConfig, ipc: int) -> str:
    from dq.cluster.engines import choose_engine

    return f"cluster {choose_engine(cluster.engine)} {cluster.space} ipc {ipc}"


def pixel_bytes(config: RunConfig, image_dtype: str = "uint8") -> int:
    """Bytes of an image as the run keeps it."""
    return 3 * config.image_size**2 * (4 if image_dtype == "float32" else 1)


def _generate(
    config: RunConfig, sets: Sequence[PlannedSet], images: int, denoiser_steps: int | None, processes: int
) -> StagePlan:
    """Drawing, and what a selecting teacher looks at; `images` are those of train."""
    from dq.run.stages.select import BY_FEATURES

    distinct = {s.drawn: s for s in sets}
    total = sum(s.draws for s in distinct.values())
    images_kept = sum(s.images for s in distinct.values())
    real = sum(s.real_candidates for s in distinct.values())
    plan = StagePlan(
        "generate",
        plural(total, "image")
        + (f" and {real} real ones" if real else "")
        + (f", of which {images_kept} are kept" if images_kept < total + real else ""),
    )
    compared: set[str] = set()
    for s in distinct.values():
        if s.how.representative == "real":
            plan.call("read", s.images)
        else:
            plan.call("decode", s.draws)
            if s.generate.mode != "decode":
                steps = s.generate.num_inference_steps if denoiser_steps is None else denoiser_steps
                plan.call("denoise", s.draws * steps)
        if s.real_candidates:
            plan.call("read", s.real_candidates)
        if s.draws + s.real_candidates > s.images:
            looks = 2 if s.generate.select in BY_FEATURES else 1  # probabilities, and features
            operation = select_operation(s.generate)
            plan.call(operation, s.draws * looks + s.real_candidates)  # whose features are those of real images
            if looks == 2 and operation not in compared:  # real images, once for each teacher
                compared.add(operation)
                plan.call("read", images)
                plan.call(operation, images)
        plan.bytes = (plan.bytes or 0) + s.images * pixel_bytes(config, s.generate.image_dtype)
    plan.share = -(-total // processes) / total
    if any(s.together for s in distinct.values()):  # there, a class is a unit, once for each candidate
        units = [1.0] * sum(s.draws for s in distinct.values() if not s.together)
        for s in distinct.values():
            units += [float(n) for n in s.class_images] * (s.draws // s.images) if s.together else []
        plan.share = busiest(units, processes)
    return plan


def select_operation(generate: GenerateConfig) -> str:
    """Names a forward pass of the teacher that selects among candidates."""
    teacher = generate.select_teacher
    return f"select {teacher.net} {teacher.path}" if teacher else "select"


def _refine(config: RunConfig, sets: Sequence[PlannedSet], counts: list[int], processes: int) -> StagePlan:
    from dq.run.refinement import planned, requested_settings, stages_of

    plan = StagePlan("refine", "")
    costs: list[float] = []
    seen = set()
    for s in sets:
        chain = requested_settings(config, s.method)
        for level, stage in enumerate(planned(config, s.method) if stages_of(config, s.method) else ()):
            key = digest_of([s.drawn, chain[: level + 1]])
            if key in seen:
                continue
            seen.add(key)
            steps, batches = stage.steps, stage.batches(s.images)
            plan.call(refine_operation(chain[level]), s.images * steps)
            costs += [float(s.images * steps) / batches] * batches
            # every image lies in the file of its batch and in that of its class
            plan.bytes = (plan.bytes or 0) + 2 * s.images * pixel_bytes(config, s.generate.image_dtype)
    plan.units = plural(len(costs), "batch")
    plan.share = busiest(costs, processes)
    return plan


def refine_operation(settings: PlainMapping) -> str:
    """The name of a stage, with a digest of the settings that decide its cost."""
    return f"refine {settings['stage']} {digest_of(settings, size=4)}"


def _label(config: RunConfig, sets: Sequence[PlannedSet], processes: int) -> StagePlan:
    """Labels of the images themselves, and assembly of the sets.

    Parquet stores images as PNG, so that the bytes of pixels are a bound.
    """
    plan = StagePlan("label", plural(len(sets), "set"))
    plan.bytes = float(sum(s.images * pixel_bytes(config, s.generate.image_dtype) for s in sets))
    if config.teachers:
        plan.call("teacher", sum(s.images for s in sets))
        checked = sum(t.check_images for t in config.teachers)
        plan.each = {"read": checked, "teacher": checked / len(config.teachers)}
        plan.share = busiest([float(s.images) for s in sets], processes)
    return plan


def _evaluate(config: RunConfig, source: ImageSource, sets: Sequence[PlannedSet], processes: int) -> StagePlan:
    from dq.run.planning.plan import trainings

    e, counts = config.evaluate, source.class_counts()
    plan = StagePlan("evaluate", "0 trainings")
    if not e.students:
        return plan
    tests = len(source.test) if source.test_name else 0
    costs = []
    labels = set()
    number = 0
    for t in trainings(config, counts, {(s.method, str(s.ipc)): s.images for s in sets}):
        c = t.config
        looked = 0 if c.tests == 1 else c.tests * (tests if c.select == "test" else e.validation_images)
        plan.call(f"student {t.student}", t.images * c.epochs * t.seeds)
        plan.call(f"test {t.student}", (looked + tests) * t.seeds)
        costs += [float(t.images * c.epochs)] * t.seeds
        number += t.seeds
        kept = t.stored_labels(len(counts))
        if c.labels == "fixed" and c.asks_teachers:
            plan.call("teacher", t.images * t.seeds)
        elif c.labels == "soft" and kept is None:
            plan.call("teacher", t.images * c.epochs * t.seeds)
        elif kept is not None and kept not in labels:
            labels.add(kept)
            plan.call("teacher", kept.views)
            plan.bytes = (plan.bytes or 0) + kept.bytes
    for t in trainings(config, counts, {}, config.ipc):
        if t.ipc != "full" and t.student == 0 and t.number >= 0:  # the selected images, kept for all students
            plan.bytes = (plan.bytes or 0) + t.images * t.copies * pixel_bytes(config)
            plan.call("read", t.images * t.copies)
    n = float(counts.sum())
    plan.each = {"read": tests + n * ("full" in e.baselines) + n * any(b in BY_FEATURES for b in e.baselines)}
    if any(b in BY_PREDICTION for b in e.baselines):
        plan.each["read"] += n
        plan.call("teacher", n)
    if config.teachers:
        plan.each["read"] += sum(t.check_images for t in config.teachers)
    plan.units = plural(number, "training")
    plan.share = busiest(costs, processes)
    return plan


# --- in words -----------------------------------------------------------------------------------------------------


def estimate_lines(
    plans: Sequence[StagePlan], speeds: Mapping[str, float], *, overlap: bool, processes: int
) -> Iterator[str]:
    """A table of stages: units, seconds, bytes, and their sums."""
    from dq.core.progress import duration
    from dq.core.text import format_bytes

    on = plural(processes, "process") + (", each on a device like the measured one" if processes > 1 else "")
    yield f"estimate    on {on}"
    times = [seconds_of(p, speeds, overlap=overlap) for p in plans]
    for p, seconds in zip(plans, times, strict=True):
        calls = ", ".join(f"{n:,.0f} {op}" for op, n in p.calls.items() if n and len(p.calls) <= 4)
        time_text = "time not known" if seconds is None else f"about {duration(seconds)}"
        room = "disk not known" if p.bytes is None else f"{format_bytes(p.bytes)} on disk"
        yield f"  {p.stage:<10}{p.units}: {time_text}, {room}" + (f" ({calls})" if calls else "")
    known_times = [s for s in times if s is not None]
    total = (
        f"about {duration(sum(known_times))}"
        if len(known_times) == len(times)
        else f"at least {duration(sum(known_times))}"
    )
    yield f"  {'all':<10}{total}, {format_bytes(sum(p.bytes or 0 for p in plans))} on disk"
