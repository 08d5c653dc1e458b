"""Redundancy: accuracy of students of one slice on the next slice."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from dq.config.students import EvaluateConfig
from dq.core.plain import PlainDict
from dq.core.seeds import digest_of
from dq.distilled.set import DistilledSet
from dq.evaluation.entries import Entry, Work
from dq.evaluation.student import training_data
from dq.evaluation.trainings import Training, train_all
from dq.networks.real_data import RealData

log = logging.getLogger("dq")

LARGEST_SLICE = 10  # images per class, as in LGD; half of the images of a smaller class


def slice_size(images: int) -> int:
    """Images per class of a slice; 0 where two do not fit.

    `images` is the number of the smallest class of the set.
    """
    return min(LARGEST_SLICE, images // 2)


def slice_of(s: DistilledSet, size: int, number: int) -> DistilledSet:
    """The slice of a set with this number.

    It has the images of ranks number * size, ..., (number + 1) * size - 1 of every class, in the order of the set,
    which is class order.
    """
    rank = torch.arange(len(s)) - torch.searchsorted(s.labels.contiguous(), s.labels.contiguous())
    rows = (rank // size == number).nonzero()[:, 0]
    names = ("images", "labels", "weights", "prototype", "counts", "source_row", "soft_labels")
    parts = {name: x[rows] for name in names if (x := getattr(s, name)) is not None}
    return dataclasses.replace(s, **parts)


def train_with_redundancy(
    trainings: Sequence[Training], real_data: RealData, work: Work, evaluate: EvaluateConfig
) -> list[PlainDict]:
    """`train_all`; with `evaluate.redundancy`, records also have `redundancy`.

    A second student with the same settings and seed learns from the first slice of the set's images of every class and
    is tested on the second (after LGD's increments of ten images). High accuracy says that the second slice adds
    little. Sets with classes of one image, and the full data, have none.
    """
    records = train_all(trainings, real_data, work)
    if not evaluate.redundancy:
        return records
    sliced: dict[int, Training] = {}
    sizes: dict[str, int] = {}
    for i, t in enumerate(trainings):
        if t.entry.ipc == "full":
            continue
        if t.entry.identity not in sizes:
            counts = torch.bincount(t.entry.load().labels, minlength=real_data.classes)
            sizes[t.entry.identity] = slice_size(int(counts.min()))
            if work.main and not sizes[t.entry.identity]:
                log.info(
                    "%s at IPC %s has no redundancy: a class has fewer than two images", t.entry.name, t.entry.ipc
                )
        if size := sizes[t.entry.identity]:
            sliced[i] = _on_slice(t, size, real_data)
    values = train_all(list(sliced.values()), real_data, work, what="redundancy")
    numbers = {i: record["last"] for i, record in zip(sliced, values, strict=True)}
    return [r | ({"redundancy": numbers[i]} if i in numbers else {}) for i, r in enumerate(records)]


def _on_slice(t: Training, size: int, real_data: RealData) -> Training:
    """The same training on the first slice, tested on the second."""

    def part(number: int) -> DistilledSet:
        return slice_of(t.entry.load(), size, number)

    def test() -> tuple[Tensor, Tensor]:
        data = training_data(part(1), real_data.image_size)
        return data.images, data.labels

    entry: Entry = dataclasses.replace(
        t.entry,
        images=size * real_data.classes,
        identity=digest_of([t.entry.identity, "slice", size]),
        load=functools.partial(part, 0),
        test=test,
    )
    # one look, at the end: no epoch is chosen
    config = dataclasses.replace(t.config, tests=1)
    return dataclasses.replace(t, entry=entry, config=config, file=t.file.with_name(f"redundancy-{t.file.name}"))
