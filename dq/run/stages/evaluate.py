"""The evaluate stage of a run."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path
from typing import get_args

from dq.config.schema import RunConfig
from dq.config.students import Baseline
from dq.core.cards import public
from dq.core.errors import InputError
from dq.core.files import read_json, read_jsonl, write_json
from dq.data.source import ImageSource
from dq.distilled.card import EVALUATION, write_dataset_card
from dq.distilled.format import PROVENANCE
from dq.evaluation.entries import Entry, Work, baseline_entries, check_difficulty
from dq.evaluation.redundancy import train_with_redundancy
from dq.evaluation.results import Row, read_records
from dq.evaluation.student import check_bounded, check_label_kind
from dq.evaluation.trainings import (
    Training,
    students_of,
    trainings_of,
    write_labels,
    write_tables,
)
from dq.evaluation.verdicts import rankings
from dq.networks.real_data import RealData, check_taught, load_real_data, rows_set_aside
from dq.networks.teacher_loading import teacher_file
from dq.run.folder import Run
from dq.run.refinement import labeled, planned, stages_of
from dq.run.stages.assemble import load_set_of_run

log = logging.getLogger("dq")


def check_evaluation(config: RunConfig, source: ImageSource) -> None:
    """Check split, teachers, networks and epochs before the first image is encoded.

    Raises:
        InputError: for anything that would stop the label or the evaluate stage.
    """
    for t in config.teachers:
        teacher_file(t)
    for method in config.methods:
        planned(config, method, source.class_counts().tolist())
    e = config.evaluate
    ipcs = [str(i) for i in config.ipc] + ["full"] * ("full" in e.baselines)
    size = config.image_size
    students = students_of(e, ipcs, len(source.class_names), size, config.teachers)
    check_taught(e, students.values(), config.teachers)
    if e.students:
        check_difficulty(e.baselines, config.prune, len(source.class_names), size)
    alone = not config.teachers and (e.baselines or not all(labeled(config, m) for m in config.methods))
    if any(s.labels == "fixed" and s.asks_teachers for s in students.values()) and alone:
        raise InputError("students with labels=fixed need a teacher; set teachers, or use labels=hard")
    for method in config.methods:
        last = stages_of(config, method)[-1:]
        wrong = [s for s in students.values() if s.labels == "fixed" and s.loss == "kl"]
        if last and last[0].labels_need_mse and wrong:
            raise InputError(
                f"method {method!r} ends with {last[0].stage}, whose labels are regression targets, which student "
                f"{wrong[0].net!r} with labels=fixed cannot learn by cross-entropy; set fit_temperature: true in the "
                "stage, or loss=mse or labels=hard in the student"
            )
    if e.students or config.teachers:
        _ = source.test


def prepare_run(run: Run, *, baselines: bool = True) -> tuple[list[Training], RealData, Work]:
    """The trainings of a run: all its sets and, with `baselines`, baselines."""
    c = run.config
    ipcs = [str(i) for i in c.ipc] + ["full"] * ("full" in c.evaluate.baselines)
    students = students_of(c.evaluate, ipcs, len(run.source.class_names), c.image_size, c.teachers)
    data = load_real_data(
        run.source,
        c.image_size,
        cache_dir=Path(c.cache_dir),
        device=run.device,
        validation_rows=rows_set_aside(run.source, c.evaluate, students.values()),
        teachers=c.teachers,
        difficulty=c.prune,
    )
    work = Work(run.folder, run.accelerator)
    entries = []
    largest: dict[int, int] = {}
    for ipc in c.ipc:
        for method in c.methods:
            s = load_set_of_run(run, ipc, method)
            check_label_kind(s, method, students.values())
            check_bounded(s.bounded, method, students.values())
            # several images of a prototype: baselines in equal number
            largest[ipc] = max(largest.get(ipc, 0), s.ipc)
            load = functools.partial(load_set_of_run, run, ipc, method)
            seeds = tuple(range(c.evaluate.seeds))
            entries.append(
                Entry(
                    method,
                    str(ipc),
                    len(s),
                    s.provenance["content"],
                    load,
                    seeds,
                    f"{method} of {run.folder}",
                    s.step_size,
                )
            )
    if baselines:
        entries += baseline_entries(data, c.evaluate, work, {str(i): size for i, size in largest.items()})
    return trainings_of(entries, students, data, c.evaluate, work), data, work


def evaluate_run(run: Run) -> list[Row]:
    """Evaluate methods and baselines for all students and seeds; one file per training."""
    began = time.perf_counter()
    trainings, data, work = prepare_run(run)
    rows = write_tables(train_with_redundancy(trainings, data, work, run.config.evaluate), work)
    run.finish("evaluate", began, trainings=len(trainings))
    return rows


def label_run(run: Run) -> None:
    """Store the teachers' labels of every view for the students of a run."""
    if run.config.evaluate.students and run.config.teachers:
        began = time.perf_counter()
        trainings, data, work = prepare_run(run, baselines=False)
        write_labels(trainings, data, work)
        run.finish("label views", began)


