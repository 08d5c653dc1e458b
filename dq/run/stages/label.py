"""The label stage of a run: the teachers' labels of the stored images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from dq.core.files import is_done, read_json, read_tensors, write_json, write_tensors
from dq.core.progress import progress, unit_done
from dq.core.seeds import digest_of
from dq.networks.teacher import pooled_logits
from dq.networks.teacher_loading import files_digest, load_teachers
from dq.run import refinement as chain
from dq.run.folder import Run, class_file
from dq.run.stages.encode import cache_of
from dq.run.stages.generate import drawn_folders

LABELERS = "teachers.json"  # in the folder of labels: the teachers of the latest ones


def image_folders(run: Run) -> dict[str, Path]:
    """Folders of the final images by "ipc/method"."""
    drawn = drawn_folders(run, cache_of(run))
    return {k: chain.refined_folder(run, int(k.split("/")[0]), k.split("/", 1)[1], v) for k, v in drawn.items()}


def label(run: Run) -> None:
    """Label the stored images of every set with checked teachers.

    A class of a set is a unit of work. Without a teacher there is nothing to do, and teachers are loaded only for
    classes that have no labels yet.
    """
    c = run.config
    if not c.teachers:
        return
    began = time.perf_counter()
    folders = sorted(set(image_folders(run).values()))
    inputs = _teacher_inputs(run)
    record = run.folder / "labels" / LABELERS
    earlier = read_json(record) if is_done(record) else {}
    digest = earlier["digest"] if inputs is not None and earlier.get("inputs") == inputs else None
    todo = [] if digest is None else _unlabeled(run, folders, digest)
    if digest is None or todo:
        teachers = load_teachers(c.teachers, run.source, c.image_size, run.device, cache_dir=c.cache_dir)
        digest = digest_of([t.digest for t in teachers])
        meta = {"teachers": [t.name for t in teachers], "digest": digest, "digests": [t.digest for t in teachers]}
        todo = _unlabeled(run, folders, digest)
    for folder, label in progress(todo, desc="label", unit="class", main=run.main and bool(todo)):
        started = time.perf_counter()
        images = read_tensors(class_file(folder, label))[0]["images"]
        logits = pooled_logits(teachers, images).half()
        write_tensors(class_file(_folder_of(run, folder, digest), label), {"logits": logits}, meta)
        unit_done("label", run.source.class_names[label], time.perf_counter() - started, images=len(images))
    run.finish("label", began, sets=len(folders))
    if run.main:
        # which labels are these teachers'; those of earlier ones stay beside them
        names = {f.name: _folder_of(run, f, digest).name for f in folders}
        write_json(run.folder / "labels" / "index.json", names)
        if inputs is not None:
            write_json(record, {"inputs": inputs, "digest": digest})
    run.accelerator.wait_for_everyone()


def _teacher_inputs(run: Run) -> str | None:
    """Digest of what decides the teachers, without loading them; None if a library may fetch some of it."""
    digests = [files_digest(t) for t in run.config.teachers]
    source = [run.source.fingerprint, run.source.class_names, run.source.preprocess, run.config.image_size]
    return None if None in digests else digest_of([*source, digests])


def _unlabeled(run: Run, folders: Sequence[Path], digest: str) -> list[tuple[Path, int]]:
    """Folders of images and classes that this process has yet to label."""
    units = [(f, label) for f in folders for label in range(len(run.source.class_names))]
    assigned = [units[i] for i in run.local_units([1.0] * len(units))]
    return [(f, label) for f, label in assigned if not is_done(class_file(_folder_of(run, f, digest), label))]


def _folder_of(run: Run, images: Path, digest: str) -> Path:
    return run.folder / "labels" / f"{images.name}-{digest}"


def label_folder(run: Run, images: Path) -> Path | None:
    """The folder of the labels of stored images, if there are any."""
    index = run.folder / "labels" / "index.json"
    name = read_json(index).get(images.name) if run.config.teachers and index.is_file() else None
    return run.folder / "labels" / name if name else None
