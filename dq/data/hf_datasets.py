"""Sources read by the `datasets` library: Hub data sets and local tables."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from dq.config.schema import SourceConfig
from dq.core.errors import InputError
from dq.core.plain import PlainDict
from dq.core.text import first_line
from dq.data.image_folder import walk_files
from dq.data.images import IMAGE_SUFFIXES
from dq.data.left_out import LeftOut
from dq.data.source import (
    TEST_SPLITS,
    TRAIN_SPLITS,
    ImageSource,
    Split,
    checked_source,
    choose_train,
    hash_files,
    is_unlabeled,
    match_split,
    number_labels,
    test_candidates,
)

log = logging.getLogger("dq")

# what libraries raise at damaged metadata while they open a data set
UNOPENED = (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class _Tables:
    """What `datasets` opened, and the columns to read."""

    builder: Any
    splits: PlainDict  # tables by name, none without rows
    train: str
    image_column: str
    label_column: str

    def labels(self, split: str) -> list[Any]:
        """Labels of the rows as stored; none if the split has no such column."""
        table = self.splits[split]
        if self.label_column not in table.column_names:
            return []
        return table.with_format("arrow")[self.label_column].to_pylist()


def open_with_datasets(config: SourceConfig) -> ImageSource:
    """Open a data set of the Hub or a folder by the `datasets` library.

    Raises:
        InputError: if it cannot be opened, lacks a split or a column, or its classes do not fit together.
    """
    content = hashlib.blake2b(digest_size=8)
    left_out = LeftOut()
    folder = Path(config.path) if Path(config.path).is_dir() else None
    paths = _hash_folder(content, config, left_out) if folder else []
    # The library's cache does not see that the files of a local folder have changed, so it gets one per content.
    cache_dir = _content_cache(content.hexdigest()) if folder else None
    tables = _open_tables(config, paths, cache_dir, left_out)
    train = tables.train
    test = labeled_split(list(tables.splits), train, config, lambda s: np.asarray(tables.labels(s), object))
    names, labels = _read_labels(tables, [s for s in (train, test) if s], config.path)
    if folder and type(tables.builder).__module__.endswith("imagefolder"):
        left_out.merge(_unmatched_images(tables.splits, tables.image_column, config, paths))
    left_out.warn(config.path)
    splits = {s: _image_split(tables, s, labels[s], folder, config.path) for s in labels}
    if not folder:
        _hash_hub_set(content, config, tables, splits)
    content.update(f"{tables.image_column}|{tables.label_column}".encode())
    return checked_source(splits, names, content, config.path, train, test)


def _hash_folder(content: object, config: SourceConfig, left_out: LeftOut) -> list[Path]:
    """Hash all files of a folder, images beside tables too, and return their paths."""
    root = Path(os.path.abspath(config.path))
    paths = sorted(f for f in walk_files(root, left_out) if f.is_file())
    hash_files(content, root, paths)
    return paths


def _content_cache(digest: str) -> str:
    import datasets

    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"dq-{digest}")


def _hash_hub_set(content: Any, config: SourceConfig, tables: _Tables, splits: dict[str, Split]) -> None:
    checksums = sorted(tables.splits[tables.train].info.download_checksums or {})
    counts = {s: rows.num_rows for s, rows in tables.splits.items()}
    content.update(f"{config.path}|{config.name}|{checksums}|{counts}".encode())
    for split in splits.values():
        content.update(split.labels.tobytes())


def _open_tables(config: SourceConfig, paths: list[Path], cache_dir: str | None, left_out: LeftOut) -> _Tables:
    """Open the splits that have rows and choose the train split and the columns."""
    with opening(config.path):
        builder = open_builder(config, paths, cache_dir=cache_dir)
        outside = tables_outside(builder, paths)
        left_out.merge(outside)
        if outside and match_split(config.train_split, [str(s) for s in builder.config.data_files or {}]) is None:
            raise InputError(
                f"{config.path} has no split {config.train_split!r}: {outside}; call the files train-*.parquet and "
                "test-*.parquet, or name the train split with --set source.train_split=NAME"
            )
        builder.download_and_prepare()
        splits = {}
        for split, facts in builder.info.splits.items():
            if facts.num_examples:
                splits[str(split)] = builder.as_dataset(split=split)
            else:
                left_out.add("split", "without a row", split)
    train = choose_train(list(splits), config)
    features = splits[train].features
    image_column = choose_column("image", config.image_column, features, config.path)
    label_column = choose_column("label", config.label_column, features, config.path)
    return _Tables(builder, splits, train, image_column, label_column)


def _read_labels(tables: _Tables, splits: list[str], path: str) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Class names and the labels (n,) int64 of the splits."""
    from datasets import ClassLabel

    column, train = tables.label_column, tables.train
    raw_labels = {s: tables.labels(s) for s in splits}
    unlabeled = next((s for s in splits if None in raw_labels[s]), None)
    if unlabeled:
        raise InputError(f"column {column!r} of split {unlabeled!r} of {path} has rows without a label; drop them")
    feature = tables.splits[train].features[column]
    names: tuple[str, ...] | None = None
    if isinstance(feature, ClassLabel):
        names = tuple(feature.names)
        _check_declared_names(tables.builder, column, feature.names, path)
        for other in splits:
            if getattr(tables.splits[other].features[column], "names", None) != feature.names:
                raise InputError(f"splits {train!r} and {other!r} of {path} name their classes differently")
    return number_labels({s: np.asarray(raw_labels[s]) for s in splits}, names, path)


