"""Check that a teacher's outputs are the classes of the data."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError
from dq.core.files import is_done, read_json, write_json
from dq.core.seeds import digest_of, generator
from dq.data.images import read_images
from dq.data.source import ImageSource
from dq.networks.teacher import TEACHER_FACTS, Teacher

log = logging.getLogger("dq")

TEACHERS = "teachers.N"  # the setting that messages name


@contextlib.contextmanager
def naming(setting: str) -> Iterator[None]:
    """Name the setting of a teacher in errors of the block, such as generate.select_teacher.

    Raises:
        InputError: that of the block, with `setting` in place of teachers.N, or in front where it names no setting.
    """
    try:
        yield
    except InputError as e:
        message = str(e)
        if setting == TEACHERS or setting in message:
            raise
        raise InputError(message.replace(TEACHERS, setting) if TEACHERS in message else f"{setting}: {message}") from e


def check_classes(config: TeacherConfig, outputs: int, num_classes: int) -> None:
    """Check that a teacher has one output for each class.

    Raises:
        InputError: if not, or if an output is listed that the network does not have.
    """
    chosen = config.classes
    if chosen is None:
        if outputs < num_classes:
            raise InputError(
                f"the teacher {config.path} has {outputs} outputs but the data has {num_classes} classes; "
                "take a teacher that was trained on all of them"
            )
        if outputs > num_classes:
            raise InputError(
                f"the teacher {config.path} has {outputs} outputs but the data has {num_classes} classes; "
                "set teachers.N.classes to the outputs that are these classes, in order"
            )
        return
    if len(chosen) != num_classes or len(set(chosen)) != num_classes:
        raise InputError(
            f"teachers.N.classes lists {len(set(chosen))} different outputs in {len(chosen)} entries but the data has "
            f"{num_classes} classes; list one output for each class, in order"
        )
    strange = next((c for c in chosen if not 0 <= c < outputs), None)
    if strange is not None:
        raise InputError(
            f"teachers.N.classes lists output {strange} but those of {config.path} are 0 to {outputs - 1}; "
            "list one of them for each class, in order"
        )


_ACCURACIES: dict[str, float] = {}  # of teachers that this process has checked


def checked_accuracy(
    teacher: Teacher,
    source: ImageSource,
    config: TeacherConfig,
    image_size: int,
    *,
    cache_dir: str | Path | None = None,
) -> float:
    """Return the accuracy of `check_teacher`, measured once.

    It is logged once per process, and with `cache_dir` kept there for later commands.

    Raises:
        InputError: see `check_teacher`.
    """
    identity = [teacher.digest, source.fingerprint, source.preprocess, source.on_bad_image]
    key = digest_of([*identity, image_size, config.check_images])
    if key not in _ACCURACIES:
        file = None if cache_dir is None else Path(cache_dir) / f"teacher-check-{key}.json"
        if file is not None and is_done(file):
            accuracy = float(read_json(file)["accuracy"])
        else:
            accuracy = check_teacher(teacher, source, config, image_size)
            if file is not None:
                write_json(file, {"accuracy": accuracy})
        log.info("teacher %s: %.1f %% of %d real images", teacher.name, 100 * accuracy, config.check_images)
        _ACCURACIES[key] = accuracy
    return _ACCURACIES[key]


def check_teacher(teacher: Teacher, source: ImageSource, config: TeacherConfig, image_size: int) -> float:
    """Return the accuracy of the teacher on real train images; an error near chance.

    A teacher was usually trained on them, so this does not measure its quality; but it shows that classes and
    normalization fit, without a test image. The usual cause of an accuracy near chance is the order of classes.

    Raises:
        InputError: if the accuracy is less than a tenth of the way from chance to 1, or within three standard errors.
            If another order of its outputs would explain the images, the message says which.
    """
    train = source.train
    g = generator("teacher check")
    rows = torch.randperm(len(train), generator=g)[: config.check_images].tolist()
    images, rows, _ = read_images(train, rows, image_size, source.preprocess, on_bad=source.on_bad_image)
    if not rows:
        raise InputError(f"none of the train images of {source.origin} that were tried can be read; replace them")
    labels = torch.from_numpy(train.labels[rows])
    predicted = teacher.logits(images).argmax(1)
    accuracy = float((predicted == labels).double().mean())
    num_classes = len(source.class_names)
    chance = 1 / num_classes
    floor = max(chance + 0.1 * (1 - chance), chance + 3 * (chance * (1 - chance) / len(rows)) ** 0.5)
    if accuracy >= floor:
        return accuracy
    message = (
        f"the teacher {config.path} gets {accuracy:.1%} of {len(rows)} real train images right, near the chance of "
        f"{chance:.1%}: "
    )
    epochs = None if config.classes else _epochs_on(source, config.path)
    if epochs is not None:
        raise InputError(f"{message}raise train_teachers.epochs (now {epochs}) on these images")
    message += f"its class order or input normalization is probably not that of {source.origin}"
    reordered = reordered_accuracy(predicted, labels, num_classes)
    if reordered >= max(0.5, 3 * accuracy):
        order = class_order(predicted, labels, num_classes)
        classes = [teacher.classes[c] if teacher.classes else c for c in order]
        message += (
            f"; its outputs look permuted: with class order {classes} it would get {reordered:.1%}; "
            f"set teachers.N.classes={classes}"
        )
    raise InputError(message)


def _epochs_on(source: ImageSource, path: str) -> int | None:
    """Return the epochs of `train_teachers` on these images for the weights at a path; None if it made others."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    facts = read_json(folder / TEACHER_FACTS) if (folder / TEACHER_FACTS).is_file() else {}
    is_same = (facts.get("source") or {}).get("fingerprint") == source.fingerprint
    return int(facts["recipe"]["epochs"]) if is_same else None


def class_order(predicted: Tensor, labels: Tensor, num_classes: int) -> list[int]:
    """Return the assignment of outputs to classes with the highest accuracy."""
    from scipy.optimize import linear_sum_assignment

    # rows: classes, columns: outputs
    confusion = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, -1)
    return linear_sum_assignment(confusion.numpy(), maximize=True)[1].tolist()


def reordered_accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> float:
    """Return the accuracy under `class_order`, cross-validated on two halves.

    With few images of many classes, an order fitted to the same images would give any predictions a high accuracy.
    """
    hits = 0
    for fitted, tested in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        order = torch.tensor(class_order(predicted[fitted], labels[fitted], num_classes))
        hits += int((order[labels[tested]] == predicted[tested]).sum())
    return hits / len(labels)
