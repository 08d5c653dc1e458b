"""Sources that the `datasets` library reads: Hub data sets and local Parquet or Arrow files."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from dq.config.schema import SourceConfig
from dq.core.errors import InputError
from dq.core.text import first_line
from dq.data.source import ImageSource, Split, _hash_files, checked_source, name_test_split, number_labels

# what damaged metadata make libraries raise while they open a data set
UNOPENED = (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


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