def _image_split(tables: _Tables, name: str, labels: np.ndarray, folder: Path | None, path: str) -> Split:
    import datasets
    import pyarrow as pa

    table, column = tables.splits[name], tables.image_column
    try:
        rows = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except (pa.ArrowException, TypeError, ValueError) as e:
        raise InputError(
            f"column {column!r} of {path} holds no images ({first_line(e)}); "
            "name another with --set source.image_column=NAME"
        ) from e
    others = tuple(c for c in table.column_names if c not in (column, tables.label_column))
    return Split(labels, _row_reader(rows, column, folder), name, _column_reader(table), others)


def _unmatched_images(loaded: PlainDict, column: str, config: SourceConfig, paths: list[Path]) -> LeftOut:
    """Count images without a row in the table, and under `skip` rows without image.

    Raises:
        InputError: if a row names an image that does not exist, and `source.on_bad_image` is not `skip`.
    """
    import datasets

    named = set()
    for rows in loaded.values():
        cells = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False)).with_format("arrow")
        named |= {os.path.realpath(cell["path"]) for cell in cells[column].to_pylist() if cell and cell["path"]}
    left_out = LeftOut()
    existing = {os.path.realpath(f): f for f in paths if f.suffix.lower() in IMAGE_SUFFIXES}
    for real in sorted(existing.keys() - named):
        left_out.add("image", "without a row in the table", existing[real])
    for f in sorted(f for f in named - existing.keys() if not os.path.exists(f)):
        if config.on_bad_image == "raise":
            raise InputError(
                f"{f} is named in the table of {config.path} and is not there; restore it, or set it aside with "
                "--set source.on_bad_image=skip"
            )
        left_out.add("row", "without its image", f)
    return left_out


def _check_declared_names(builder: Any, column: str, names: list[str], path: str) -> None:
    """Refuse local Parquet files whose class names are in another order than the first's.

    `datasets` casts the labels of all files to the names of the first, by number.
    """
    import pyarrow.parquet as pq

    for files in (builder.config.data_files or {}).values():
        for f in map(str, files):
            if f.endswith(".parquet") and os.path.isfile(f):
                declared = declared_names(pq.read_schema(f), column)
                if declared is not None and declared != names:
                    raise InputError(
                        f"files of {path} name their classes differently ({f}); write them with one order"
                    )


