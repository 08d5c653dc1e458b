"""A teacher's features of the train images of a run."""

from __future__ import annotations

import time
from pathlib import Path

from dq.config.reader import to_dict
from dq.config.schema import RunConfig
from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError
from dq.core.files import read_json, write_json
from dq.core.plain import PlainDict
from dq.networks.features import FeatureCache, extract_features, open_features
from dq.networks.teacher import Teacher
from dq.networks.teacher_check import checked_accuracy
from dq.networks.teacher_loading import load_teacher
from dq.run.folder import Run


def prepare_features(run: Run) -> FeatureCache:
    """Put the first teacher's features of every train image into their cache.

    Its key is noted in the run folder, so that no later stage has to load the teacher.

    Raises:
        InputError: if the teacher cannot be loaded or is near chance on real images.
    """
    c = run.config
    teacher = load_teacher(c.teachers[0], len(run.source.class_names), c.image_size, run.device)
    cache = features_by(run, teacher, c.teachers[0])
    if run.main:
        record = {"key": cache.key, "digest": teacher.digest, "teacher": _first_teacher(c)}
        write_json(run.folder / "features.json", record)
    run.accelerator.wait_for_everyone()
    return cache


def features_by(run: Run, teacher: Teacher, settings: TeacherConfig) -> FeatureCache:
    """Put the features of a teacher with these settings into their cache.

    Raises:
        InputError: if it is near chance on real images.
    """
    began = time.perf_counter()
    side = run.config.image_size
    cache = open_features(run.config.cache_dir, run.source, side, teacher.digest)
    if cache.missing():
        checked_accuracy(teacher, run.source, settings, side, cache_dir=run.config.cache_dir)
    extract_features(run.source, teacher, cache, side, local_units=run.local_units, main=run.main)
    run.finish("features", began, images=int(run.source.class_counts().sum()), cache=cache.key)
    return cache


def features_of(run: Run) -> FeatureCache:
    """Open the feature cache of this run without loading the teacher."""
    key = features_record(run)["key"]
    folder = Path(run.config.cache_dir) / f"features-{key}"
    return FeatureCache(folder, run.source.class_names, key, len(run.source.train))


def features_record(run: Run) -> PlainDict:
    """Key of the feature cache, digest and settings of its teacher.

    Raises:
        InputError: if there is none, or one of another teacher than the run now names.
    """
    pointer = run.folder / "features.json"
    if not pointer.is_file():
        raise InputError(f"{run.folder} has no features of a teacher yet; run `dq cluster` first")
    record = read_json(pointer)
    if record["teacher"] != _first_teacher(run.config):
        raise InputError(f"{run.folder} was clustered by the features of another teacher; run `dq cluster` again")
    return record


def _first_teacher(config: RunConfig) -> PlainDict:
    """The settings of the first teacher that determine its features."""
    settings = to_dict(config.teachers[0])
    return {k: v for k, v in settings.items() if k not in ("batch_size", "check_images", "weight")}
