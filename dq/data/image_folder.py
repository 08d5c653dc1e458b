"""Sources over folders of images by class."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from dq.config.schema import SourceConfig
from dq.core.errors import InputError
from dq.data.images import IMAGE_SUFFIXES
from dq.data.source import TEST_SPLITS, ImageSource, Split, _class_order, _hash_files, checked_source, name_test_split


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