def declared_names(schema: object, column: str) -> list[str] | None:
    """Return the class names that a Parquet schema declares for a column."""
    import datasets

    feature = datasets.Features.from_arrow_schema(schema).get(column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


@contextlib.contextmanager
def opening(path: str) -> Iterator[None]:
    """Raise errors of libraries as `InputError` that names the data set."""
    import datasets

    try:
        yield
    except InputError:
        raise
    except (*UNOPENED, yaml.YAMLError, datasets.exceptions.DatasetsError) as e:
        if "Config name is missing" in str(e):
            names = re.findall(r"available configs: (.*)", str(e))
            raise InputError(
                f"{path} has several configurations ({'; '.join(names)[:200]}); name one with --set source.name=NAME"
            ) from e
        kind = "folder" if Path(path).is_dir() else "Hub data set (and there is no such local folder)"
        raise InputError(f"{path} cannot be opened as a {kind}: {first_line(e)}") from e


def open_builder(config: SourceConfig, paths: list[Path], cache_dir: str | None = None) -> Any:
    """Return the builder of `datasets` for a Hub id or a folder.

    `paths` are the files of the folder, absolute, that belong to the data: none that are hidden or in sets of dq.
    """
    from datasets import load_dataset_builder

    if not Path(config.path).is_dir():
        builder = load_dataset_builder(config.path, config.name, revision=config.revision, cache_dir=cache_dir)
        check_files(builder, config.path)
        return builder
    root = Path(os.path.abspath(config.path))  # `datasets` takes "." and "../x" for Hub ids
    builder = load_dataset_builder(str(root), config.name, cache_dir=cache_dir)
    check_files(builder, str(root))
    _check_shards(paths)
    names_of = {os.path.realpath(f): str(f) for f in paths}  # `datasets` resolves links
    resolved = {str(s): [os.path.realpath(f) for f in files] for s, files in (builder.config.data_files or {}).items()}
    all_files = {s: [names_of.get(f, f) for f in reals] for s, reals in resolved.items()}
    files = _splits_in_any_case(root, paths, all_files)
    if files is None:
        files = {s: [names_of[f] for f in reals if f in names_of] for s, reals in resolved.items()}
    if files == all_files or not any(files.values()):
        return builder
    files = {s: names for s, names in files.items() if names}
    kind = type(builder).__module__.rpartition(".")[2]
    return load_dataset_builder(kind, data_files=files, cache_dir=cache_dir)


def _check_shards(files: list[Path]) -> None:
    """Refuse a set of files NAME-00000-of-00003.parquet that lacks one."""
    shards: dict[tuple[str, int, str], set[int]] = {}
    for f in files:
        if shard := re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\..*)", str(f)):
            shards.setdefault((shard[1], int(shard[3]), shard[4]), set()).add(int(shard[2]))
    for (name, count, suffix), numbers in shards.items():
        if missing := sorted(set(range(count)) - numbers):
            raise InputError(f"{name}-{missing[0]:05d}-of-{count:05d}{suffix} is missing; get the file again")


def _splits_in_any_case(root: Path, paths: list[Path], files: dict[str, list[str]]) -> dict[str, list[str]] | None:
    """Files by split where their names have a split in capitals, which `datasets` does not see.

    None: no name has, or a card assigns files to splits.
    """
    card = root / "README.md"
    if card.is_file() and "data_files" in card.read_text(errors="replace"):
        return None
    kinds = {Path(f).suffix for names in files.values() for f in names}
    names = {"train": TRAIN_SPLITS, "validation": ("validation", "valid", "val", "dev"), "test": TEST_SPLITS}
    canonical = {word: split for split in ("test", "validation", "train") for word in names[split]}
    split_of = {f: s for s, fs in files.items() for f in fs}
    by_split: dict[str, list[str]] = {}
    capitals = False
    for f in paths:
        if f.suffix not in kinds:
            continue
        parts = f.relative_to(root).parts
        words = [w for part in parts for w in re.split(r"[-._ 0-9]+", part) if w.casefold() in canonical]
        if words:
            split = canonical[words[0].casefold()]
            capitals |= words[0] != words[0].casefold() and split_of.get(str(f)) != split
            by_split.setdefault(split, []).append(str(f))
    return by_split if capitals else None


