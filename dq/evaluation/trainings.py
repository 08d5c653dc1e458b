"""Trainings as units of work, their labels, and their record files."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dq.config.protocols import student_config
from dq.config.reader import to_dict
from dq.config.students import EvaluateConfig, StudentConfig
from dq.config.teachers import TeacherConfig, only_teacher
from dq.core.errors import RunError
from dq.core.files import is_done, read_json, write_json, write_text
from dq.core.plain import PlainDict, PlainMapping
from dq.core.progress import progress, unit_done
from dq.core.seeds import derive_seed, digest_of
from dq.core.text import format_bytes, plural
from dq.core.trackers import report
from dq.core.version import __version__
from dq.distilled.external import check_classes
from dq.evaluation.entries import Entry, Work, prepare_selections
from dq.evaluation.results import Row, compare, settings_line, summarize, to_csv, warn_of_lost_rows
from dq.evaluation.student import (
    RealImages,
    StudentData,
    StudentResult,
    check_whitening,
    fixed_labels,
    train_student,
    training_data,
)
from dq.labels.compute import online_labels
from dq.labels.files import MANIFEST, read_labels, shard_file, write_manifest, write_shard
from dq.labels.plan import LabelPlan, make_plan, plan_bytes, plan_labels
from dq.networks.real_data import RealData, check_whitened
from dq.networks.training import TrainingSet
from dq.networks.zoo import check_net

log = logging.getLogger("dq")


@dataclass(frozen=True)
class Training:
    """One student on one entry with one seed."""

    entry: Entry
    recipe: int  # which student of the configuration, from 0
    config: StudentConfig
    seed: int
    file: Path  # where its record is kept

    @property
    def cost(self) -> float:
        return float(self.entry.images * self.config.epochs)


# --- what is to be done -------------------------------------------------------------------------------------------


def students_of(
    evaluate: EvaluateConfig,
    ipcs: Sequence[str],
    classes: int,
    image_size: int,
    teachers: Sequence[TeacherConfig] = (),
) -> dict[tuple[int, str], StudentConfig]:
    """Settings of every student for every ipc.

    A protocol may have others for a certain teacher.

    Raises:
        InputError: for an unknown network, protocol or setting.
    """
    students = {}
    for j, spec in enumerate(evaluate.students):
        for ipc in ipcs:
            where = f"evaluate.students.{j}"
            student = student_config(
                spec,
                ipc=ipc,
                classes=classes,
                image_size=image_size,
                teacher=only_teacher(teachers),
                where=where,
            )
            check_net(student.net, classes, image_size, norm=student.norm, init=student.init)
            if student.whiten:
                check_whitened(image_size, student.zca)
            if student.warmup and student.warmup >= student.epochs:
                log.warning(
                    "note: %s never leaves its warm-up of %d epochs in %d; set warmup as well",
                    *(where, student.warmup, student.epochs),
                )
            students[(j, ipc)] = student
    return students


def trainings_of(
    entries: Sequence[Entry],
    students: dict[tuple[int, str], StudentConfig],
    real_data: RealData,
    evaluate: EvaluateConfig,
    work: Work,
) -> list[Training]:
    """All trainings, recipe by recipe, with the files of their records."""
    trainings = []
    for j in range(len(evaluate.students)):
        for entry in entries:
            config = students[(j, entry.ipc)]
            # the one costly baseline is shared by all evaluations on this data
            base = real_data.cache_dir / "full" if entry.ipc == "full" else work.folder / "eval" / "units"
            settings = to_dict(config)
            settings["relabel"].pop("storage")
            settings.pop("learned_lr")
            identity: list[object] = [__version__, settings, real_data.identity, entry.identity]
            if config.labels != "hard":
                identity.append([t.digest for t in real_data.teachers])
            if config.for_step_size(entry.step_size) != config:
                identity.append({"step_size": entry.step_size})
            for seed in entry.seeds:
                name = f"{entry.name}-ipc{entry.ipc}-{config.net}-{config.labels}-seed{seed}"
                name = name.replace(":", "_")
                trainings.append(Training(entry, j, config, seed, base / f"{name}-{digest_of(identity)}.json"))
    return trainings


# --- labels of views ----------------------------------------------------------------------------------------------


def label_folder(work: Work, t: Training, real_data: RealData) -> Path:
    """Folder of the epoch labels of a training.

    Trainings with the same images and label settings share them.
    """
    name = f"ipc{t.entry.ipc}-{t.entry.name}" + (f"-seed{t.entry.seeds[0]}" if t.entry.name == "random" else "")
    return work.folder / "labels" / f"{name}-{_planned_labels(t, real_data).digest}"


def write_labels(
    trainings: Sequence[Training], real_data: RealData, work: Work, finished: Sequence[Training] = ()
) -> None:
    """Write the missing label files of entries with stored labels.

    Of `finished` trainings, only damaged files are made again: deleted ones are not needed any more. The files of all
    sets are divided over processes together. Before anything is written the space is compared with what the disk has
    left.
    """
    by_folder: dict[Path, Training] = {}
    for t in (*trainings, *finished):
        if _stores_labels(t):
            by_folder.setdefault(label_folder(work, t, real_data), t)
    needed = {label_folder(work, t, real_data) for t in trainings if _stores_labels(t)}
    spans = {folder: _planned_labels(t, real_data).shards() for folder, t in by_folder.items()}
    existing = {folder: [r for r in rs if shard_file(folder, r.start).is_file()] for folder, rs in spans.items()}
    # every process must have seen the same files before the first damaged one is removed
    work.accelerator.wait_for_everyone()
    units = []
    total = 0
    for folder, t in by_folder.items():
        plan = _planned_labels(t, real_data)
        has_manifest = is_done(folder / MANIFEST)  # else it is unknown what the files are labels of
        requested = spans[folder] if folder in needed else existing[folder]
        shards = [r for r in requested if not (is_done(shard_file(folder, r.start)) and has_manifest)]
        total += plan_bytes(plan).total * sum(map(len, shards)) // plan.epochs
        units += [(folder, t, r) for r in shards]
    # every process must have seen the same files before the first is written, or they divide different lists
    work.accelerator.wait_for_everyone()
    if not units:
        return
    _check_space(work, total, len(by_folder))
    costs = [float(t.entry.images * len(r)) for _, t, r in units]
    _write_shards([units[i] for i in work.local_units(costs)], real_data, work)


def _write_shards(units: Sequence[tuple[Path, Training, range]], real_data: RealData, work: Work) -> None:
    """Write label files, given by folder, training and epochs.

    A set is loaded once for consecutive files.
    """
    views = round(sum(t.entry.images * len(epochs) for _, t, epochs in units))
    open_folder: Path | None = None
    images, plan = torch.empty(0), None
    with progress([], desc="label", total=views, unit="view", main=work.main) as bar:
        for folder, t, epochs in units:
            if plan is None or folder != open_folder:
                data = training_data(t.entry.load(), real_data.image_size)
                images, open_folder = data.images.to(real_data.device), folder
                plan = make_plan(data.images, real_data.teachers, real_data.classes, t.config)
                # a selected set may be smaller than planned, but its files are those that were divided
                plan = dataclasses.replace(plan, shard_epochs=_planned_labels(t, real_data).shard_epochs)
                write_manifest(folder, data.images, plan, real_data.teachers, set=t.entry.name, ipc=t.entry.ipc)
            write_shard(folder, images, real_data.teachers, plan, epochs)
            bar.update(t.entry.images * len(epochs))


def _stores_labels(t: Training) -> bool:
    """Whether the labels of a training are stored.

    Those of the full data are always computed when needed, since each epoch would be stored.
    """
    return t.config.labels == "soft" and t.config.relabel.storage == "shards" and t.entry.ipc != "full"


def _planned_labels(t: Training, real_data: RealData) -> LabelPlan:
    """The plan of a training's labels before its images are loaded."""
    return plan_labels(
        t.entry.images,
        real_data.image_size,
        real_data.teachers,
        real_data.classes,
        t.config,
        image_digest=t.entry.identity,
    )


