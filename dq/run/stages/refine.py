"""The refine stage of a run: batches of the drawn images as units of work over processes, files, resume, measurements.

A method's stages follow one another; each reads the class files of a folder and writes those of another, beside one
file per batch. Folders are named by a digest of all that decides their content.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq.config.reader import to_dict
from dq.config.refinement import FADRM
from dq.core.files import (
    append_jsonl,
    is_done,
    open_tensors,
    read_json,
    read_metadata,
    read_tensors,
    write_json,
    write_tensors,
)
from dq.core.progress import progress
from dq.core.seeds import derive_seed, digest_of, digest_of_tensors
from dq.networks.features import extract_features, open_features
from dq.networks.teacher import Teacher
from dq.networks.teacher_loading import load_teachers
from dq.refine import anchors, fadrm, teddy
from dq.refine.batches import compose_batches
from dq.refine.matching import pad_drop
from dq.refine.measure import measure, sentence, summarize
from dq.refine.optimize import MatchedTeacher, Progress, Refined, Schedule, calibrate, match_teachers
from dq.run.folder import Run, class_file
from dq.run.refinement import INDEX, Stage, asked, batch_file, files_of, planned, stage_settings, stages_of

log = logging.getLogger("dq")


@dataclass(frozen=True)
class Job:
    """One stage on the images of one folder."""

    stage: Stage  # with every None filled in
    level: int  # stages before it
    ipc: int
    source: Path  # folder of class files
    folder: Path
    counts: tuple[int, ...]
    batches: list[list[tuple[int, int]]]
    schedule: Schedule
    teachers: tuple[Teacher, ...]  # all
    judges: tuple[Teacher, ...]
    weights: dict[int, Tensor] | None  # by class, of the images in the set

    @property
    def matched(self) -> tuple[Teacher, ...]:
        return tuple(t for t in self.teachers if t.matched)

    @functools.cached_property
    def places(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Batch and position of every (class, rank)."""
        return {row: (j, i) for j, batch in enumerate(self.batches) for i, row in enumerate(batch)}

    def batch_file(self, number: int) -> Path:
        return batch_file(self.folder, number)


def refine(run: Run, drawn: dict[str, Path], weights_of: Callable[[int, str], dict[int, Tensor]]) -> None:
    """Refine the images of every method that has stages; batches that are there are left alone.

    Args:
        drawn: folders of the drawn images by "ipc/method".
        weights_of: weights of the images of a set by class, for stages with `weighted`.
    """
    if not any(stages_of(run.config, m) for m in run.config.methods):
        log.info("refine: no method has stages, so images stay as they were drawn")
        return
    for method in run.config.methods:
        planned(run.config, method)  # complains before anything is loaded
    loaded: dict[str, tuple[Teacher, ...]] = {}
    folders = dict(drawn)
    for level in range(max(len(stages_of(run.config, m)) for m in run.config.methods)):
        jobs: dict[Path, Job] = {}
        for key in drawn:
            ipc, method = key.split("/", 1)
            stages = stages_of(run.config, method)
            if level < len(stages):
                job = _job(run, stages[level], level, int(ipc), folders[key], loaded, weights_of, method)
                folders[key] = job.folder
                jobs.setdefault(job.folder, job)
        _run_level(run, list(jobs.values()))
    if run.main:
        path = run.folder / "images" / INDEX
        index = read_json(path) if is_done(path) else {}
        for key in drawn:
            method = key.split("/", 1)[1]
            if stages_of(run.config, method):
                files = [d for d in files_of(run.config, method).values() if d is not None]
                known = {"folder": folders[key].name, "asked": asked(run.config, method, drawn[key]), "files": files}
                index[key] = known
        write_json(path, index)
    run.accelerator.wait_for_everyone()


