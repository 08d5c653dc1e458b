"""Image sources: where labelled images come from, and how one becomes a square array of 8-bit RGB.

A source is a Hub data set, a local folder that `datasets.load_dataset` reads, a folder of images by class, tensors in
memory, or scikit-learn's digits. Class identity is an index with a name list; nothing downstream sees anything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dq.core.errors import InputError

TEST_SPLITS = ("test", "validation", "valid", "val")


@dataclass(frozen=True)
class Split:
    """One split: labels at hand, images read on demand."""

    labels: np.ndarray  # (n,) int64
    read: Callable[[int], Any]  # row -> PIL image, encoded bytes, path, or (C, H, W) array
    name: str
    column: Callable[[str], list[Any] | None] = lambda name: None  # values of another column; None if there is none

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, row: int) -> str:
        """How an error message names a row."""
        return f"row {row} of split {self.name!r}"


@dataclass(frozen=True)
class ImageSource:
    """A labelled image set with its splits.

    `splits` maps split names to `Split`s; `train` and `test` name the two that matter (test may be absent).
    """

    splits: dict[str, Split]
    class_names: tuple[str, ...]
    fingerprint: str  # of the content: rows, labels, names
    origin: str
    train_name: str = "train"
    test_name: str | None = None
    sequential: bool = False  # rows are cheap to read in runs of neighbours and dear one at a time
    preprocess: Preprocess = "crop"  # how an image becomes a square
    on_bad_image: Literal["raise", "skip"] = "raise"  # what happens to images that cannot be read

    @property
    def train(self) -> Split:
        return self.splits[self.train_name]

    @property
    def test(self) -> Split:
        if self.test_name is None:
            raise InputError(
                f"{self.origin} has no test split (it has {', '.join(self.splits)}); "
                "name one with --set source.test_split=NAME, or add a test folder"
            )
        return self.splits[self.test_name]

    def class_counts(self, split: str | None = None) -> np.ndarray:
        """Images per class, (C,) int64, in class order."""
        return np.bincount(self.splits[split or self.train_name].labels, minlength=len(self.class_names))

    def rows_of_class(self, label: int) -> np.ndarray:
        """Rows of the train split that carry `label`, ascending."""
        return np.flatnonzero(self.train.labels == label)


def name_test_split(splits: dict[str, Split] | list[str], wanted: str | None, origin: str) -> str | None:
    if wanted is not None:
        if wanted not in splits:
            raise InputError(f"{origin} has no split {wanted!r}; it has {', '.join(splits)}")
        return wanted
    return next((s for s in TEST_SPLITS if s in splits), None)


def checked_source(
    splits: dict[str, Split], names: tuple[str, ...], content: Any, origin: str, train: str, test: str | None
) -> ImageSource:
    """Last step of every loader: labels in range, names unique, every class trained on."""
    if not all(isinstance(n, str) for n in names):  # a Parquet file's own description may hold anything
        raise InputError(f"the class names of {origin} are not all text; mend the names that its files declare")
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise InputError(f"class name {twice!r} of {origin} stands for two classes; give every class its own name")
    for s in splits.values():
        if len(s) and (s.labels.min() < 0 or s.labels.max() >= len(names)):
            wrong = int(s.labels.min()) if s.labels.min() < 0 else int(s.labels.max())
            raise InputError(
                f"split {s.name!r} of {origin} has label {wrong} but there are {len(names)} classes; "
                "drop unlabelled rows or name every class"
            )
    counts = np.bincount(splits[train].labels, minlength=len(names))
    if not len(names) or counts.min(initial=1) == 0:
        empty = names[int(counts.argmin())] if len(names) else "(none)"
        raise InputError(f"class {empty!r} of {origin} has no image in split {train!r}; drop the class or add images")
    content.update("\x1f".join((*names, train, test or "")).encode())
    return ImageSource(splits, names, content.hexdigest(), origin, train, test)


def _hash_files(h: Any, root: Path, files: Sequence[Path]) -> None:
    """Relative names and full contents: copying a folder keeps its fingerprint, changing one byte does not."""
    for f in files:
        h.update(f"{f.relative_to(root).as_posix()}|{f.stat().st_size}|".encode())
        with open(f, "rb") as handle:
            while block := handle.read(1 << 20):
                h.update(block)


def number_labels(
    raw: dict[str, np.ndarray], names: tuple[str, ...] | None, origin: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Class names and the labels (n,) int64 of every split. Without `names` the labels themselves, numbers or text,
    are the names, in their order."""
    if names is not None:
        return names, {s: labels.astype(np.int64) for s, labels in raw.items()}
    kinds = {"text" if x.dtype.kind in "US" else "number" if x.dtype.kind in "iub" else "" for x in raw.values()}
    kinds |= {"" for x in raw.values() if x.ndim != 1}
    if len(kinds) > 1 or "" in kinds:
        raise InputError(f"labels of {origin} must be whole numbers or text, and alike in all rows and splits")
    values = np.unique(np.concatenate(list(raw.values())))
    return tuple(map(str, values.tolist())), {s: np.searchsorted(values, x).astype(np.int64) for s, x in raw.items()}


def _class_order(names: set[str]) -> list[str]:
    """Numeric order for folders that are numbers (0, 1, ..., 10), else plain sorted order, as torchvision has it."""
    if all(re.fullmatch(r"\d+", n) for n in names):
        return sorted(names, key=lambda n: (int(n), n))
    return sorted(names)


Preprocess = Literal["squash", "crop", "pad"]
