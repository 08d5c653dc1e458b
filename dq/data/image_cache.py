"""Cache of one array per image on disk, in files of several images."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dq.core.errors import InputError
from dq.core.files import is_done, open_tensors, read_json, read_metadata, sweep, write_json, write_tensors
from dq.core.plain import PlainDict
from dq.core.processes import cut
from dq.core.progress import progress, unit_done
from dq.core.threads import Writer, reading_ahead
from dq.data.images import read_images
from dq.data.source import ImageSource

MIN_IMAGES, MAX_IMAGES = 8, 512  # of a file
FEW_FILES = 4  # up to so many files a class is read by itself
BUFFER_BYTES = 256 << 20  # of classes that are read in one pass over the files


@dataclass(frozen=True)
class Spans:
    """Neighboring rows of equal class in the files of a cache, by class; a class is contiguous in a file.

    The columns are apart and the classes of spans are not kept: with a million images in random order there are nearly
    as many spans.
    """

    starts: np.ndarray  # (C + 1,) where the spans of each class start
    part: np.ndarray  # (S,) file
    first: np.ndarray  # (S,) row of the file
    number: np.ndarray  # (S,) rows

    @classmethod
    def by_class(cls, columns: Sequence[Sequence[np.ndarray]], classes: int) -> Spans:
        """Sort the spans of all files by class, those of one class by file.

        `columns` are the classes (s,), first rows and numbers of rows of the spans of each file.
        """
        label = np.concatenate([c[0] for c in columns])
        order = label.argsort(kind="stable").astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(np.bincount(label, minlength=classes))])
        del label
        part = np.repeat(np.arange(len(columns), dtype=np.int32), [len(c[0]) for c in columns])[order]
        first, number = (np.concatenate([c[i] for c in columns])[order] for i in (1, 2))
        return cls(starts, part, first, number)

    def of(self, label: int) -> slice:
        """The spans of a class."""
        return slice(int(self.starts[label]), int(self.starts[label + 1]))


@dataclass(frozen=True)
class ImageCache:
    """Folder of values that a network computed of train images."""

    folder: Path
    class_names: tuple[str, ...]
    key: str  # digest of all that decides the content
    images: int  # of the source's train split, readable or not
    # classes in the order in which they will be loaded: those that lie in many files are then read several at once
    order: tuple[int, ...] = field(default=(), kw_only=True, compare=False, repr=False)

    name: ClassVar[str] = "values"  # of the tensor in the files
    verb: ClassVar[str] = "encode"  # of the command that fills it

    @functools.cached_property
    def parts(self) -> list[range]:
        """Return positions in `cache_order` of the images of each file."""
        return cut(self.images, smallest=MIN_IMAGES, largest=MAX_IMAGES)

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.safetensors"

    def missing(self) -> list[int]:
        return [i for i in range(len(self.parts)) if not self.path(i).is_file()]

    def load(self, label: int) -> tuple[Tensor, Tensor]:
        """Load values and source rows of one class, by row.

        Values are (n, ...), rows (n,) int64.

        Raises:
            InputError: if files are missing, or no image of the class could be read.
        """
        own = self._spans.of(label)
        if own.start == own.stop:
            raise InputError(
                f"no image of class {label} {self.class_names[label]!r} can be read; replace them or drop the class"
            )
        if label not in self._buffer:
            self._buffer.clear()
            self._buffer.update(self._read(self._next_labels(label)))
        return self._buffer.pop(label)

    @functools.cached_property
    def _buffer(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Classes that were read ahead."""
        return {}

    def _next_labels(self, label: int) -> list[int]:
        """The class and those after it in `order` that are read in the same pass over the files."""
        spans = self._spans
        own = spans.of(label)
        if own.stop - own.start <= FEW_FILES or label not in self.order:
            return [label]
        with open_tensors(self.path(spans.part[own.start])) as f:
            row_bytes = f.get_slice(self.name)[:1].nbytes
        labels: list[int] = []
        size = 0
        for following in dict.fromkeys(self.order[self.order.index(label) :]):
            size += int(spans.number[spans.of(following)].sum()) * row_bytes
            if labels and size > BUFFER_BYTES:
                break
            labels.append(following)
        return labels

    def _read(self, labels: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Values and rows of classes; every file is opened once."""
        values: dict[int, list[Tensor]] = {label: [] for label in labels}
        rows: dict[int, list[Tensor]] = {label: [] for label in labels}
        spans: list[tuple[int, int, int, int]] = []
        for label in labels:
            own = self._spans.of(label)
            columns = (c[own].tolist() for c in (self._spans.part, self._spans.first, self._spans.number))
            spans += [(part, label, first, first + number) for part, first, number in zip(*columns, strict=True)]
        spans.sort(key=lambda span: span[0])
        for part, group in itertools.groupby(spans, key=lambda span: span[0]):
            with open_tensors(self.path(part)) as f:
                # copies, since a slice keeps its file mapped
                for _, label, start, stop in group:
                    values[label].append(f.get_slice(self.name)[start:stop].clone())
                    rows[label].append(f.get_slice("rows")[start:stop].clone())
        # either order of a cache takes the rows of a class in their order
        return {label: (torch.cat(values[label]), torch.cat(rows[label])) for label in labels if values[label]}

    def bad_images(self, parts: Iterable[int] | None = None) -> list[str]:
        """Return sentences on images set aside, in the given files.

        None: in all that exist.
        """
        present = (self.path(i) for i in (range(len(self.parts)) if parts is None else parts))
        return [s for path in present if path.is_file() for s in read_metadata(path)["bad_images"]]

    def check(self) -> None:
        """Check that the cache is complete.

        Raises:
            InputError: if a file is missing, or a class has no image that could be read.
        """
        if missing := self.missing():
            raise InputError(
                f"{self.folder} lacks {len(missing)} of {len(self.parts)} files, first {self.path(missing[0]).name}; "
                f"run `dq {self.verb}` first"
            )
        for label in np.flatnonzero(np.diff(self._spans.starts) == 0).tolist():
            self.load(label)

    @functools.cached_property
    def _spans(self) -> Spans:
        if self.missing():
            self.check()
        columns = []
        for part in range(len(self.parts)):
            with open_tensors(self.path(part)) as f:
                labels = f.get_tensor("labels").numpy()
            of_part = np.unique(labels, return_index=True, return_counts=True)
            columns.append([column.astype(np.int32) for column in of_part])
        return Spans.by_class(columns, len(self.class_names))


def cache_order(source: ImageSource) -> np.ndarray:
    """Return rows of the train split in the order of a cache.

    Class by class, or as stored where random access is slow.
    """
    if source.sequential:
        return np.arange(len(source.train))
    return np.argsort(source.train.labels, kind="stable")


def write_manifest(folder: Path, facts: PlainDict) -> None:
    """Write the manifest of a cache folder, or check it against `facts`."""
    sweep(folder)
    manifest = folder / "manifest.json"
    if not is_done(manifest):
        write_json(manifest, facts)
    elif {**read_json(manifest), "origin": None} != {**facts, "origin": None}:
        raise InputError(
            f"{manifest} does not describe its own folder; delete {folder} and give the same command again"
        )


@dataclass(frozen=True)
class Reading:
    """How images are read while a cache is filled."""

    side: int  # px
    batch_size: int
    threads: int | None = None  # that read and decode; None: one for each core of this process
    pin: bool = False  # give images in pinned memory, from which copies to a CUDA device do not block


class _Batch(NamedTuple):
    """Images that are read and computed together, of one file."""

    part: int  # file
    rows: np.ndarray
    is_last: bool  # of its file


def fill(
    cache: ImageCache,
    source: ImageSource,
    compute: Callable[[Tensor, list[int]], Tensor],
    reading: Reading,
    *,
    local_units: Callable[[list[float]], list[int]] | None = None,
    main: bool = True,
) -> float:
    """Write the files that the cache lacks; returns seconds spent.

    Reading runs two batches ahead of `compute`, which gives values (n, ...) of images (n, 3, side, side) uint8 that
    are the given rows, and a file is written while the next is computed. `local_units` picks from the costs of all
    files those that this process works on; None: all.

    Raises:
        InputError: if an image cannot be read and `source.on_bad_image` is not `skip`, even if it was skipped when the
            cache was begun.
    """
    began = time.perf_counter()
    costs = [float(len(p)) for p in cache.parts]
    local = local_units(costs) if local_units else range(len(costs))
    todo = [i for i in local if not is_done(cache.path(i))]
    total = sum(len(cache.parts[i]) for i in todo)
    part, started = _Part(), began
    with (
        progress([], desc=cache.verb, total=total, unit="img", main=main and bool(todo)) as bar,
        Writer() as writer,
        reading_ahead(_batches(cache, source, reading, todo), lambda b: _read(source, reading, b.rows)) as batches,
    ):
        for batch, (images, rows, problems) in batches:
            part.bad += problems
            part.rows += rows
            if len(images):
                part.values.append(compute(images, rows))
            bar.update(len(batch.rows))
            if batch.is_last:
                writer.submit(functools.partial(_write, cache, batch.part, part, part.tensors(cache, source), started))
                part, started = _Part(), time.perf_counter()
    if source.on_bad_image == "raise" and (skipped := cache.bad_images(local)):
        raise InputError(f"{skipped[0]} (and {len(skipped) - 1} others)" if len(skipped) > 1 else skipped[0])
    return time.perf_counter() - began


def _batches(cache: ImageCache, source: ImageSource, reading: Reading, parts: Sequence[int]) -> list[_Batch]:
    order, size = cache_order(source), reading.batch_size
    return [
        _Batch(part, order[start : min(start + size, images.stop)], start + size >= images.stop)
        for part in parts
        for images in [cache.parts[part]]
        for start in range(images.start, images.stop, size)
    ]


def _read(source: ImageSource, reading: Reading, rows: np.ndarray) -> tuple[Tensor, list[int], list[str]]:
    options: PlainDict = {"on_bad": source.on_bad_image, "threads": reading.threads}
    images, read, problems = read_images(source.train, rows, reading.side, source.preprocess, **options)
    return images.pin_memory() if reading.pin and len(images) else images, read, problems


@dataclass
class _Part:
    """Content of a file that is being computed."""

    values: list[Tensor] = field(default_factory=list)  # (n, ...) each
    rows: list[int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # sentences on images set aside

    def tensors(self, cache: ImageCache, source: ImageSource) -> dict[str, Tensor]:
        """Content of the file, class by class."""
        labels = torch.from_numpy(source.train.labels[self.rows].astype(np.int32))
        order = labels.argsort(stable=True)
        values = torch.cat(self.values)[order] if self.values else torch.zeros(0)
        rows = torch.tensor(self.rows, dtype=torch.int64)[order]
        return {cache.name: values, "rows": rows, "labels": labels[order]}


def _write(cache: ImageCache, number: int, part: _Part, tensors: dict[str, Tensor], began: float) -> None:
    write_tensors(cache.path(number), tensors, {"bad_images": part.bad}, identity=False)
    numbers = {"images": len(part.rows), "set_aside": len(part.bad)}
    unit_done(cache.verb, cache.path(number).name, time.perf_counter() - began, **numbers)
