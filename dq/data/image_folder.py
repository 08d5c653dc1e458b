"""Sources over folders of images by class."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from dq.config.schema import SourceConfig
from dq.core.errors import InputError
from dq.core.text import first_line, printable
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
    match_split,
    normalize_name,
    sort_class_names,
    test_candidates,
)

log = logging.getLogger("dq")

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # tables of `datasets`' image folders
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt", ".xlsx")
RECORD = "provenance.json"  # of a run or a set of dq
MODELS = ("model_index.json", "diffusion_pytorch_model.safetensors", "model.safetensors")
# of file managers, Git and the Hub; never data
LITTER = (".ds_store", "thumbs.db", "desktop.ini", ".git", ".gitattributes", ".gitignore", ".cache", ".huggingface")


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Raise errors of the block as `InputError` that names the folder."""
    try:
        yield
    except OSError as e:
        raise InputError(
            f"folder {printable(folder)} cannot be read ({e.strerror}); change its rights or move it elsewhere"
        ) from e


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """List the entries of a folder by name.

    Raises:
        InputError: if it may not be read.
    """
    with reading(folder), os.scandir(folder) as entries:
        return sorted(entries, key=lambda e: e.name)


def made_by_dq(folder: Path) -> bool:
    """Return whether a folder holds only runs, sets or models, or is one."""
    if any(os.path.isfile(folder / f) for f in MODELS):
        return True
    if os.path.isfile(folder / RECORD):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            record = json.loads((folder / RECORD).read_text())
            return isinstance(record, dict) and "checksum" in record and bool({"dq", "config_name"} & set(record))
    folders = []
    with reading(folder), os.scandir(folder) as entries:
        for e in entries:  # stops at the first file of a folder of images
            if e.is_dir(follow_symlinks=False) and e.name[0] != ".":
                folders.append(Path(e.path))
            elif e.name[0] != "." and e.name != "README.md":
                return False
    return bool(folders) and all(made_by_dq(f) for f in folders)


