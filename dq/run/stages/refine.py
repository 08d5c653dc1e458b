"""The refine stage of a run: batches as units of work.

A method's stages follow one another; each reads the class files of a folder and writes those of another, beside one
file per batch. Folders are named by a digest of all that decides their content.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq.core.errors import RunError
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
from dq.core.plain import PlainDict
from dq.core.progress import progress
from dq.core.seeds import derive_seed
from dq.diffusion.codec import Codec
from dq.diffusion.image_codec import ImageCodec
from dq.networks.teacher import Teacher
from dq.refine.inputs import check_refined
from dq.refine.measure import measure, sentence, summarize
from dq.refine.method import Batch, Refined, Resources, Session, State
from dq.run.folder import Run, class_file
from dq.run.refinement import INDEX, files_of, needs_codec, planned, real_images, requested_digest, stages_of
from dq.run.stages.encode import cache_of
from dq.run.stages.generate import drawn_folders
from dq.run.stages.image_files import as_bytes, holds_floats
from dq.run.stages.refine_groups import prepare_groups
from dq.run.stages.refine_jobs import Inputs, Job, image_codec, job_of, prepare, read_batch, resources_of

log = logging.getLogger("dq")

CARRIED = ("label_kind", "step_size", "bounded", "uniform_weights")  # from a batch to the files of its classes
SOFT_LABELS = ("soft_labels", "logits")  # tensor of label vectors; the second in files of a version before


def refine(run: Run, codec: Codec | None = None) -> None:
    """Refine the drawn images of every method; finished batches are skipped.

    `codec` is the run's autoencoder, if it is loaded; None: it is loaded where a stage needs it.
    """
    if not any(stages_of(run.config, m) for m in run.config.methods):
        log.info("refine: no method has stages, so images stay as they were drawn")
        return
    for method in run.config.methods:
        planned(run.config, method)  # complains before anything is loaded
    drawn = drawn_folders(run, cache_of(run))
    decoder = image_codec(run, codec) if needs_codec(run.config) else None
    loaded: dict[str, tuple[Teacher, ...]] = {}
    folders = dict(drawn)
    for level in range(max(len(stages_of(run.config, m)) for m in run.config.methods)):
        jobs: dict[Path, Job] = {}
        for key in drawn:
            ipc, method = key.split("/", 1)
            stages = stages_of(run.config, method)
            if level < len(stages):
                job = job_of(run, stages[level], Inputs(int(ipc), method, level, folders[key]), loaded)
                folders[key] = job.folder
                jobs.setdefault(job.folder, job)
        _run_level(run, list(jobs.values()), decoder)
    if run.main:
        path = run.folder / "images" / INDEX
        index = read_json(path) if is_done(path) else {}
        for key in drawn:
            method = key.split("/", 1)[1]
            if stages_of(run.config, method):
                files = [d for d in files_of(run.config, method).values() if d is not None]
                digest = requested_digest(run.config, method, drawn[key])
                index[key] = {"folder": folders[key].name, "asked": digest, "files": files}
        write_json(path, index)
    run.accelerator.wait_for_everyone()


def _run_level(run: Run, jobs: list[Job], codec: ImageCodec | None) -> None:
    """Run the jobs of one level; their batches are divided over processes."""
    began = time.perf_counter()
    finished = [_is_finished(job) for job in jobs]
    jobs = [job for job, done in zip(jobs, finished, strict=True) if not done]
    run.accelerator.wait_for_everyone()  # every process has seen the same files before the first is written
    for job in jobs:
        prepare(run, job, prepare_groups(run, job) if job.needs.groups else {})
    run.accelerator.wait_for_everyone()
    units = [(job, j) for job in jobs for j in range(len(job.batches))]
    costs = [float(len(job.batches[j]) * max(1, job.cost.steps)) for job, j in units]
    assigned = [units[i] for i in run.local_units(costs)]
    todo = [(job, j) for job, j in assigned if not is_done(job.batch_file(j))]
    total = sum(len(job.batches[j]) * job.cost.steps for job, j in todo)
    with progress([], desc="refine", total=total, unit="img step", main=run.main and bool(todo)) as bar:
        for job, group in _by_job(todo):
            real = real_images(run) if job.needs.real_images else None
            worker = Worker(run, job, dataclasses.replace(resources_of(run, job), real=real, codec=codec))
            for j in group:
                worker.refine_batch(j, on_step=functools.partial(_advance, bar, len(job.batches[j])))
    run.accelerator.wait_for_everyone()
    for job in jobs:
        for label in run.local_units([float(n) for n in job.counts]):
            _gather_class(run, job, label)
    run.accelerator.wait_for_everyone()
    if run.main:
        for job in jobs:
            summary = _summary(job)
            record = {"stage": "refinement", "ipc": job.inputs.ipc, "folder": job.folder.name, **summary}
            append_jsonl(run.folder / "metrics.jsonl", record)
            write_json(job.folder / "summary.json", summary)  # last: the folder is complete once this file exists
            log.info("%s ipc %d: %s", job.stage.stage, job.inputs.ipc, sentence(summary))
    if jobs:
        run.finish("refine", began, batches=len(units))


def _is_finished(job: Job) -> bool:
    """Whether every file of a job exists and is intact."""
    batches = [job.batch_file(j) for j in range(len(job.batches))]
    classes = [class_file(job.folder, label) for label in range(len(job.counts))]
    damaged = [path for path in (*batches, *classes, job.folder / "summary.json") if not is_done(path)]  # names all
    return not damaged


def _advance(bar: Any, images: int, step: int) -> None:
    bar.update(images)


def _summary(job: Job) -> PlainDict:
    records = [read_metadata(job.batch_file(j)) for j in range(len(job.batches))]
    redone = sum(r["precision"] != job.stage.dtype for r in records) if job.cost.steps else 0
    facts = {"method": job.stage.stage, "from": job.inputs.source.name, "redone_in_float32": redone}
    learned = [r["step_size"] for r in records if r.get("step_size") is not None]
    if learned:
        facts["step_size"] = learned[0]
    kinds = {r["label_kind"] for r in records if r.get("label_kind")}
    if kinds:
        facts["label_kind"] = kinds.pop()
    return {**facts, **records[0].get("facts", {}), **summarize(records)}


def _by_job(todo: list[tuple[Job, int]]) -> Iterator[tuple[Job, list[int]]]:
    groups: dict[Path, tuple[Job, list[int]]] = {}
    for job, j in todo:
        groups.setdefault(job.folder, (job, []))[1].append(j)
    yield from groups.values()


@dataclass(frozen=True)
class Worker:
    """Refines batches of a job in one process."""

    run: Run
    job: Job
    resources: Resources

    def refine_batch(self, number: int, on_step: Callable[[int], None]) -> None:
        """Refine a batch, from its last state if interrupted."""
        job = self.job
        batch = read_batch(job, number)
        partial = job.batch_file(number).with_suffix(".partial.safetensors")
        resume = _read_state(partial)
        for step in range(resume.steps if resume else 0):
            on_step(step)
        seed = derive_seed(self.run.config.seed, "refine", job.inputs.level, number)
        session = Session(seed, resume, on_step, functools.partial(_write_state, partial))
        refined = job.refinement.run(batch, job.stage, self.resources, session)
        self._write(number, refined, batch)
        partial.unlink(missing_ok=True)

    def _write(self, number: int, refined: Refined, batch: Batch) -> None:
        """Write the images, labels and measures of a batch."""
        job = self.job
        check_refined(refined, job.stage.stage)
        if refined.step_size is not None and len(job.batches) > 1:
            raise RunError(
                f"the stage {job.stage.stage!r} learned a step size for one of {len(job.batches)} batches, but a "
                "set has one; set compose=whole"
            )
        float_images = not refined.bounded or holds_floats(class_file(job.inputs.source, job.batches[number][0][0]))
        result = refined.images if float_images else as_bytes(refined.images)
        tensors = {"images": result, "trace": refined.trace}
        if number == 0 and refined.blocks is not None:
            tensors["strip"] = as_bytes(refined.blocks)
        if refined.soft_labels is not None:
            tensors["soft_labels"] = refined.soft_labels.half()
        if refined.preprocessing:
            write_tensors(job.folder / "preprocessing.safetensors", dict(refined.preprocessing))
        after = result if float_images else result.float() / 255
        write_tensors(job.batch_file(number), tensors, _measures(job, refined, batch, after))


def _measures(job: Job, refined: Refined, batch: Batch, after: Tensor) -> PlainDict:
    """Metadata of a batch, with measures before and after."""
    anchors = batch.images if batch.anchors is None else batch.anchors
    measures: PlainDict = {
        "images": len(batch.labels),
        "before": measure(batch.images, batch.labels, anchors, job.teachers, job.validation_teachers),
        "after": measure(after, batch.labels, anchors, job.teachers, job.validation_teachers),
        "precision": refined.precision,
        "terms": list(refined.terms),
    }
    if refined.soft_labels is not None:
        measures["label_kind"] = refined.label_kind
    if refined.step_size is not None:
        measures["step_size"] = refined.step_size
    flags = {"bounded": refined.bounded, "uniform_weights": refined.uniform_weights, "facts": dict(refined.facts)}
    return measures | {k: v for k, v in flags.items() if v != getattr(Refined, k, {})}


def _gather_class(run: Run, job: Job, label: int) -> None:
    """Write the refined images of a class in one file."""
    path = class_file(job.folder, label)
    if is_done(path):
        return
    parts: dict[str, list[Tensor]] = {}
    meta: PlainDict = {
        **read_metadata(class_file(job.inputs.source, label)),
        "refined_from": job.inputs.source.name,
    }
    for rank in range(job.counts[label]):
        j, i = job.places[(label, rank)]
        with open_tensors(job.batch_file(j)) as f:
            for name in f.keys():  # noqa: SIM118  (not a dict)
                if name in ("images", *SOFT_LABELS):
                    column = "images" if name == "images" else "soft_labels"
                    parts.setdefault(column, []).append(f.get_slice(name)[i : i + 1])
        measures = read_metadata(job.batch_file(j))
        meta |= {k: measures[k] for k in CARRIED if k in measures}
    write_tensors(path, {name: torch.cat(rows) for name, rows in parts.items()}, meta)


def _write_state(path: Path, state: State) -> None:
    write_tensors(path, state.tensors, {"facts": state.facts, "steps": state.steps})


def _read_state(path: Path) -> State | None:
    if not is_done(path):
        return None
    tensors, meta = read_tensors(path)
    if "facts" not in meta:  # a version before wrote the facts alone
        return State(tensors, meta, len(tensors["trace"]))
    return State(tensors, meta["facts"], meta["steps"])