def _check_space(work: Work, total: int, sets: int) -> None:
    import shutil

    work.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work.folder).free
    if work.main:
        log.info(
            "soft labels of %s: %s to write, %s free", plural(sets, "set"), format_bytes(total), format_bytes(free)
        )
    if total > free:
        raise RunError(
            f"the soft labels need {format_bytes(total)} but {work.folder} has {format_bytes(free)} left; "
            "set relabel.bits=8, relabel.top_k, relabel.epochs or relabel.storage=online"
        )


# --- training -----------------------------------------------------------------------------------------------------


def train_one(
    t: Training, real_data: RealData, work: Work, on_epoch: Callable[[int, float], None] | None = None
) -> PlainDict:
    """Train and test one student, and return its record."""
    s = t.entry.load()
    check_classes(s, f"the set {t.entry.name!r}")
    data = training_data(s, real_data.image_size)
    test = real_data.test(t.config.test_scale) if t.entry.test is None else t.entry.test()
    check_whitening(s, t.entry.name, t.config, real_data)
    config = t.config.for_step_size(s.step_size)
    label_bytes = 0
    if t.config.labels == "fixed":
        soft_labels = fixed_labels(s, data, t.config)
        soft_labels = real_data.soften(data.images) if soft_labels is None else soft_labels
        data = dataclasses.replace(data, soft_labels=soft_labels)
        label_bytes = len(data.images) * real_data.classes * 2
    elif t.config.labels == "soft":
        source, label_bytes = _label_source(t, data, real_data, work)
        data = dataclasses.replace(data, soft_labels=source)
    training_set = TrainingSet(
        data.images.to(real_data.device),
        data.labels,
        real_data.classes,
        real_data.pixels(t.config),
        data.weights,
        data.soft_labels,
    )
    result = train_student(
        training_set,
        config,
        RealImages(test, real_data.validation(t.config.test_scale)),
        seed=derive_seed("student", t.seed),  # not the run's: evaluation seeds are the same for all sets
        bounded=data.bounded,
        on_epoch=on_epoch,
        checkpoint=_checkpoint(t),
    )
    sizes = {"images": len(data.images), "image_bytes": data.images.nbytes, "label_bytes": label_bytes}
    return _record(t, config, real_data, result, {**sizes, "test_images": len(test[1])})


