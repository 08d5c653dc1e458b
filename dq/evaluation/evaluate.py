"""Evaluation of sets and baselines by students tested on real images."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from dq.config.dtypes import folder_dtypes, record_dtypes, resolve_dtypes
from dq.config.pruning import DifficultyConfig
from dq.config.reader import from_dict, to_dict
from dq.config.students import Baseline, EvaluateConfig, StudentConfig, default_baselines
from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError
from dq.core.files import as_path, is_same_folder
from dq.core.numbers import whole_number
from dq.core.plain import PlainDict, PlainMapping
from dq.core.processes import make_accelerator
from dq.core.seeds import digest_of_tensors
from dq.core.text import check_name
from dq.data.load import Loadable, load_source
from dq.data.source import ImageSource
from dq.distilled.external import check_classes, load_set
from dq.distilled.set import DistilledSet
from dq.evaluation.entries import Entry, Work, baseline_entries, check_difficulty
from dq.evaluation.redundancy import train_with_redundancy
from dq.evaluation.results import Row
from dq.evaluation.student import check_bounded, check_label_kind
from dq.evaluation.tables import Results
from dq.evaluation.trainings import students_of, trainings_of, write_tables
from dq.networks.real_data import check_taught, load_real_data, rows_set_aside

if TYPE_CHECKING:
    from accelerate import Accelerator


Student = str | StudentConfig | PlainMapping


@dataclass(frozen=True)
class EvaluationSettings:
    """Students, baselines and labels of an evaluation."""

    config: EvaluateConfig
    teachers: Sequence[TeacherConfig] = ()
    image_size: int | None = None  # side in px at which students train; None: that of the sets
    ipcs: Sequence[int] = ()  # images per class of baselines, beside those of the sets
    difficulty: DifficultyConfig = field(default_factory=DifficultyConfig)  # of baselines that go by it


def check_sets(
    sets: dict[str, DistilledSet], source: ImageSource, settings: EvaluationSettings
) -> tuple[int, list[int], dict[tuple[int, str], StudentConfig]]:
    """Check an evaluation before its first training.

    Returns:
        Side in px at which students train, images per class of the table, and settings of every student by its number
        and the images per class.

    Raises:
        InputError: if a set has other classes than the source, or an empty one, or students need labels and there is
            no teacher.
    """
    config = settings.config
    if min(settings.ipcs, default=1) < 1:
        raise InputError(f"ipc must be at least 1, not {min(settings.ipcs)}")
    if not config.students:
        raise InputError("there is no student to train; name one with --student, or in evaluate.students")
    repeated = [s for i, s in enumerate(config.students) if s in config.students[:i]]
    if repeated:
        raise InputError(f"the student {repeated[0]} is named twice; name every student once")
    for name, s in sets.items():
        check_name(name, "the set's name")
        if name in get_args(Baseline):
            raise InputError(f"the set's name {name!r} is that of a baseline; choose another")
        if s.images.shape[2] != s.images.shape[3]:
            raise InputError(f"images of the set {name!r} are {tuple(s.images.shape[2:])} px; they must be square")
        if not (torch.isfinite(s.weights).all() and (s.weights > 0).all()):
            raise InputError(f"the set {name!r} has weights that are not more than 0; leave such images out")
        if s.class_names != source.class_names:
            raise InputError(f"the set {name!r} has other classes than {source.origin}, or another order of them")
        check_classes(s, f"the set {name!r}")
    sizes = {s.images.shape[-1] for s in sets.values()}
    if settings.image_size is None and len(sizes) > 1:
        raise InputError(f"the sets have images of {sorted(sizes)} px; say at which size to train: --image_size")
    if settings.image_size is None and not sizes:
        raise InputError("baselines alone need the side in px at which to train: --image_size")
    side = settings.image_size or sizes.pop()
    per_class = sorted({*settings.ipcs, *(s.ipc for s in sets.values())})
    keys = [*map(str, per_class), *(["full"] if "full" in config.baselines else [])]
    students = students_of(config, keys, len(source.class_names), side, settings.teachers)
    check_taught(config, students.values(), settings.teachers)
    check_difficulty(config.baselines, settings.difficulty, len(source.class_names), side)
    if any(s.labels == "fixed" and s.asks_teachers for s in students.values()) and not settings.teachers:
        unlabeled = [name for name, s in sets.items() if s.soft_labels is None] + list(config.baselines)
        if unlabeled:
            raise InputError(f"{unlabeled[0]!r} has no labels for labels=fixed; set teachers, or use labels=hard")
    for name, s in sets.items():
        check_label_kind(s, name, students.values())
        check_bounded(s.bounded, name, students.values())
    _ = source.test  # there must be one
    return side, per_class, students


def evaluate_records(
    sets: dict[str, DistilledSet],
    source: ImageSource,
    settings: EvaluationSettings,
    *,
    folder: Path,
    cache_dir: Path,
    accelerator: Accelerator,
) -> list[PlainDict]:
    """Train on sets and on baselines of equal size; return records.

    Files and resume are as in a run.

    Raises:
        InputError: if a set has other classes than the source, or an empty one.
    """
    begun = "float32" if (folder / "eval").is_dir() else None  # before such a record was kept
    dtypes = folder_dtypes(folder, accelerator, begun=begun)
    config = resolve_dtypes(settings.config, dtypes)
    # runs resolve it too, and share the scores
    difficulty = resolve_dtypes(settings.difficulty, dtypes)
    settings = dataclasses.replace(settings, config=config, difficulty=difficulty)
    side, per_class, students = check_sets(sets, source, settings)
    real_data = load_real_data(
        source,
        side,
        cache_dir=cache_dir,
        device=accelerator.device,
        validation_rows=rows_set_aside(source, config, students.values()),
        teachers=settings.teachers,
        difficulty=difficulty,
    )
    work = Work(folder, accelerator)
    accelerator.wait_for_everyone()
    record_dtypes(folder, dtypes, main=accelerator.is_main_process)
    seeds = tuple(range(config.seeds))
    entries = [
        Entry(name, str(s.ipc), len(s), _identity(s), functools.partial(_itself, s), seeds, _origin(s), s.step_size)
        for name, s in sets.items()
    ]
    entries += baseline_entries(real_data, config, work, {str(i): i for i in per_class})
    trainings = trainings_of(entries, students, real_data, config, work)
    return train_with_redundancy(trainings, real_data, work, config)


def evaluate_sets(
    sets: dict[str, DistilledSet],
    source: ImageSource,
    *,
    folder: Path,
    cache_dir: Path,
    accelerator: Accelerator,
    **settings: Any,
) -> list[Row]:
    """`evaluate_records` with its tables written to `folder`/eval.

    `settings` are those of `EvaluationSettings`.
    """
    places: PlainDict = {"folder": folder, "cache_dir": cache_dir, "accelerator": accelerator}
    records = evaluate_records(sets, source, EvaluationSettings(**settings), **places)
    return write_tables(records, Work(folder, accelerator))


def _origin(s: DistilledSet) -> str:
    return str(s.provenance.get("origin", s.provenance.get("source", {}).get("origin", "")))


def _itself(s: DistilledSet) -> DistilledSet:
    return s


def _identity(s: DistilledSet) -> str:
    tensors = {"images": s.images, "labels": s.labels, "weights": s.weights}
    if s.soft_labels is not None:
        tensors["soft_labels"] = s.soft_labels
    return digest_of_tensors(tensors)


def evaluate(
    distilled: DistilledSet | str | Path,
    source: Loadable,
    *,
    protocol: str = "classic",
    students: Student | Sequence[Student] | None = None,
    n_seeds: int = 3,
    baselines: Sequence[Baseline] | None = None,
    teachers: TeacherConfig | Sequence[TeacherConfig] = (),
    difficulty: DifficultyConfig | None = None,
    image_size: int | None = None,
    output_dir: str | Path | None = None,
    cache_dir: str | Path = "runs/cache",
    accelerator: Accelerator | None = None,
    **settings: object,
) -> Results:
    """Train students on a set and on baselines, and test them.

    The baselines have as many images as the set; tests are on `source.test`.

    Args:
        distilled: a set, or what `load_set` opens.
        source: anything that `load_source` takes.
        protocol: a preset of `list_protocols()`, or custom.
        students: a network by name, or `StudentConfig` or a mapping of its settings; several for a cross-architecture
            table; None: the network of the protocol.
        n_seeds: trainings of each student.
        baselines: any of `dq.config.students.Baseline`; None: random, and facility where there is a teacher.
        teachers: who labels views, where the protocol needs labels; the first is who baselines are selected by.
        difficulty: how difficulty is measured, for the baselines facility_cad, window and forgetting.
        image_size: side in px at which students train; None: the set's.
        output_dir: where records and labels are kept, so that the same call continues; None: nowhere.
        cache_dir: folder of features and of full-data results, used with `output_dir`.
        accelerator: where to train; None: the accelerator of this machine if there is one.
        **settings: fields of `StudentConfig` for all students; `epochs` may be a mapping by ipc.

    Raises:
        InputError: if the set, the students and the data do not fit together.

    Example:
        print(evaluate(distilled, source, protocol="classic", students=["convnet3", "vgg11"], n_seeds=5))
    """
    source = load_source(source)
    folder = None if output_dir is None else as_path(output_dir, "output_dir")
    inputs = (source.origin, distilled) if isinstance(distilled, (str, Path)) else (source.origin,)
    if folder is not None and any(is_same_folder(p, folder) for p in inputs):
        raise InputError(f"output_dir {folder} holds the images themselves; choose another")
    if isinstance(distilled, (str, Path)):
        distilled = load_set(distilled, source.class_names, image_size=image_size, on_bad_image=source.on_bad_image)
    if not isinstance(distilled, DistilledSet):
        raise InputError(f"a DistilledSet or the path of one is evaluated, not {type(distilled).__name__}")
    several_students = list(students) if isinstance(students, (list, tuple)) else [students]
    specs = [{"protocol": protocol, **settings, **_student_settings(s)} for s in several_students]
    seeds = whole_number(n_seeds, "n_seeds")
    image_size = None if image_size is None else whole_number(image_size, "image_size")
    if not isinstance(protocol, str):
        raise InputError(f"protocol is a name of list_protocols(), not {protocol!r}")
    if accelerator is not None and not hasattr(accelerator, "device"):
        raise InputError(f"accelerator is an accelerate.Accelerator, not {accelerator!r}")
    cache = as_path(cache_dir, "cache_dir")
    several_teachers = _teacher_configs(teachers)
    names = _baseline_names(baselines, several_teachers)
    config = from_dict(EvaluateConfig, {"seeds": seeds, "baselines": names, "students": specs}, "evaluate")
    with tempfile.TemporaryDirectory() as scratch:
        rows = evaluate_sets(
            {"set": distilled},
            source,
            config=config,
            teachers=several_teachers,
            image_size=image_size,
            difficulty=difficulty or DifficultyConfig(),
            folder=folder or Path(scratch),
            cache_dir=cache if folder else Path(scratch),
            accelerator=accelerator or make_accelerator(),
        )
    return Results(tuple(rows))


def _teacher_configs(teachers: object) -> tuple[TeacherConfig, ...]:
    several = tuple(teachers) if isinstance(teachers, (list, tuple)) else (teachers,)
    if not all(isinstance(t, TeacherConfig) for t in several):
        raise InputError(f"teachers are TeacherConfig(...), one or several, not {teachers!r}")
    return several


def _baseline_names(baselines: object, teachers: tuple[TeacherConfig, ...]) -> list[str]:
    """The baselines as a list; None: those that the teachers allow."""
    if baselines is None:
        return list(default_baselines(teachers))
    if not isinstance(baselines, (str, list, tuple)):
        raise InputError(f"baselines are names such as ('random',), not {type(baselines).__name__}")
    return [baselines] if isinstance(baselines, str) else list(baselines)


def _student_settings(student: object) -> PlainDict:
    if student is None:
        return {}
    if isinstance(student, str):
        return {"net": student}
    if isinstance(student, StudentConfig):
        return to_dict(student)
    if isinstance(student, Mapping):
        return dict(student)
    raise InputError(f"a student is a network's name, a StudentConfig or a mapping, not {type(student).__name__}")
