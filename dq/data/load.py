"""Open labeled image sets: `load_source`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from dq.config.reader import from_dict, to_dict
from dq.config.schema import SourceConfig
from dq.core.errors import InputError
from dq.core.files import as_path, suggest_folder
from dq.data.hf_datasets import open_with_datasets
from dq.data.hub_lookup import check_hub_set
from dq.data.image_folder import has_label_table, has_tables, open_image_folder
from dq.data.source import ImageSource, Preprocess
from dq.data.splits import with_test_split
from dq.data.streaming import open_shards
from dq.data.tensors import Arrays, from_tensors, load_digits_source

OF_TABLES = ("name", "revision", "train_split", "test_split", "image_column", "label_column", "streaming")
Loadable = str | Path | SourceConfig | ImageSource | Arrays | Mapping[str, Arrays]


def load_source(
    source: Loadable,
    *,
    class_names: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    on_bad_image: Literal["raise", "skip"] | None = None,
    **options: object,
) -> ImageSource:
    """Open a labeled image set.

    Args:
        source: a Hub data set id; a local folder with Parquet files in the layout that `load_dataset` reads; a folder
            of images `split/class/*.png` or `class/*.png`; "sklearn:digits"; tensors or arrays `(images, labels)` or
            `{"train": (images, labels), "test": ...}` with images (n, C, H, W), uint8 or float in [0, 1], C 1 or 3.
        class_names: names in index order, for tensors.
        preprocess: how an image becomes a square: crop, squash or pad; None: crop.
        on_bad_image: raise an error at an image that cannot be read, or skip it; None: raise.
        **options: fields of `SourceConfig` (`train_split`, `test_split`, `image_column`, `label_column`, ...).

    Raises:
        InputError: if it does not exist, lacks a split or a column, or its classes do not fit together.
    """
    requested = {"preprocess": preprocess, "on_bad_image": on_bad_image}
    reading = {name: value for name, value in requested.items() if value is not None}
    from_dict(SourceConfig, reading)  # checks the values
    if isinstance(source, ImageSource):
        return dataclasses.replace(source, **reading)  # type: ignore[arg-type]
    if type(source).__module__.partition(".")[0] == "datasets":
        raise InputError(
            f"a {type(source).__name__} of `datasets` in memory is not read; write it as Parquet (`to_parquet`) into "
            "a folder and give that, or give its Hub id"
        )
    if isinstance(source, (tuple, list, Mapping)):
        if options:
            raise InputError(f"tensors have no setting {', '.join(options)}; it is for folders and Hub data sets")
        pairs = source if isinstance(source, Mapping) else tuple(source)
        return dataclasses.replace(from_tensors(pairs, class_names=class_names), **reading)  # type: ignore[arg-type]
    if not isinstance(source, (str, os.PathLike, SourceConfig)):
        raise InputError(
            f"a source is a path, a Hub id, a pair (images, labels) or a SourceConfig, not {type(source).__name__}"
        )
    if class_names is not None:
        raise InputError("class_names is for tensors; a data set on disk or on the Hub has names of its own")
    base = to_dict(source) if isinstance(source, SourceConfig) else {"path": os.fspath(source)}
    config = from_dict(SourceConfig, {**base, **reading, **options})
    opened = dataclasses.replace(_open(config), preprocess=config.preprocess, on_bad_image=config.on_bad_image)
    return with_test_split(opened, config.test_share)


def _open(config: SourceConfig) -> ImageSource:
    if not config.path:
        raise InputError("no data set is named; give one with --data or source.path")
    if config.path == "sklearn:digits":
        plain = SourceConfig()
        ignored = [f for f in OF_TABLES if getattr(config, f) != getattr(plain, f)]
        if ignored:
            raise InputError(f"sklearn:digits has no source.{ignored[0]}; leave it out")
        return load_digits_source()
    folder = as_path(config.path, "source.path")
    if folder.is_dir():
        if config.path.startswith("~/"):
            config = dataclasses.replace(config, path=str(folder))
        if config.streaming:
            return open_shards(config)
        tables = has_tables(folder) or has_label_table(folder, config)
        return open_with_datasets(config) if tables else open_image_folder(folder, config)
    if folder.exists() or config.path.startswith(("/", ".", "~")) or config.path.count("/") > 1:
        raise InputError(
            f"{config.path} is not a folder{suggest_folder(folder)}; give a folder of images or Parquet "
            "files, or a Hub id"
        )
    check_hub_set(config)
    return open_shards(config) if config.streaming else open_with_datasets(config)
