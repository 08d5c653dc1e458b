"""Image sources: labeled images and how they are read.

A source is a Hub data set, a local folder that `datasets.load_dataset` reads, a folder of images by class, tensors in
memory, or scikit-learn's digits. Class identity is an index with a name list; later stages use nothing else.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dq.config.schema import SourceConfig
from dq.core.errors import InputError
from dq.core.text import printable

# names of splits, in any case; of several the first is taken
TRAIN_SPLITS = ("train", "training")
TEST_SPLITS = ("test", "testing", "validation", "valid", "val", "eval", "evaluation", "dev")
NO_SPLIT = "none"  # source.test_split for no test split at all


@dataclass(frozen=True)
class Split:
    """One split: labels in memory, images read on demand."""

    labels: np.ndarray  # (n,) int64
    read: Callable[[int], Any]  # row -> PIL image, encoded bytes, path, or (C, H, W) array
    name: str
    column: Callable[[str], list[Any] | None] = lambda name: None  # values of another column; None if there is none
    columns: tuple[str, ...] = ()  # names of the other columns
    stored: tuple[str, np.ndarray] | None = None  # split and rows that this one is a part of; None: it is whole

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, row: int) -> str:
        """Return the name of a row in error messages."""
        name, row = (self.stored[0], int(self.stored[1][row])) if self.stored else (self.name, row)
        return f"row {row} of split {name!r}"

    def part(self, rows: np.ndarray, name: str) -> Split:
        """Return a split of some rows, in their order."""

        def column(wanted: str) -> list[Any] | None:
            values = self.column(wanted)
            return None if values is None else [values[row] for row in rows]

        return Split(
            self.labels[rows], lambda row: self.read(int(rows[row])), name, column, self.columns, (self.name, rows)
        )


@dataclass(frozen=True)
class ImageSource:
    """Labeled image set with its splits.

    `splits` maps split names to `Split`s; `train` and `test` name the two that matter (test may be absent).
    """

    splits: dict[str, Split]
    class_names: tuple[str, ...]
    fingerprint: str  # of the content: rows, labels, names
    origin: str
    train_name: str = "train"
    test_name: str | None = None
    sequential: bool = False  # neighboring rows are fast to read together, single ones slow
    preprocess: Preprocess = "crop"  # how an image becomes a square
    on_bad_image: Literal["raise", "skip"] = "raise"  # what happens to images that cannot be read

    def __str__(self) -> str:
        """Three lines: images by split, images of the classes of train, names of the classes."""
        parts = ", ".join(f"{len(split):,} of {name}" for name, split in self.splits.items())
        counts = self.class_counts()
        each = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
        names = ", ".join(map(printable, self.class_names[:10]))
        more = f", and {len(self.class_names) - 10:,} more" if len(self.class_names) > 10 else ""
        return (
            f"{printable(self.origin)}: images {parts}{'' if self.test_name else ', no test split'}\n"
            f"{len(self.class_names):,} classes of {each} train images\n{names}{more}"
        )

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
        """Count images per class, (C,) int64, in class order."""
        return np.bincount(self.splits[split or self.train_name].labels, minlength=len(self.class_names))

    def rows_of_class(self, label: int) -> np.ndarray:
        """Return rows of the train split with this label, ascending."""
        return np.flatnonzero(self.train.labels == label)


def match_split(name: str, splits: Sequence[str]) -> str | None:
    """Return the split of this name, else the only one that differs in case.

    `train` also stands for `training`.
    """
    if name in splits:
        return name
    words = TRAIN_SPLITS if name == "train" else (name.casefold(),)
    alike = [s for word in words for s in splits if s.casefold() == word]
    return alike[0] if len(alike) == 1 else None


def choose_train(splits: Sequence[str], config: SourceConfig) -> str:
    """Return the name of the train split.

    Raises:
        InputError: if it does not exist.
    """
    train = match_split(config.train_split, splits)
    if train is None:
        raise InputError(
            f"{printable(config.path)} has no split {config.train_split!r}; it has {', '.join(splits) or 'none'}: "
            "name one with --set source.train_split=NAME"
        )
    return train


def test_candidates(splits: Sequence[str], train: str, config: SourceConfig) -> list[str]:
    """Return the splits that may be the test split, the best first.

    The one that the settings name, else all of `TEST_SPLITS` that exist, else none.

    Raises:
        InputError: if the split that the settings name does not exist.
    """
    if config.test_split is None:
        return [s for word in TEST_SPLITS for s in splits if s.casefold() == word and s != train]
    test = match_split(config.test_split, splits)
    if test is None and config.test_split.casefold() == NO_SPLIT:
        return []
    if test is None:
        raise InputError(
            f"{printable(config.path)} has no split {config.test_split!r}; it has {', '.join(splits)}: name one with "
            "--set source.test_split=NAME, or none with --set source.test_split=none"
        )
    return [test]


def is_unlabeled(labels: np.ndarray) -> bool:
    """Return whether every label of a split is missing or negative.

    The test splits of benchmarks are like this.
    """
    kind = labels.dtype.kind
    if kind == "O":
        return all(x is None or x == "" or (isinstance(x, int | float) and not x >= 0) for x in labels.tolist())
    return bool(kind in "if" and len(labels) and (~(labels >= 0)).all())


def checked_source(
    splits: dict[str, Split], names: tuple[str, ...], content: Any, origin: str, train: str, test: str | None
) -> ImageSource:
    """Check labels, names and classes of a source and build it, as every loader does."""
    if not all(isinstance(n, str) for n in names):  # a Parquet file's own description may hold anything
        raise InputError(f"the class names of {origin} are not all text; correct the names that its files declare")
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise InputError(f"class name {twice!r} of {origin} stands for two classes; give every class its own name")
    for s in splits.values():
        if len(s) and (s.labels.min() < 0 or s.labels.max() >= len(names)):
            wrong = int(s.labels.min()) if s.labels.min() < 0 else int(s.labels.max())
            raise InputError(
                f"split {s.name!r} of {origin} has label {wrong} but there are {len(names)} classes; "
                "drop unlabeled rows or name every class"
                + ("" if s.name == train else ", or name another split with --set source.test_split=NAME or none")
            )
    counts = np.bincount(splits[train].labels, minlength=len(names))
    if not len(names) or counts.min(initial=1) == 0:
        empty = names[int(counts.argmin())] if len(names) else "(none)"
        raise InputError(f"class {empty!r} of {origin} has no image in split {train!r}; drop the class or add images")
    content.update("\x1f".join((*names, train, test or "")).encode())
    return ImageSource(splits, names, content.hexdigest(), origin, train, test)


def hash_files(h: Any, root: Path, files: Sequence[Path], on_bad_image: Literal["raise", "skip"] = "raise") -> None:
    """Hash relative names and contents of files.

    A copied folder has the same fingerprint. Under `skip` a file that may not be read counts as one without content.

    Raises:
        InputError: if a file may not be read.
    """
    for f in files:
        name = f.relative_to(root).as_posix()
        try:
            h.update(f"{name}|{f.stat().st_size}|".encode("utf-8", "surrogateescape"))
            with open(f, "rb") as handle:
                while block := handle.read(1 << 20):
                    h.update(block)
        except OSError as e:
            if on_bad_image == "raise":
                raise InputError(
                    f"{printable(f)} cannot be read ({e.strerror}); change its rights, or set it aside with "
                    "--set source.on_bad_image=skip"
                ) from e
            h.update(b"unreadable")


def normalize_name(name: str) -> str:
    """Return a class name in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", name)