def _record(
    t: Training, config: StudentConfig, real_data: RealData, result: StudentResult, sizes: dict[str, int]
) -> PlainDict:
    """Record of a training, with all that is needed to repeat it."""
    gpu = torch.cuda.get_device_name(real_data.device) if real_data.device.type == "cuda" else None
    return {
        "set": t.entry.name,
        "ipc": t.entry.ipc,
        "images": sizes["images"],
        "student": t.config.net,
        "labels": t.config.labels,
        "seed": t.seed,
        "recipe": t.recipe,
        "protocol": t.config.protocol,
        "settings": settings_line(t.config),
        "image_bytes": sizes["image_bytes"],
        "label_bytes": sizes["label_bytes"],
        **dataclasses.asdict(result),
        "config": to_dict(config),
        "test_images": sizes["test_images"],
        "teachers": [
            {"name": x.name, "digest": x.digest, "mean": x.mean, "std": x.std, "classes": x.classes}
            for x in real_data.teachers
        ],
        "data": {
            "source": real_data.source.origin,
            "fingerprint": real_data.source.fingerprint,
            "set": t.entry.origin,
            "set_digest": t.entry.identity,
            "image_size": real_data.image_size,
            "validation_images": len(real_data.validation_rows),
        },
        "software": {"dq": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "hardware": {"device": gpu or real_data.device.type, "threads": torch.get_num_threads()},
    }


def _checkpoint(t: Training) -> Path:
    return t.file.with_suffix(".checkpoint.safetensors")


def _label_source(t: Training, data: StudentData, real_data: RealData, work: Work) -> tuple[Any, int]:
    if t.config.relabel.storage == "online" or t.entry.ipc == "full":
        plan = make_plan(data.images, real_data.teachers, real_data.classes, t.config)
        return online_labels(data.images.to(real_data.device), real_data.teachers, plan), 0
    folder = label_folder(work, t, real_data)
    return read_labels(folder, data.images), sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def train_all(
    trainings: Sequence[Training], real_data: RealData, work: Work, *, what: str = "evaluate"
) -> list[PlainDict]:
    """Do all trainings, divided over processes; return their records in order.

    Each has one file. `what` is measured, for progress and trackers.
    """
    needed = {(t.entry.name, t.entry.ipc, t.entry.seeds): t.entry for t in trainings if not is_done(t.file)}
    selections = [e for e in needed.values() if e.ipc != "full"]
    prepare_selections([e.name for e in selections], real_data, work)
    for i in work.local_units([float(e.images) for e in selections]):
        selections[i].load()  # selected sets are saved by one process and read by the others
    work.accelerator.wait_for_everyone()
    is_trained = [is_done(t.file) for t in trainings]
    finished = [t for t, d in zip(trainings, is_trained, strict=True) if d]
    write_labels([t for t, d in zip(trainings, is_trained, strict=True) if not d], real_data, work, finished)
    work.accelerator.wait_for_everyone()
    todo = [i for i in work.local_units([t.cost for t in trainings]) if not is_done(trainings[i].file)]
    # cheap trainings first, so that most results exist if the costly ones are interrupted
    todo.sort(key=lambda i: trainings[i].cost)
    total = round(sum(trainings[i].cost for i in todo))
    with progress([], desc=what, total=total, unit="img", main=work.main and bool(todo)) as bar:
        done = 0.0
        for i in todo:
            t = trainings[i]
            bar.set_postfix_str(f"{t.entry.name} ipc {t.entry.ipc} {t.config.net} seed {t.seed}")

            def advance(epoch: int, loss: float, t: Training = t, done: float = done) -> None:
                bar.update(round(done + epoch * t.entry.images) - bar.n)

            began = time.perf_counter()
            record = train_one(t, real_data, work, advance)
            write_json(t.file, record)
            _checkpoint(t).unlink(missing_ok=True)
            done += t.cost
            name = f"{t.entry.name} ipc {t.entry.ipc} {t.config.net} {t.config.labels} seed {t.seed}"
            unit_done(what, name, time.perf_counter() - began, last=record["last"], best=record["best"])
    work.accelerator.wait_for_everyone()
    # the record may come from another evaluation's full data, under another number of recipe
    records = [{**read_json(t.file), "recipe": t.recipe} for t in trainings]
    report(work.accelerator, training_numbers(records, what))
    return records


def write_tables(records: list[PlainDict], work: Work) -> list[Row]:
    """Summarize trainings and write the tables of an evaluation.

    The main process writes `eval/summary.csv`, `comparisons.csv` and `trainings.jsonl`.
    """
    rows = summarize(records)
    if work.main:
        warn_of_lost_rows(work.folder / "eval", records)
        write_text(work.folder / "eval" / "summary.csv", to_csv([r.record() for r in rows]))
        write_text(work.folder / "eval" / "comparisons.csv", to_csv([c.record() for c in compare(rows)]))
        write_text(work.folder / "eval" / "trainings.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    work.accelerator.wait_for_everyone()
    return rows


def training_numbers(records: Sequence[PlainMapping], what: str = "evaluate") -> dict[str, float]:
    """Accuracies and seconds of trainings, for trackers.

    Seeds are no steps: wandb drops a step that is not above the last.
    """
    numbers: dict[str, float] = {}
    for r in records:
        name = f"{what}/{r['set']}-ipc{r['ipc']}-{r['student']}-{r['labels']}-recipe{r['recipe']}-seed{r['seed']}"
        numbers |= {f"{name}/last": r["last"], f"{name}/best": r["best"], f"{name}/seconds": r["train_seconds"]}
    return numbers
