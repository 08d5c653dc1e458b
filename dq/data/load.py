"""`load_source`: the one way to open a labelled image set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dq.config.reader import from_dict, to_dict
from dq.config.schema import SourceConfig
from dq.core.errors import InputError
from dq.data.hf_datasets import _from_datasets
from dq.data.image_folder import _from_image_folder
from dq.data.source import ImageSource
from dq.data.tensors import Arrays, _digits, from_tensors

Loadable = str | Path | SourceConfig | ImageSource | Arrays | Mapping[str, Arrays]


def load_source(
    source: Loadable,
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
    if isinstance(source, (tuple, Mapping)):
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
        from dq.data.streaming import open_shards

        return open_shards(config)
    folder = Path(config.path)
    if folder.is_dir():
        has_tables = next(folder.rglob("*.parquet"), None) or next(folder.rglob("*.arrow"), None)
        return _from_datasets(config) if has_tables else _from_image_folder(folder, config)
    if folder.exists() or config.path.startswith(("/", ".", "~")) or config.path.count("/") > 1:
        raise InputError(f"{config.path} is not a folder; give a folder of images or Parquet files, or a Hub id")
    return _from_datasets(config)