def walk_files(folder: Path, left_out: LeftOut, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield files below a folder, without hidden ones, runs, sets and models.

    Links to folders are followed.
    """
    real_path = os.path.realpath(folder)
    for entry in list_folder(folder):
        path = Path(entry.path)
        if entry.name.lower() in LITTER:
            continue
        if entry.name[0] == ".":
            left_out.add("hidden item", "", path)
        elif not entry.is_dir():
            yield path
        elif os.path.realpath(path) in (above | {real_path}):
            left_out.add("link", "to a folder above", path)
        elif made_by_dq(path):
            left_out.add("folder", "of a run, set or model", path)
        else:
            yield from walk_files(path, left_out, above | {real_path})


def has_tables(root: Path) -> bool:
    """Return whether a folder holds Parquet or Arrow files outside hidden folders and sets."""
    return any(f.suffix in (".parquet", ".arrow") for f in walk_files(root, LeftOut()))


def has_label_table(root: Path, config: SourceConfig) -> bool:
    """Return whether an image folder has a metadata table with labels."""
    places = [root, *(Path(e.path) for e in list_folder(root) if e.is_dir() and e.name[0] != ".")]
    tables = [place / name for place in places for name in METADATA if (place / name).is_file()]
    usual = {config.label_column} if config.label_column else {"label", "labels", "fine_label", "class"}
    return any(usual & set(_columns(table)) for table in tables)


def _columns(table: Path) -> list[str]:
    try:
        if table.suffix == ".parquet":
            import pyarrow.parquet as pq

            return list(pq.read_schema(table).names)
        with open(table, encoding="utf-8-sig") as f:
            first = f.readline()
        return list(json.loads(first)) if table.suffix == ".jsonl" else next(csv.reader([first]), [])
    except (OSError, TypeError, ValueError) as e:
        raise InputError(f"the table {table} cannot be read ({first_line(e)}); mend it or move it elsewhere") from e


def images_below(folder: Path, left_out: LeftOut, on_bad_image: Literal["raise", "skip"] = "raise") -> list[Path]:
    """Return image files below a folder, sorted.

    Counts what is left out: other suffixes, hidden files, empty folders, and under `skip` broken links.
    """
    files = []
    for f in walk_files(folder, left_out):
        if f.suffix.lower() not in IMAGE_SUFFIXES:
            left_out.add("file", "without the suffix of an image that is read", f)
        elif not f.exists():
            if on_bad_image == "raise":
                raise InputError(
                    f"{printable(f)} points to a file that is not there; restore the file or remove the link, or set "
                    "it aside with --set source.on_bad_image=skip"
                )
            left_out.add("link", "to nothing", f)
        elif f.is_file():
            files.append(f)
        else:
            left_out.add("item", "of another kind than files and folders", f)
    return sorted(files)


def _subfolders(folder: Path) -> list[Path]:
    """Folders in a folder, by name, without hidden ones and without runs, sets and models."""
    inside = (Path(e.path) for e in list_folder(folder) if e.is_dir() and e.name[0] != ".")
    return [d for d in inside if not made_by_dq(d)]


def _split_folders(root: Path, config: SourceConfig) -> dict[str, Path]:
    """Folders of splits by name; empty if `root` holds class folders.

    A folder `train` with images and without folders is a class. So is one with a single folder inside, as long as
    other folders that are no splits stand beside it.
    """
    folders = {d.name: d for d in _subfolders(root)}
    words = {*TRAIN_SPLITS, *TEST_SPLITS, config.train_split.casefold(), (config.test_split or "test").casefold()}
    splits = {name: d for name, d in folders.items() if name.casefold() in words}
    train = match_split(config.train_split, list(splits))
    if train is None:
        if config.train_split != "train":
            raise InputError(
                f"{printable(root)} has no folder {config.train_split!r}; name the train split that is there with "
                "--set source.train_split=NAME"
            )
        with_classes = [name for name, d in splits.items() if _subfolders(d)]
        if with_classes and len(splits) == len(folders):
            raise InputError(
                f"{printable(root)} has {', '.join(splits)} but no folder 'train'; name it with "
                "--set source.train_split=NAME"
            )
        return {}
    classes = _subfolders(splits[train])
    if not classes and len(splits) == len(folders):
        raise InputError(
            f"{', '.join(map(printable, splits))} of {printable(root)} holds no class folders; sort images into "
            f"folders by class, or put a metadata.csv with columns file_name and label into each{_table_hint(root)}"
        )
    if not classes or (
        len(classes) == 1 and len(splits) < len(folders) and _unwrapped(splits[train]) == splits[train]
    ):
        return {}
    return splits


def _check_class_folders(folder: Path, classes: list[Path], root: Path, nested: str) -> None:
    """Refuse folders that stand for something else than classes."""
    inside = {c: {d.name for d in _subfolders(c)} for c in classes}
    splits = [c for c in classes if match_split("train", sorted(inside[c]))]
    if splits:
        raise InputError(
            f"{printable(folder)} holds no class folders but {printable(splits[0].name)} with splits inside; "
            f"give {printable(splits[0])}, or put the splits above the classes"
        )
    if nested == "join":
        return
    if len(classes) == 1 and len(inside[classes[0]]) > 1:
        raise InputError(
            f"{printable(folder)} holds one folder, {printable(classes[0].name)}, with {len(inside[classes[0]])} "
            f"folders; if these are the classes, give {printable(classes[0])}; if they are parts of one class, set "
            "source.nested=join"
        )
    deep = {c: frozenset(leaf for d in _subfolders(c) for leaf in _leaves(d)) for c in classes if inside[c]}
    for leaves in deep.values():
        alike = [c for c in deep if deep[c] == leaves]
        if len(leaves) > 1 and len(alike) > 1:
            names = ", ".join(map(printable, sorted(leaves)[:4]))
            raise InputError(
                f"the folders {', '.join(printable(c.name) for c in alike[:4])} of {printable(folder)} all hold the "
                f"same folders {names}; if these are the classes, give one of the first as the data, or name the "
                "splits with --set source.train_split=NAME source.test_split=NAME; if they are parts of every class, "
                "set source.nested=join"
            )


def _leaves(folder: Path) -> set[str]:
    """Names of the lowest folders at and below a folder."""
    below = [leaf for d in _subfolders(folder) if not d.is_symlink() for leaf in _leaves(d)]
    return set(below) or {folder.name}


def _unwrapped(folder: Path) -> Path:
    """The folder itself, or the only one in it if that holds the class folders (train/train/CLASS)."""
    entries = [e for e in list_folder(folder) if e.name[0] != "." and e.name.lower() not in LITTER]
    if len(entries) == 1 and entries[0].is_dir() and len(_subfolders(Path(entries[0].path))) > 1:
        return _unwrapped(Path(entries[0].path))
    return folder


def _class_name(folder: Path) -> str:
    try:
        folder.name.encode()
    except UnicodeEncodeError:
        raise InputError(f"the name of class folder {printable(folder)} is not UTF-8; rename the folder") from None
    return normalize_name(folder.name)


def _read_split(
    folder: Path, root: Path, config: SourceConfig, left_out: LeftOut, *, train: bool
) -> dict[str, list[Path]]:
    """Images of every class of a split."""
    for entry in list_folder(folder):
        path = Path(entry.path)
        if entry.is_dir():
            if entry.name[0] == ".":
                left_out.add("hidden item", "", path)
            elif made_by_dq(path):
                left_out.add("folder", "of a run, set or model", path)
        elif path.suffix.lower() in IMAGE_SUFFIXES and entry.name[0] != ".":
            left_out.add("image", "outside class folders", path)
        elif path.suffix.lower() in TABLES and (folder != root or path.name in METADATA):
            left_out.add("table", "beside class folders", path)
    classes = _subfolders(folder)
    if train:
        _check_class_folders(folder, classes, root, config.nested)
    images: dict[str, list[Path]] = {}
    for c in classes:
        name = _class_name(c)
        if name in images:
            raise InputError(
                f"two folders of {printable(folder)} are called {name!r} and differ only in Unicode form; rename one"
            )
        lost = LeftOut()
        images[name] = images_below(c, lost, config.on_bad_image)
        if not images[name] and (train or lost):
            why = f"only {lost}; the suffixes read are {', '.join(sorted(IMAGE_SUFFIXES))}" if lost else "it is empty"
            raise InputError(
                f"class folder {printable(c)} holds no images: {why}; add images or move the folder elsewhere"
            )
        if not images[name]:
            left_out.add("empty class folder", "", c)
        left_out.merge(lost)
    return images


def open_image_folder(root: Path, config: SourceConfig) -> ImageSource:
    """Open a folder of images by class, with or without folders of splits."""
    left_out = LeftOut()
    split_folders = _split_folders(root, config)
    if split_folders:
        for other in _subfolders(root):
            if other.name not in split_folders:
                left_out.add("folder", "beside the splits", other)
        split_folders = {s: _unwrapped(d) for s, d in split_folders.items()}
        usable = [s for s, d in split_folders.items() if any(walk_files(d, LeftOut()))]
        for s in split_folders:
            if s not in usable:
                left_out.add("empty folder", "of a split", split_folders[s])
        train = choose_train(usable, config)
        test = _test_folder(usable, train, split_folders, config, left_out)
        for s in usable:
            if s.casefold() in TRAIN_SPLITS and s not in (train, test):
                left_out.add("other train split", "", split_folders[s])
    else:
        split_folders = {config.train_split: root}
        train, test = config.train_split, None
        test_candidates([train], train, config)  # refuses a test split that the settings name
    used = [train, test] if test else [train]
    files = {s: _read_split(split_folders[s], root, config, left_out, train=s == train) for s in used}
    if not files[train]:
        _refuse_without_classes(root)
    names = tuple(sort_class_names(set(files[train])))
    index = {n: i for i, n in enumerate(names)}
    if test:
        _check_test_classes(files[test], index, test, root, left_out)
    left_out.warn(str(root))
    if len(names) == 1:
        log.warning(
            "%s holds one class only, %r; images of several classes lie in a folder each", printable(root), names[0]
        )
    splits = {}
    h = hashlib.blake2b(digest_size=8)
    for s, classes in files.items():
        pairs = [(f, index[c]) for c in sorted(classes) for f in classes[c]]
        paths = [f for f, _ in pairs]
        splits[s] = Split(np.asarray([c for _, c in pairs], np.int64), paths.__getitem__, s)
        hash_files(h, root, paths, config.on_bad_image)
    return checked_source(splits, names, h, str(root), train, test)


def _test_folder(
    splits: list[str], train: str, folders: dict[str, Path], config: SourceConfig, left_out: LeftOut
) -> str | None:
    """The first candidate for the test split that has a class folder of the train split, else the first.

    The test splits of benchmarks and competitions often have no classes.
    """
    classes = {normalize_name(d.name) for d in _subfolders(folders[train])}
    candidates = test_candidates(splits, train, config)
    for split in candidates:
        if classes & {normalize_name(d.name) for d in _subfolders(folders[split])}:
            for other in candidates[: candidates.index(split)]:
                left_out.add("split", "without class folders", folders[other])
            return split
    return candidates[0] if candidates else None


def _table_hint(root: Path) -> str:
    """How the labels in a table of a folder without class folders can be read."""
    places = [root, *_subfolders(root)]
    tables = [p / e.name for p in places for e in list_folder(p) if Path(e.name).suffix.lower() in TABLES]
    for table in tables:
        if table.name in METADATA:
            return (
                f"; the table {printable(table)} has the columns {', '.join(_columns(table)[:8])}: name that of the "
                "labels with --set source.label_column=NAME"
            )
    if tables:
        return (
            f"; labels in the table {printable(tables[0])} are read if it is called metadata.csv and has the columns "
            "file_name and label"
        )
    if any(Path(e.name).suffix.lower() == ".tar" for p in places for e in list_folder(p)):
        return "; WebDataset tars are read with --set source.streaming=true"
    return ""


def _refuse_without_classes(root: Path) -> None:
    raise InputError(
        f"{printable(root)} holds no images in class folders; expected {printable(root)}/train/CLASS/*.png or "
        f"{printable(root)}/CLASS/*.png{_table_hint(root)}"
    )


def _check_test_classes(
    classes: dict[str, list[Path]], index: dict[str, int], test: str, root: Path, left_out: LeftOut
) -> None:
    """Every class of the test split is one of the train split."""
    leave = "give another with --set source.test_split=NAME, or leave it out with --set source.test_split=none"
    if not any(classes.values()):
        raise InputError(f"split {test!r} of {printable(root)} has no class folders with images; {leave}")
    strange = next((c for c in classes if c not in index and classes[c]), None)
    if strange is not None:
        alike = next((c for c in index if c.casefold() == strange.casefold()), None)
        hint = f" (there is {alike!r}: make their names alike)" if alike else ""
        raise InputError(
            f"class folder {strange!r} of split {test!r} in {printable(root)} has no images in the train split{hint}; "
            f"{leave}"
        )
    for c in index:
        if c not in classes:
            left_out.add("class", "without a folder in the test split", c)
    for c in [c for c in classes if not classes[c]]:
        del classes[c]
