"""Image sources: where labelled images come from, and how one becomes a square array of 8-bit RGB.

A source is a Hub data set, a local folder that `datasets.load_dataset` reads, a folder of images by class, tensors in
memory, or scikit-learn's digits. Class identity is an index with a name list; nothing downstream sees anything else.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from dq.config.reader import from_dict, to_dict
from dq.config.schema import SourceConfig
from dq.core.errors import InputError
from dq.core.text import first_line
from dq.images import IMAGE_SUFFIXES, UNDECODABLE, Preprocess, open_image, to_rgb, to_square

TEST_SPLITS = ("test", "validation", "valid", "val")


# what damaged metadata make libraries raise while they open a data set
UNOPENED = (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


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


# --- images -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(split: Split, row: int) -> Iterator[Image.Image]:
    """The image of a row. Raises `InputError` that names it if it cannot be read."""
    raw = None
    try:
        raw = split.read(row)
        yield open_image(raw)
    except UNDECODABLE as e:
        if isinstance(e, InputError):
            raise
        where = str(raw) if isinstance(raw, Path) else split.where(row)
        raise InputError(
            f"the image in {where} cannot be read ({type(e).__name__}: {str(e)[:120]}); "
            "replace it, or set it aside with --set source.on_bad_image=skip"
        ) from e


def read_image(split: Split, row: int, size: int, preprocess: Preprocess) -> np.ndarray:
    """Row `row` as a (3, size, size) uint8 array. Raises `InputError` that names the row if it cannot be read."""
    with _opened(split, row) as image:
        image.load()
        array = np.asarray(to_square(to_rgb(image), size, preprocess))
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def read_images(
    split: Split,
    rows: Sequence[int] | np.ndarray,
    size: int,
    preprocess: Preprocess,
    *,
    on_bad: Literal["raise", "skip"] = "raise",
    threads: int = 2,
) -> tuple[Tensor, list[int], list[str]]:
    """Read many rows: images (n, 3, size, size) uint8, the rows that were read, and one sentence per bad image."""

    def one(row: int) -> np.ndarray | InputError:
        try:
            return read_image(split, int(row), size, preprocess)
        except InputError as e:
            return e

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(one, rows))
    problems = [r for r in results if isinstance(r, InputError)]
    if problems and on_bad == "raise":
        raise problems[0]
    good = [(int(row), r) for row, r in zip(rows, results) if not isinstance(r, InputError)]
    stack = np.stack([a for _, a in good]) if good else np.zeros((0, 3, size, size), np.uint8)
    return torch.from_numpy(stack), [row for row, _ in good], [str(p) for p in problems]


# --- sources ------------------------------------------------------------------------------------------------------


def load_source(
    source: str | Path | SourceConfig | ImageSource | tuple[Tensor, Tensor] | dict[str, tuple[Tensor, Tensor]],
    *,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> ImageSource:
    """Open a labelled image set.

    Args:
        source: a Hub data set id; a local folder with Parquet files in the layout that `load_dataset` reads; a folder
            of images `split/class/*.png` or `class/*.png`; "sklearn:digits"; tensors `(images, labels)` or
            `{"train": (images, labels), "test": ...}` with images (n, C, H, W), uint8 or float in [0, 1], C 1 or 3.
        class_names: names in index order, for tensors.
        **options: fields of `SourceConfig` (`train_split`, `test_split`, `image_column`, `label_column`, ...).

    Raises:
        InputError: if it is not there, lacks a split or a column, or its classes do not fit together.
    """
    if isinstance(source, ImageSource):
        return source
    if isinstance(source, (tuple, dict)):
        if options:
            raise InputError(f"tensors have no setting {', '.join(options)}; it is for folders and Hub data sets")
        return from_tensors(source, class_names=class_names)
    if not isinstance(source, (str, Path, SourceConfig)):
        raise InputError(f"a source is a path, a Hub id, tensors or a SourceConfig, not {type(source).__name__}")
    base = to_dict(source) if isinstance(source, SourceConfig) else {"path": str(source)}
    config = from_dict(SourceConfig, {**base, **options})
    if not config.path:
        raise InputError("no data set is named; give one with --data or source.path")
    if config.path == "sklearn:digits":
        return _digits()
    if config.streaming:
        from dq.shards import open_shards

        return open_shards(config)
    folder = Path(config.path)
    if folder.is_dir():
        has_tables = next(folder.rglob("*.parquet"), None) or next(folder.rglob("*.arrow"), None)
        return _from_datasets(config) if has_tables else _from_image_folder(folder, config)
    if folder.exists() or config.path.startswith(("/", ".", "~")) or config.path.count("/") > 1:
        raise InputError(f"{config.path} is not a folder; give a folder of images or Parquet files, or a Hub id")
    return _from_datasets(config)


def _digits() -> ImageSource:
    """scikit-learn's 1,797 handwritten digits, 8x8, inside the package; a fixed stratified 75:25 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=digits.target)
    splits = {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
    return from_tensors(splits, class_names=[str(i) for i in range(10)], origin="sklearn:digits")


def from_tensors(
    source: tuple[Tensor, Tensor] | dict[str, tuple[Tensor, Tensor]],
    *,
    class_names: Sequence[str] | None = None,
    origin: str = "tensors",
) -> ImageSource:
    """A source over tensors in memory; see `load_source`."""
    pairs = source if isinstance(source, dict) else {"train": source}
    if "train" not in pairs:
        raise InputError(f"tensors need a 'train' split, not only {', '.join(pairs)}")
    h = hashlib.blake2b(digest_size=8)
    splits = {}
    for name, (images, labels) in pairs.items():
        images, labels = torch.as_tensor(images), torch.as_tensor(labels)
        if images.ndim != 4 or images.shape[1] not in (1, 3) or labels.shape != images.shape[:1]:
            raise InputError(
                f"split {name!r} needs images (n, 1 or 3, H, W) and labels (n,), "
                f"not {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        if labels.dtype.is_floating_point or not len(images):
            raise InputError(f"split {name!r} needs at least one image and whole-number labels, not {labels.dtype}")
        if images.dtype != torch.uint8:
            if not images.dtype.is_floating_point:
                raise InputError(f"images of split {name!r} must be uint8 or float in [0, 1], not {images.dtype}")
            if not torch.isfinite(images).all() or images.min() < 0 or images.max() > 1:
                raise InputError(f"float images of split {name!r} must be finite and lie in [0, 1]")
            images = (images * 255).round().to(torch.uint8)
        array = images.cpu().numpy()
        splits[name] = Split(labels.cpu().numpy().astype(np.int64), array.__getitem__, name)
        h.update(str(array.shape).encode())
        h.update(np.ascontiguousarray(array).tobytes())
        h.update(splits[name].labels.tobytes())
    highest = max(int(s.labels.max(initial=-1)) for s in splits.values()) + 1
    names = tuple(map(str, class_names)) if class_names is not None else tuple(str(i) for i in range(highest))
    return checked_source(splits, names, h, origin, "train", name_test_split(splits, None, origin))


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


# --- datasets -----------------------------------------------------------------------------------------------------


def _from_datasets(config: SourceConfig) -> ImageSource:
    import datasets
    import pyarrow as pa
    from datasets import ClassLabel, load_dataset_builder

    local = Path(config.path).is_dir()
    h = hashlib.blake2b(digest_size=8)
    own_cache = None
    if local:
        root = Path(config.path)
        # everything: a folder with tables may hold its images beside them
        _hash_files(h, root, sorted(f for f in root.rglob("*") if f.is_file() and f.name[0] != "."))
        # The library's cache does not see that the files of a local folder have changed, so it gets one per content.
        own_cache = str(Path(datasets.config.HF_DATASETS_CACHE) / f"dq-{h.hexdigest()}")
    with opening(config.path):
        builder = load_dataset_builder(
            config.path, config.name, revision=None if local else config.revision, cache_dir=own_cache
        )
        check_files(builder, config.path)
        builder.download_and_prepare()
        loaded = builder.as_dataset()
    test = check_splits(list(loaded), config)
    features = loaded[config.train_split].features
    image_column = choose_column("image", config.image_column, features, config.path)
    label_column = choose_column("label", config.label_column, features, config.path)
    keep = [s for s in (config.train_split, test) if s]
    raw_labels = {s: loaded[s].with_format("arrow")[label_column].to_pylist() for s in keep}
    feature = features[label_column]
    missing = next((s for s in keep if None in raw_labels[s]), None)
    if missing:
        raise InputError(f"column {label_column!r} of split {missing!r} of {config.path} has rows without a label")
    if isinstance(feature, ClassLabel):
        names: tuple[str, ...] | None = tuple(feature.names)
        if test and getattr(loaded[test].features[label_column], "names", None) != feature.names:
            raise InputError(
                f"splits {config.train_split!r} and {test!r} of {config.path} name their classes differently"
            )
    else:
        names = None
    names, numbers = number_labels({s: np.asarray(raw_labels[s]) for s in keep}, names, config.path)
    splits = {}
    folder = Path(config.path) if local else None
    for s in keep:
        try:
            rows = loaded[s].select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        except (pa.ArrowException, TypeError, ValueError) as e:
            raise InputError(
                f"column {image_column!r} of {config.path} holds no images ({first_line(e)}); "
                "name another with --set source.image_column=NAME"
            ) from e
        read = _row_reader(rows, image_column, folder)
        splits[s] = Split(numbers[s], read, s, _column_reader(loaded[s]))
    if not local:
        info = loaded[config.train_split].info
        h.update(f"{config.path}|{config.name}|{sorted(info.download_checksums or {})}|{loaded.num_rows}".encode())
        for split in splits.values():
            h.update(split.labels.tobytes())
    h.update(f"{image_column}|{label_column}".encode())
    return checked_source(splits, names, h, config.path, config.train_split, test)


@contextlib.contextmanager
def opening(path: str) -> Iterator[None]:
    """Turn what libraries raise while they open a data set into a sentence that names it."""
    import datasets

    try:
        yield
    except InputError:
        raise
    except (*UNOPENED, yaml.YAMLError, datasets.exceptions.DatasetsError) as e:
        kind = "folder" if Path(path).is_dir() else "Hub data set (and there is no such local folder)"
        raise InputError(f"{path} cannot be opened as a {kind}: {first_line(e)}") from e


def check_splits(splits: list[str], config: SourceConfig) -> str | None:
    """The name of the test split, if there is one; the train split must be there."""
    if config.train_split not in splits:
        raise InputError(
            f"{config.path} has no split {config.train_split!r}; it has {', '.join(splits)}: "
            "name one with --set source.train_split=NAME"
        )
    return name_test_split(splits, config.test_split, config.path)


def check_files(builder: Any, path: str) -> None:
    """Refuse a data set whose card names files outside its own folder, or on this machine instead of the Hub."""
    rooms = [Path(path).absolute(), Path(path).resolve()] if Path(path).is_dir() else ["hf://datasets"]
    for files in (builder.config.data_files or {}).values():
        for file in map(str, files):
            if ".." in file.split("/") or not any(file.startswith(f"{room}/") for room in rooms):
                raise InputError(f"the card of {path} names {file}, outside it; correct its data_files")


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


def _column_reader(rows: Any) -> Callable[[str], list[Any] | None]:
    def read(name: str) -> list[Any] | None:
        return rows.with_format("arrow")[name].to_pylist() if name in rows.column_names else None

    return read


def _row_reader(rows: Any, column: str, folder: Path | None) -> Callable[[int], Any]:
    import datasets
    from huggingface_hub import constants

    # where images may lie that the cells only name: a table could name any file of this machine
    rooms = [folder] if folder else [datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE]
    rooms = [Path(room).resolve() for room in rooms]

    def read(i: int) -> Any:
        cell = rows[i][column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise ValueError("the cell is empty")
        if cell["bytes"] is not None:
            return cell["bytes"]
        path = Path(cell["path"]).resolve()
        if not any(path.is_relative_to(room) for room in rooms):
            raise ValueError(f"the cell names {cell['path']}, outside the data set")
        return path

    return read


def choose_column(what: Literal["image", "label"], wanted: str | None, features: Any, origin: str) -> str:
    """The column of images or labels: the one named, else the one of the right type or with a usual name."""
    import datasets

    kind = {"image": datasets.Image, "label": datasets.ClassLabel}[what]
    usual = {"image": ("image", "img"), "label": ("label", "labels", "fine_label", "class")}[what]
    if wanted is not None:
        if wanted not in features:
            raise InputError(f"{origin} has no column {wanted!r}; it has {', '.join(features)}")
        return _plain(what, wanted, features, origin)
    of_kind = [c for c, f in features.items() if isinstance(f, kind)]
    named = [c for c in usual if c in (of_kind or features)]
    if named or len(of_kind) == 1:
        return _plain(what, named[0] if named else of_kind[0], features, origin)
    raise InputError(
        f"{origin} has no clear {what} column among {', '.join(features)}; "
        f"name it with --set source.{what}_column=NAME"
    )


def _plain(what: str, column: str, features: Any, origin: str) -> str:
    """The column, unless it should hold labels and holds lists or mappings."""
    import datasets

    if what == "label" and not isinstance(features[column], datasets.ClassLabel | datasets.Value):
        raise InputError(
            f"column {column!r} of {origin} holds no labels but {type(features[column]).__name__}; "
            "name another with --set source.label_column=NAME"
        )
    return column


# --- image folders ------------------------------------------------------------------------------------------------


def _class_order(names: set[str]) -> list[str]:
    """Numeric order for folders that are numbers (0, 1, ..., 10), else plain sorted order, as torchvision has it."""
    if all(re.fullmatch(r"\d+", n) for n in names):
        return sorted(names, key=lambda n: (int(n), n))
    return sorted(names)


def _images_below(folder: Path) -> list[Path]:
    """Image files below a folder, sorted; hidden files (editors, file managers) are not images."""
    found = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.name[0] != ".")
    lost = next((f for f in found if not f.exists()), None)
    if lost:
        raise InputError(f"{lost} points to a file that is not there; restore the file or remove the link")
    return [f for f in found if f.is_file()]


def _from_image_folder(root: Path, config: SourceConfig) -> ImageSource:
    known = {config.train_split, config.test_split, *TEST_SPLITS}
    split_dirs = {d.name: d for d in sorted(root.iterdir()) if d.is_dir() and d.name in known}
    if config.train_split not in split_dirs:
        if config.train_split != "train":
            raise InputError(f"{root} has no folder {config.train_split!r}; name the train split that is there")
        if split_dirs:
            raise InputError(
                f"{root} has {', '.join(split_dirs)} but no folder 'train'; name it with --set source.train_split=NAME"
            )
        split_dirs = {"train": root}
    test = name_test_split(list(split_dirs), config.test_split, str(root))
    files: dict[str, list[tuple[Path, str]]] = {}
    for s in (config.train_split, test):
        if s:
            classes = sorted(d for d in split_dirs[s].iterdir() if d.is_dir() and d.name[0] != ".")
            files[s] = [(f, d.name) for d in classes for f in _images_below(d)]
    if not files[config.train_split]:
        raise InputError(
            f"{root} holds no images in class folders; expected {root}/train/CLASS/*.png or {root}/CLASS/*.png"
        )
    names = tuple(_class_order({c for _, c in files[config.train_split]}))
    index = {n: i for i, n in enumerate(names)}
    strange = next((c for pairs in files.values() for _, c in pairs if c not in index), None)
    if strange:
        raise InputError(f"class folder {strange!r} of split {test!r} in {root} has no images in the train split")
    splits = {}
    h = hashlib.blake2b(digest_size=8)
    for s, pairs in files.items():
        paths = [f for f, _ in pairs]
        splits[s] = Split(np.asarray([index[c] for _, c in pairs], np.int64), paths.__getitem__, s)
        _hash_files(h, root, paths)
    return checked_source(splits, names, h, str(root), config.train_split, test)