def _job(
    run: Run,
    stage: Stage,
    level: int,
    ipc: int,
    source: Path,
    loaded: dict[str, tuple[Teacher, ...]],
    weights_of: Callable[[int, str], dict[int, Tensor]],
    method: str,
) -> Job:
    c = run.config

    def load(configs: Sequence[Any]) -> tuple[Teacher, ...]:
        key = digest_of([to_dict(t) for t in configs])
        if key not in loaded:
            loaded[key] = load_teachers(configs, run.source, c.source, c.image_size, run.device)
        return loaded[key]

    teachers, judges = load(stage.teachers or c.teachers), load(stage.judges) if stage.judges else ()
    matched = sum(t.matched for t in teachers)
    if isinstance(stage, FADRM):
        stage = fadrm.resolve(stage, side=c.image_size, teachers=matched)
        schedule = fadrm.schedule_of(stage)
    else:
        schedule = teddy.schedule_of(stage, side=c.image_size)
    counts = tuple(_count(class_file(source, i)) for i in range(len(run.source.class_names)))
    batches = compose_batches(counts, stage.batch_size or 1, compose=stage.compose, min_classes=stage.min_classes)
    weights = weights_of(ipc, method) if stage.weighted else None
    identity: list[Any] = [
        source.name,
        stage_settings(stage),
        [t.digest for t in teachers],
        [t.digest for t in judges],
        run.config.seed,
        level,
    ]
    if weights is not None:
        identity.append(digest_of_tensors({str(k): v for k, v in weights.items()}))
    if isinstance(stage, FADRM) and stage.anchor_path:
        identity.append(digest_of_tensors({"anchors": torch.cat(_file_anchors(run, stage, counts))}))
    if stage.depth.drop is None:
        identity.append(_pad_drop(run, ipc))
    folder = run.folder / "images" / f"ipc{ipc:05d}-{stage.stage}-{digest_of(identity)}"
    return Job(stage, level, ipc, source, folder, counts, batches, schedule, teachers, judges, weights)


def _pad_drop(run: Run, ipc: int) -> float:
    counts = run.source.class_counts()
    return pad_drop(ipc, round(counts.sum() / len(counts)))


def _file_anchors(run: Run, stage: FADRM, counts: Sequence[int]) -> list[Tensor]:
    return anchors.file_anchors(stage, run.source.class_names, list(counts), run.config.image_size)


def _run_level(run: Run, jobs: list[Job]) -> None:
    """Prepare, refine and put together the jobs of one level; batches of all of them are divided over processes."""
    began = time.perf_counter()
    finished = [_is_finished(job) for job in jobs]
    jobs = [job for job, done in zip(jobs, finished) if not done]
    run.accelerator.wait_for_everyone()  # every process has seen the same files before the first is written
    for job in jobs:
        _prepare(run, job)
    run.accelerator.wait_for_everyone()
    units = [(job, j) for job in jobs for j in range(len(job.batches))]
    costs = [float(len(job.batches[j]) * max(1, sum(job.schedule.steps))) for job, j in units]
    mine = [units[i] for i in run.mine(costs)]
    todo = [(job, j) for job, j in mine if not is_done(job.batch_file(j))]
    total = sum(len(job.batches[j]) * sum(job.schedule.steps) for job, j in todo)
    with progress([], desc="refine", total=total, unit="img step", main=run.main and bool(todo)) as bar:
        for job, group in _by_job(todo):
            worker = Worker.make(run, job)
            for j in group:
                worker.refine_batch(j, on_step=functools.partial(_advance, bar, len(job.batches[j])))
    run.accelerator.wait_for_everyone()
    for job in jobs:
        for label in run.mine([float(n) for n in job.counts]):
            _gather_class(run, job, label)
    run.accelerator.wait_for_everyone()
    if run.main:
        for job in jobs:
            summary = _summary(job)
            record = {"stage": "refinement", "ipc": job.ipc, "folder": job.folder.name, **summary}
            append_jsonl(run.folder / "metrics.jsonl", record)
            write_json(job.folder / "summary.json", summary)  # last: the folder is whole once this file is there
            log.info("%s ipc %d: %s", job.stage.stage, job.ipc, sentence(summary))
    if jobs:
        run.finish("refine", began, batches=len(units))


def _is_finished(job: Job) -> bool:
    """Whether every file of a job is there and intact."""
    batches = [job.batch_file(j) for j in range(len(job.batches))]
    classes = [class_file(job.folder, label) for label in range(len(job.counts))]
    damaged = [path for path in (*batches, *classes, job.folder / "summary.json") if not is_done(path)]  # names all
    return not damaged


def _advance(bar: Any, images: int, step: int) -> None:
    bar.update(images)


def _summary(job: Job) -> dict[str, Any]:
    records = [read_metadata(job.batch_file(j)) for j in range(len(job.batches))]
    redone = sum(r["precision"] != job.stage.dtype for r in records) if sum(job.schedule.steps) else 0
    facts = {"method": job.stage.stage, "from": job.source.name, "redone_in_float32": redone}
    return {**facts, **summarize(records)}


def _by_job(todo: list[tuple[Job, int]]) -> Iterator[tuple[Job, list[int]]]:
    groups: dict[Path, tuple[Job, list[int]]] = {}
    for job, j in todo:
        groups.setdefault(job.folder, (job, []))[1].append(j)
    yield from groups.values()