def outdated_rows(run_folder: str | Path) -> list[tuple[str, str]]:
    """Name and ipc of table rows measured on earlier content of sets.

    As after a change of settings without a new evaluation.
    """
    run_folder = Path(run_folder)
    contents: dict[str, set[str]] = {}
    for path in sorted((run_folder / "dataset").glob(f"*/{PROVENANCE}")):
        record = read_json(path)
        contents.setdefault(str((record.get("method") or {}).get("name")), set()).add(record["content"])
    trainings = read_jsonl(run_folder / "eval" / "trainings.jsonl")
    of_sets = [t for t in trainings if t["set"] in contents]
    outdated = [t for t in of_sets if t["data"].get("set_digest") not in contents[t["set"]]]
    return list(dict.fromkeys((t["set"], t["ipc"]) for t in outdated))


def _verdicts(run_folder: Path) -> dict[str, str]:
    """Headline of the first student by ipc, as the report has it, after the name of the student."""
    tables = [run_folder / "eval" / name for name in ("summary.csv", "comparisons.csv")]
    outdated = set(outdated_rows(run_folder))
    rows, compared = (read_records(table) if table.is_file() else [] for table in tables)
    rows = [r for r in rows if (r["set"], r["ipc"]) not in outdated]
    compared = [r for r in compared if not {(r[k], r["ipc"]) for k in ("set", "against")} & outdated]
    ranked = sorted(rankings(rows, compared), key=lambda r: r.recipe, reverse=True)
    return {r.ipc: f"{r.student}, IPC {r.ipc}: {r.headline}" for r in ranked}


def describe_evaluation(run_folder: str | Path) -> list[Path]:
    """Write `evaluation.json` of every set of a run that students were trained on.

    Its rows of the table and those of the baselines at equal ipc, and the verdict of the report at this ipc; rows of
    other content are left out.

    Returns:
        The files that were written; the README of the sets follows them.
    """
    from dq.evaluation.results import summarize

    run_folder = Path(run_folder)
    log, base = run_folder / "eval" / "trainings.jsonl", run_folder / "dataset"
    trainings, verdicts, written = read_jsonl(log), _verdicts(run_folder), []
    for path in sorted(base.glob(f"*/{PROVENANCE}")):
        record = read_json(path)
        # two methods may make the same set: at one image per class all weights are 1
        name = (record.get("method") or {}).get("name")
        of_set = [t for t in trainings if t["data"].get("set_digest") == record["content"] and t["set"] == name]
        ipcs = {t["ipc"] for t in of_set} | {"full"}
        beside = [t for t in trainings if t["set"] in get_args(Baseline) and t["ipc"] in ipcs]
        if of_set:
            rows = [{**row.record(), "seed_list": list(row.seeds)} for row in summarize([*of_set, *beside])]
            verdict = {"verdict": verdicts[ipc]} if (ipc := str(record.get("ipc"))) in verdicts else {}
            write_json(path.parent / EVALUATION, {"content": record["content"], **verdict, "rows": public(rows)})
            written.append(path.parent / EVALUATION)
    if written:
        write_dataset_card(base)
    return written