def as_names(names: object) -> tuple[str, ...]:
    """Return class names of a caller in composed form; numbers become text.

    Raises:
        InputError: if they are not a sequence.
    """
    if isinstance(names, str) or not isinstance(names, Sequence | np.ndarray):
        raise InputError(f"class_names is a list of names in the order of the classes, not {names!r}")
    return tuple(normalize_name(str(n)) for n in names)


NUMBER = re.compile(r"[0-9]+")


def number_labels(
    raw: dict[str, np.ndarray], names: tuple[str, ...] | None, origin: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return class names and the labels (n,) int64 of every split.

    Without `names` the labels themselves, numbers or text, are the names, in their order; text that is numbers in all
    rows is in the order of these numbers.
    """
    if names is not None:
        return tuple(normalize_name(n) if isinstance(n, str) else n for n in names), {
            s: labels.astype(np.int64) for s, labels in raw.items()
        }
    values = {s: _plain_labels(labels, origin) for s, labels in raw.items()}
    for s, x in values.items():
        missing = (x == "") if x.dtype.kind == "U" else (x < 0) if x.dtype.kind in "if" else np.zeros(1, bool)
        if missing.any():
            raise InputError(
                f"{int(missing.sum())} rows of split {s!r} of {origin} have no label, the first is row "
                f"{int(missing.argmax())}; drop them"
            )
    text = [x for x in values.values() if x.dtype.kind == "U"]
    if 0 < len(text) < len(values):  # numbers in one split and text in another: a number is a number
        if not all(NUMBER.fullmatch(v) for x in text for v in np.unique(x).tolist()):
            raise InputError(f"labels of {origin} must be whole numbers or text, and alike in all rows and splits")
        values = {s: x.astype(np.int64) for s, x in values.items()}
    unique, places = np.unique(np.concatenate(list(values.values())), return_inverse=True)
    texts = tuple(map(str, unique.tolist()))
    _check_numbers(texts, origin)
    names = tuple(sort_class_names(set(texts))) if unique.dtype.kind == "U" else texts
    rank = {n: i for i, n in enumerate(names)}
    numbers = np.asarray([rank[t] for t in texts], np.int64)[places]
    ends = np.cumsum([len(x) for x in values.values()])[:-1]
    return names, dict(zip(values, np.split(numbers, ends), strict=True))


def _plain_labels(labels: np.ndarray, origin: str) -> np.ndarray:
    """Whole numbers, also those stored as floats, or text in composed form."""
    kind = labels.dtype.kind if labels.ndim == 1 else ""
    if kind == "f" and np.isfinite(labels).all() and (labels == np.rint(labels)).all():
        return labels.astype(np.int64)
    if kind == "U":
        return np.asarray([normalize_name(v) for v in labels.tolist()], labels.dtype)
    if not kind or kind not in "iub":
        raise InputError(f"labels of {origin} must be whole numbers or text, and alike in all rows and splits")
    return labels


def _check_numbers(names: Sequence[str], origin: str) -> None:
    """No two names are the same number, such as 1 and 01."""
    if all(NUMBER.fullmatch(n) for n in names) and len({int(n) for n in names}) < len(names):
        twice = next(n for n in names if sum(int(n) == int(m) for m in names) > 1)
        raise InputError(
            f"{origin} has two classes whose names are the number {int(twice)}; write the numbers in one way"
        )


def sort_class_names(names: set[str]) -> list[str]:
    """Sort numerically if all names are numbers, else as text, as torchvision does."""
    if all(NUMBER.fullmatch(n) for n in names):
        return sorted(names, key=lambda n: (int(n), n))
    if all(re.fullmatch(r"[0-9]+\.?[0-9]*", n) for n in names):
        return sorted(names, key=lambda n: (float(n), n))
    return sorted(names)


Preprocess = Literal["squash", "crop", "pad"]