def _prepare(run: Run, job: Job) -> None:
    """What all batches of a job share: anchors and candidates by class, features of real classes, the manifest."""
    stage, c = job.stage, run.config
    cut: dict[str, int] = {}
    if isinstance(stage, FADRM):
        if stage.anchors == "real_patch":
            cut["anchors"] = 0
        if stage.retrieve == "patches":
            cut["candidates"] = stage.retrieve_pool
    for label in run.mine([float(n) for n in job.counts]):
        for name, number in cut.items():
            path = class_file(job.folder / name, label)
            if not is_done(path):
                images = anchors.patch_anchors(
                    run.source,
                    label,
                    number or job.counts[label],
                    teacher=job.matched[0],
                    image_size=c.image_size,
                    source_config=c.source,
                    rank=stage.anchor_rank,  # type: ignore[union-attr]
                    seed=c.seed,
                )
                write_tensors(path, {"images": images})
    if isinstance(stage, FADRM) and stage.anchors == "file" and run.main:
        for label, images in enumerate(_file_anchors(run, stage, job.counts)):
            write_tensors(class_file(job.folder / "anchors", label), {"images": images})
    if stage.class_weight:
        for teacher in job.matched:
            cache = open_features(c.cache_dir, run.source, c.source, c.image_size, teacher.digest)
            extract_features(run.source, teacher, cache, c.source, c.image_size, mine=run.mine, main=run.main)
    run.accelerator.wait_for_everyone()
    manifest = job.folder / "manifest.json"
    if run.main and not is_done(manifest):
        critics = _critics(run, job)
        rates = [c.r_bn for c in critics]
        if critics and stage.bn_share is not None:
            start, _ = _start(job, 0)
            rates = calibrate(
                critics,
                start,
                stage,
                job.schedule,
                len(job.counts),
                seed=derive_seed(c.seed, "calibrate"),
                image_weights=_weights(job, 0),
            )
        facts = {
            "settings": stage_settings(stage),
            "teachers": [
                {
                    "name": c.teacher.name,
                    "digest": c.teacher.digest,
                    "r_bn": rate,
                    "layers": [{"name": a.name, "weight": w} for a, w in zip(c.layers, c.kept.tolist())],
                }
                for c, rate in zip(critics, rates)
            ],
            "batches": len(job.batches),
            "images_per_batch": [min(map(len, job.batches)), max(map(len, job.batches))],
            "classes_per_batch": min(len({c for c, _ in b}) for b in job.batches),
        }
        write_json(manifest, facts)


def _critics(run: Run, job: Job) -> tuple[MatchedTeacher, ...]:
    stage, c = job.stage, run.config
    if not sum(job.schedule.steps):
        return ()
    means: list[Tensor | None] | None = None
    if stage.class_weight:
        means = []
        for teacher in job.matched:
            cache = open_features(c.cache_dir, run.source, c.source, c.image_size, teacher.digest)
            means.append(torch.stack([cache.load(i)[0].mean(0) for i in range(len(job.counts))]))
    drop = _pad_drop(run, job.ipc) if stage.depth.drop is None else None
    return match_teachers(
        job.matched, stage, side=c.image_size, sizes=job.schedule.sizes, drop=drop, class_means=means
    )


def _start(job: Job, number: int) -> tuple[Tensor, Tensor]:
    """What a batch starts from, and its anchors: (B, 3, S, S) float32 in [0, 1]."""
    rows = job.batches[number]
    own = _read_rows(job.source, rows)
    if not isinstance(job.stage, FADRM) or job.stage.anchors == "init":
        return own, own
    anchor = _read_rows(job.folder / "anchors", rows)
    return (anchor if job.stage.start == "anchor" else own), anchor


def _weights(job: Job, number: int) -> Tensor | None:
    """(B,) weights of the images of a batch in its statistics; None: all alike."""
    if job.weights is None:
        return None
    return torch.stack([job.weights[c][r] for c, r in job.batches[number]])