def tables_outside(builder: Any, paths: list[Path]) -> LeftOut:
    """Count tables and tars of a folder that belong to no split by name."""
    left_out = LeftOut()
    if len(getattr(builder, "builder_configs", {})) > 1:  # the others belong to other configurations
        return left_out
    used = {os.path.realpath(f) for names in (builder.config.data_files or {}).values() for f in names}
    for f in paths:
        if f.suffix in (".parquet", ".arrow", ".tar") and os.path.realpath(f) not in used:
            left_out.add("table", "in no split by name", f.name)
    return left_out


def labeled_split(
    splits: list[str], train: str, config: SourceConfig, labels_of: Callable[[str], np.ndarray]
) -> str | None:
    """Return the test split: the best candidate that has labels.

    Raises:
        InputError: if there are candidates, but none has labels.
    """
    candidates = test_candidates(splits, train, config)
    for split in candidates:
        labels = labels_of(split)
        if len(labels) and not is_unlabeled(labels):
            for other in candidates[: candidates.index(split)]:
                log.warning(
                    "%s: split %r has no labels and is left out; %r is the test split", config.path, other, split
                )
            return split
    if candidates:
        raise InputError(
            f"split {candidates[0]!r} of {config.path} has no labels; name another with --set source.test_split=NAME, "
            "or leave it out with --set source.test_split=none"
        )
    return None


def check_files(builder: Any, path: str) -> None:
    """Refuse a data set whose card names files outside its folder or repository."""
    roots = [Path(path).absolute(), Path(path).resolve()] if Path(path).is_dir() else ["hf://datasets"]
    for files in (builder.config.data_files or {}).values():
        for file in map(str, files):
            if ".." in file.split("/") or not any(file.startswith(f"{root}/") for root in roots):
                raise InputError(f"the card of {path} names {file}, outside it; correct its data_files")


def _column_reader(rows: Any) -> Callable[[str], list[Any] | None]:
    def read(name: str) -> list[Any] | None:
        return rows.with_format("arrow")[name].to_pylist() if name in rows.column_names else None

    return read


def _row_reader(rows: Any, column: str, folder: Path | None) -> Callable[[int], Any]:
    import datasets
    from huggingface_hub import constants

    # folders of images that the cells only name: a table could name any file of this machine
    roots = [folder] if folder else [datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE]
    roots = [Path(root).resolve() for root in roots]

    def read(i: int) -> Any:
        cell = rows[i][column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise ValueError("the cell is empty")
        if cell["bytes"] is not None:
            return cell["bytes"]
        path = (folder / cell["path"] if folder else Path(cell["path"])).resolve()
        if not any(path.is_relative_to(root) for root in roots):
            raise ValueError(f"the cell names {cell['path']}, outside the data set")
        return path

    return read


def choose_column(what: Literal["image", "label"], requested: str | None, features: Any, origin: str) -> str:
    """Return the requested column, else one of the right type or name."""
    import datasets

    kind = {"image": datasets.Image, "label": datasets.ClassLabel}[what]
    usual = {"image": ("image", "img"), "label": ("label", "labels", "fine_label", "class")}[what]
    if requested is not None:
        if requested not in features:
            raise InputError(f"{origin} has no column {requested!r}; it has {', '.join(features)}")
        return _checked_column(what, requested, features, origin)
    of_kind = [c for c, f in features.items() if isinstance(f, kind)]
    named = [c for c in usual if c in (of_kind or features)]
    if named or len(of_kind) == 1:
        return _checked_column(what, named[0] if named else of_kind[0], features, origin)
    raise InputError(
        f"{origin} has no clear {what} column among {', '.join(features)}; "
        f"name it with --set source.{what}_column=NAME"
    )


def _checked_column(what: str, column: str, features: Any, origin: str) -> str:
    """The column; an error if it should hold labels and holds lists or mappings."""
    import datasets

    if what == "label" and not isinstance(features[column], datasets.ClassLabel | datasets.Value):
        raise InputError(
            f"column {column!r} of {origin} holds no labels but {type(features[column]).__name__}; "
            "name another with --set source.label_column=NAME"
        )
    return column
