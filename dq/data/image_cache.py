"""One array per image on disk, in files of runs of images."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dq.core.errors import InputError
from dq.core.files import is_done, open_tensors, read_json, read_metadata, sweep, write_json, write_tensors
from dq.core.processes import cut
from dq.core.progress import progress, unit_done
from dq.data.images import read_images
from dq.data.source import ImageSource

LEAST, MOST = 8, 512  # images of a file


@dataclass(frozen=True)
class ImageCache:
    """A folder of what a network made of the train images of a source."""

    folder: Path
    class_names: tuple[str, ...]
    key: str  # digest of all that decides the content
    images: int  # of the source's train split, readable or not

    name: ClassVar[str] = "values"  # of the tensor in the files
    verb: ClassVar[str] = "encode"  # what fills it

    @functools.cached_property
    def parts(self) -> list[range]:
        """Which images, in the order of `cache_order`, are in which file."""
        return cut(self.images, least=LEAST, most=MOST)

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.safetensors"

    def missing(self) -> list[int]:
        return [i for i in range(len(self.parts)) if not self.path(i).is_file()]

    def load(self, label: int) -> tuple[Tensor, Tensor]:
        """Values (n, ...) and source rows (n,) int64 of one class, in the order of the rows.

        Raises:
            InputError: if files are missing, or no image of the class could be read.
        """
        first, last = np.searchsorted(self._index[:, 0], (label, label + 1))
        found = self._index[first:last]
        if not len(found):
            raise InputError(
                f"no image of class {label} {self.class_names[label]!r} can be read; replace them or drop the class"
            )
        values, rows = [], []
        for _, part, start, stop in found.tolist():
            with open_tensors(self.path(part)) as f:
                values.append(f.get_slice(self.name)[start:stop])
                rows.append(f.get_slice("rows")[start:stop])
        # either order takes the rows of a class in their order
        return torch.cat(values), torch.cat(rows)

    def bad_images(self, parts: Iterable[int] | None = None) -> list[str]:
        """Sentences on images set aside, in the given files; None: in all that are there."""
        present = (self.path(i) for i in (range(len(self.parts)) if parts is None else parts))
        return [s for path in present if path.is_file() for s in read_metadata(path)["bad_images"]]

    def check(self) -> None:
        """
        Raises:
            InputError: if a file is missing, or a class has no image that could be read.
        """
        if missing := self.missing():
            raise InputError(
                f"{self.folder} lacks {len(missing)} of {len(self.parts)} files, first {self.path(missing[0]).name}; "
                f"run `dq {self.verb}` first"
            )
        for label in sorted(set(range(len(self.class_names))) - set(self._index[:, 0].tolist())):
            self.load(label)

    @functools.cached_property
    def _index(self) -> np.ndarray:
        """Rows of (class, file, first, last + 1), int32, in the order of classes. A class is one stretch of a file."""
        if self.missing():
            self.check()
        found = []
        for part in range(len(self.parts)):
            with open_tensors(self.path(part)) as f:
                labels = f.get_tensor("labels").numpy()
            classes, first, counts = np.unique(labels, return_index=True, return_counts=True)
            found.append(np.stack([classes, np.full_like(classes, part), first, first + counts], 1).astype(np.int32))
        index = np.concatenate(found)
        return index[index[:, 0].argsort(kind="stable")]


def cache_order(source: ImageSource) -> np.ndarray:
    """Rows of the train split in the order in which a cache takes them: class by class, or as they come where other
    rows than the next are dear."""
    if source.sequential:
        return np.arange(len(source.train))
    return np.argsort(source.train.labels, kind="stable")


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Say what a cache folder is a cache of."""
    sweep(folder)
    manifest = folder / "manifest.json"
    if not is_done(manifest):
        write_json(manifest, facts)
    elif {**read_json(manifest), "origin": None} != {**facts, "origin": None}:
        raise InputError(
            f"{manifest} does not describe its own folder; delete {folder} and give the same command again"
        )


def fill(
    cache: ImageCache,
    source: ImageSource,
    compute: Callable[[Tensor, list[int]], Tensor],
    *,
    side: int,
    batch_size: int,
    local_units: Callable[[list[float]], list[int]] | None = None,
    threads: int | None = None,
    main: bool = True,
) -> float:
    """Write the files that the cache lacks; returns seconds spent. Reading runs one batch ahead of `compute`.

    Args:
        compute: values (n, ...) of images (n, 3, side, side) uint8 that are the given rows.
        local_units: picks from the costs of all files those that this process works on; None: all.
        threads: that read and decode; None: one for each core of this process.

    Raises:
        InputError: if an image cannot be read and `source.on_bad_image` is not `skip`, even if it was skipped when the
            cache was begun.
    """
    began = time.perf_counter()
    costs = [float(len(p)) for p in cache.parts]
    own = local_units(costs) if local_units else range(len(costs))
    todo = [i for i in own if not is_done(cache.path(i))]
    order = cache_order(source)
    batches = [
        (part, order[start : min(start + batch_size, cache.parts[part].stop)], start + batch_size)
        for part in todo
        for start in range(cache.parts[part].start, cache.parts[part].stop, batch_size)
    ]

    def read(rows: np.ndarray) -> tuple[Tensor, list[int], list[str]]:
        options: dict[str, Any] = {"on_bad": source.on_bad_image, "threads": threads}
        return read_images(source.train, rows, side, source.preprocess, **options)

    total = sum(len(cache.parts[i]) for i in todo)
    values: list[Tensor] = []
    kept: list[int] = []
    bad: list[str] = []
    started = began
    with progress([], desc=cache.verb, total=total, unit="img", main=main and bool(todo)) as bar:
        for (part, rows, stop), (images, good, problems) in _ahead(read, batches):
            bad += problems
            kept += good
            if len(images):
                values.append(compute(images, good))
            bar.update(len(rows))
            if stop >= cache.parts[part].stop:
                _write_part(cache, part, values, kept, bad, source)
                numbers = {"images": len(kept), "set_aside": len(bad)}
                unit_done(cache.verb, cache.path(part).name, time.perf_counter() - started, **numbers)
                values, kept, bad = [], [], []
                started = time.perf_counter()
    if source.on_bad_image == "raise" and (skipped := cache.bad_images(own)):
        raise InputError(f"{skipped[0]} (and {len(skipped) - 1} others)" if len(skipped) > 1 else skipped[0])
    return time.perf_counter() - began


def _ahead(read: Callable[[np.ndarray], Any], batches: Sequence[tuple[int, np.ndarray, int]]) -> Iterator[Any]:
    """Batches with what `read` gives for them, the next one being read in the meantime."""
    with ThreadPoolExecutor(1) as ahead:
        pending = ahead.submit(read, batches[0][1]) if batches else None
        for i, batch in enumerate(batches):
            assert pending is not None
            found = pending.result()
            if i + 1 < len(batches):
                pending = ahead.submit(read, batches[i + 1][1])
            yield batch, found


def _write_part(
    cache: ImageCache, part: int, values: list[Tensor], kept: list[int], bad: list[str], source: ImageSource
) -> None:
    labels = torch.from_numpy(source.train.labels[kept].astype(np.int32))
    order = labels.argsort(stable=True)
    found = torch.cat(values)[order] if values else torch.zeros(0)
    tensors = {cache.name: found, "rows": torch.tensor(kept, dtype=torch.int64)[order], "labels": labels[order]}
    write_tensors(cache.path(part), tensors, {"bad_images": bad})