@dataclass(frozen=True)
class Worker:
    """What one process needs to refine batches of a job."""

    run: Run
    job: Job
    critics: tuple[MatchedTeacher, ...]
    pool: anchors.AnchorPool | None

    @staticmethod
    def make(run: Run, job: Job) -> Worker:
        rates = [t["r_bn"] for t in read_json(job.folder / "manifest.json")["teachers"]]
        critics = tuple(dataclasses.replace(c, r_bn=r) for c, r in zip(_critics(run, job), rates))
        pool = None
        if isinstance(job.stage, FADRM) and job.stage.retrieve != "none":
            base = job.folder / "candidates" if job.stage.retrieve == "patches" else job.source
            images = [_bytes(read_tensors(class_file(base, i))[0]["images"]) for i in range(len(job.counts))]
            pool = anchors.make_pool(images, job.matched[0])
        return Worker(run, job, critics, pool)

    def refine_batch(self, number: int, on_step: Callable[[int], None]) -> None:
        """Refine a batch and write its file; one that was interrupted goes on behind its last finished block."""
        job = self.job
        rows = job.batches[number]
        images = _read_rows(job.source, rows)
        labels = torch.tensor([c for c, _ in rows])
        anchor = _start(job, number)[1]
        weights = _weights(job, number)
        partial = job.batch_file(number).with_suffix(".partial.safetensors")
        resume = _read_progress(partial)
        if resume is not None:
            for step in range(sum(job.schedule.steps[: resume.block])):
                on_step(step)
        options: dict[str, Any] = {
            "critics": self.critics,
            "seed": derive_seed(self.run.config.seed, "refine", job.level, number),
            "resume": resume,
            "on_block": functools.partial(_write_progress, partial),
            "on_step": on_step,
        }
        if isinstance(job.stage, FADRM):
            if self.pool is not None:
                options["retrieve"] = functools.partial(self._retrieve, labels, job.stage.retrieve_complexity)
            refined = fadrm.refine(images, labels, weights, job.stage, job.matched, anchors=anchor, **options)
        else:
            options["labellers"] = job.teachers
            refined = teddy.refine(images, labels, weights, job.stage, job.matched, **options)
        self._write(number, refined, images, labels, anchor)
        partial.unlink(missing_ok=True)

    def _retrieve(self, labels: Tensor, complexity: float, x: Tensor, merge: int) -> Tensor:
        assert self.pool is not None
        return anchors.nearest_anchors(x, labels, self.pool, self.job.matched[0], complexity)

    def _write(self, number: int, refined: Refined, images: Tensor, labels: Tensor, anchor: Tensor) -> None:
        job = self.job
        float_images = _is_float(class_file(job.source, job.batches[number][0][0]))
        result = refined.images if float_images else _bytes(refined.images)
        tensors = {"images": result, "trace": refined.trace}
        if number == 0:
            tensors["strip"] = _bytes(refined.blocks)
        if refined.soft_labels is not None:
            tensors["logits"] = refined.soft_labels.half()
        after = result if float_images else result.float() / 255
        measures = {
            "images": len(labels),
            "before": measure(images, labels, anchor, job.teachers, job.judges),
            "after": measure(after, labels, anchor, job.teachers, job.judges),
            "precision": refined.precision,
        }
        write_tensors(job.batch_file(number), tensors, measures)


def _count(path: Path) -> int:
    with open_tensors(path) as f:
        return int(f.get_slice("images").get_shape()[0])


def _is_float(path: Path) -> bool:
    with open_tensors(path) as f:
        return f.get_slice("images").get_dtype() != "U8"


def _bytes(images: Tensor) -> Tensor:
    return images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)


def _read_rows(folder: Path, rows: Sequence[tuple[int, int]]) -> Tensor:
    """Images of (class, rank) pairs as float32 in [0, 1]; only these are read."""
    found: dict[tuple[int, int], Tensor] = {}
    for label in sorted({c for c, _ in rows}):
        path = class_file(folder, label)
        with open_tensors(path) as f:
            images = f.get_slice("images")
            for c, r in rows:
                if c == label:
                    found[(c, r)] = images[r : r + 1]
    x = torch.cat([found[row] for row in rows])
    return x.float() / 255 if x.dtype == torch.uint8 else x


def _gather_class(run: Run, job: Job, label: int) -> None:
    """The refined images of a class in one file like that of the generator, from the batches that hold them."""
    path = class_file(job.folder, label)
    if is_done(path):
        return
    parts: dict[str, list[Tensor]] = {}
    for rank in range(job.counts[label]):
        j, i = job.places[(label, rank)]
        with open_tensors(job.batch_file(j)) as f:
            for name in ("images", "logits"):
                if name in f.keys():  # noqa: SIM118  (not a dict)
                    parts.setdefault(name, []).append(f.get_slice(name)[i : i + 1])
    meta = {**read_metadata(class_file(job.source, label)), "refined_from": job.source.name}
    write_tensors(path, {name: torch.cat(found) for name, found in parts.items()}, meta)


def _write_progress(path: Path, progress: Progress) -> None:
    tensors = {"x": progress.x, "trace": progress.trace, "blocks": progress.blocks}
    facts = {"block": progress.block, "precision": progress.precision, "scale": progress.scale}
    write_tensors(path, tensors, facts)


def _read_progress(path: Path) -> Progress | None:
    if not is_done(path):
        return None
    tensors, meta = read_tensors(path)
    kept = tensors["x"], tensors["trace"], tensors["blocks"]
    return Progress(meta["block"], *kept, meta["precision"], meta["scale"])
