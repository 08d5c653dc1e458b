"""Distilled sets as Parquet files that `load_dataset` opens."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq.config.students import LabelKind
from dq.core.errors import InputError
from dq.core.files import Damaged, atomic_path, write_json
from dq.core.plain import PlainDict
from dq.core.seeds import digest_of
from dq.core.text import check_name, first_line
from dq.core.threads import thread_map
from dq.data.grid import image_grid
from dq.data.images import open_image
from dq.distilled.format import (
    GRID,
    GRID_CLASSES,
    GRID_COLUMNS,
    PROVENANCE,
    SHARDS,
    checked_provenance,
    file_facts,
    set_features,
)


class SetRows(Protocol):
    """Rows of a distilled set: what a `DistilledSet` has."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def weights(self) -> Tensor: ...

    @property
    def soft_labels(self) -> Tensor | None: ...

    @property
    def label_kind(self) -> LabelKind: ...

    @property
    def step_size(self) -> float | None: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def ipc(self) -> int: ...

    def images_uint8(self) -> Tensor: ...


SHARD_BYTES = 500_000_000  # of a file
GROUP_BYTES, GROUP_ROWS = 100_000_000, 1000  # of a row group; the Hub's viewer stops at about 286 MiB


@contextlib.contextmanager
def _intact(path: Path) -> Iterator[None]:
    """Raise `Damaged` for any error while files of a set are read."""
    import pyarrow as pa

    try:
        yield
    # of Pillow, pyarrow, datasets and NumPy
    except (
        OSError,
        ValueError,
        SyntaxError,
        ArithmeticError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        pa.ArrowException,
    ) as e:
        raise Damaged(
            f"{path} cannot be read ({first_line(e)}); make the set again with `dq label`, or pull it again"
        ) from e


def read_shard(data: bytes) -> PlainDict:
    """The columns of a Parquet file as tensors, and the class names."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset
    from datasets import Image as ImageFeature

    # not load_dataset: its cache takes two folders with the same card for the same data
    # in this thread: one of Arrow's that still holds the bytes when Python ends aborts the process
    table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
    rows = Dataset(table).cast_column("image", ImageFeature(decode=False))
    arrays = rows.with_format("numpy")
    columns: PlainDict = {"names": tuple(rows.features["label"].names)}
    columns["image"] = torch.from_numpy(np.stack(list(thread_map(_pixels, rows["image"]))))
    for name in ("label", "prototype", "count", "source_row"):
        columns[name] = torch.tensor(rows[name][:], dtype=torch.int64)
    columns["weight"] = torch.tensor(rows["weight"][:], dtype=torch.float32)
    if "soft_label" in rows.column_names:
        columns["soft_label"] = torch.from_numpy(np.stack(arrays["soft_label"][:])).half()
    if "pixels" in rows.column_names:
        columns["pixels"] = torch.from_numpy(np.stack(arrays["pixels"][:])).float()
    return columns


def write_set(
    folder: str | Path,
    config_name: str,
    parts: Iterable[SetRows],
    provenance: PlainDict,
) -> Path:
    """Write a set to `folder`/`config_name` as Parquet files.

    `write_dataset_card` makes it a configuration for `load_dataset(folder, config_name)`. `parts` are the rows in
    order, e.g. class by class; one part is in memory at a time, and the bytes do not depend on the division. Float
    images keep their values in a column `pixels` beside the 8-bit `image`. `provenance` is that of the whole set. Its
    file is written last: a set without it is incomplete.

    Returns:
        The first of the Parquet files.

    Raises:
        InputError: if there is no part, one has other classes or columns than the first, or the provenance cannot be
            read again.
    """
    target = Path(folder) / config_name
    check_name(config_name, "the set's name")
    provenance = checked_provenance(provenance)
    for partial in target.glob(".*.part*"):  # of a call that was killed
        partial.unlink()
    rest = iter(parts)
    queue = list(itertools.islice(rest, 1))
    if not queue:
        raise InputError(f"the set {config_name!r} has no parts; a distilled set needs at least one image")
    kind, totals = _kind(queue[0]), _Totals(torch.zeros(len(queue[0].class_names), dtype=torch.int64))
    shards = _write_shards(target, _row_groups(_tallied(queue, rest, kind, totals), kind), kind)
    record: PlainDict = {
        **provenance,
        **kind,
        "config_name": config_name,
        "rows": sum(shard.rows for shard in shards),
        "num_bytes": sum(shard.num_bytes for shard in shards),
    }
    record["ipc"] = provenance.get("ipc") or int(totals.counts.max())
    names = [f"train-{i:05d}-of-{len(shards):05d}.parquet" for i in range(len(shards))]
    record["files"] = {n: {**shard.facts, "rows": shard.rows} for n, shard in zip(names, shards, strict=True)}
    record["content"] = digest_of(record["files"])
    # the new files are complete; from here until the record is written there is no set of this name
    (target / PROVENANCE).unlink(missing_ok=True)
    for name, shard in zip(names, shards, strict=True):
        os.replace(shard.path, target / name)
    for old in set(target.glob(SHARDS)) - {target / name for name in names}:
        old.unlink()
    with atomic_path(target / GRID) as temporary:
        image_grid(totals.grid_rows()).save(temporary, format="PNG")
    record["grid"] = file_facts(target / GRID)
    write_json(target / PROVENANCE, record)
    return target / names[0]


@dataclass(frozen=True)
class _Totals:
    """Sums over the parts of a set, filled while they are written."""

    counts: Tensor  # (C,) int64, images per class
    heaviest: dict[int, list[tuple[float, Tensor]]] = field(default_factory=dict)  # class -> (weight, (3, H, W) uint8)

    def add(self, part: SetRows) -> None:
        """Count a part, and keep the heaviest images of the first classes."""
        self.counts.add_(torch.bincount(part.labels, minlength=len(self.counts)))
        limit = GRID_CLASSES if part.images.shape[-1] <= 64 else GRID_CLASSES // 2
        images = part.images_uint8()
        for c in sorted(set(part.labels.tolist())):
            if c in self.heaviest or len(self.heaviest) < limit:
                rows = (part.labels == c).nonzero()[:, 0].tolist()
                candidates = [(float(part.weights[i]), images[i].clone()) for i in rows]
                ranked = sorted([*self.heaviest.get(c, []), *candidates], key=lambda pair: -pair[0])
                self.heaviest[c] = ranked[:GRID_COLUMNS]

    def grid_rows(self) -> list[list[Tensor]]:
        """Images of the grid, one row per class."""
        return [[image for _, image in ranked] for _, ranked in sorted(self.heaviest.items())]


@dataclass(frozen=True)
class _Shard:
    """A Parquet file under its temporary name."""

    path: Path
    rows: int
    num_bytes: int  # of the rows in memory, see `loaded_bytes`
    facts: PlainDict  # digest and size of the file


def _tallied(queue: list[SetRows], rest: Iterator[SetRows], kind: PlainDict, totals: _Totals) -> Iterator[SetRows]:
    """Check the parts, add them to the totals, and yield them.

    No reference to a part is kept while the next is made.
    """
    while queue:
        differing = [name for name, value in _kind(queue[0]).items() if value != kind.get(name)]
        if differing:
            raise InputError(
                f"a part of the set has other {', '.join(differing)} than the first; give all parts the same"
            )
        totals.add(queue[0])
        yield queue.pop()
        queue.extend(itertools.islice(rest, 1))


def _write_shards(target: Path, groups: Iterator[Any], kind: PlainDict) -> list[_Shard]:
    """Write row groups to files of about SHARD_BYTES bytes each."""
    columns = set_features(kind)
    shards: list[_Shard] = []
    group = next(groups, None)
    while group is not None:
        path = target / f".{len(shards):05d}.part"
        rows = size = 0
        with atomic_path(path) as temporary, _parquet_writer(temporary, columns, kind) as writer:
            while group is not None and (not size or size + group.nbytes <= SHARD_BYTES):
                writer.write_table(group)
                rows, size = rows + len(group), size + group.nbytes
                group = next(groups, None)
        shards.append(_Shard(path, rows, loaded_bytes(path, columns), file_facts(path)))
    return shards


def loaded_bytes(path: Path, features: Any) -> int:
    """Bytes of a Parquet file's rows in memory, as `num_bytes` counts them.

    `load_dataset` reads batches as large as the first row group. Columns that are read may have a validity bitmap,
    which the same rows lack before they are written.
    """
    import pyarrow as pa
    import pyarrow.dataset as ds
    from datasets.table import table_cast
    from pyarrow.fs import LocalFileSystem

    fragment = ds.ParquetFileFormat().make_fragment(str(path), filesystem=LocalFileSystem())
    batches = fragment.to_batches(
        batch_size=fragment.row_groups[0].num_rows, batch_readahead=0, fragment_readahead=0, use_threads=False
    )
    tables = (pa.Table.from_batches([batch]).combine_chunks() for batch in batches)
    return sum(table_cast(table, features.arrow_schema).nbytes for table in tables)


def rows_as_dataset(s: SetRows) -> Any:
    """The rows of a set as a `datasets.Dataset` in memory."""
    import pyarrow as pa
    from datasets import Dataset

    return Dataset(pa.concat_tables(list(_row_groups([s], _kind(s)))))


def _kind(s: SetRows) -> PlainDict:
    """Properties that all parts of a set share."""
    return {
        "classes": list(s.class_names),
        "image_size": list(s.images.shape[2:]),
        "soft_labels": s.soft_labels is not None,
        "pixels": list(s.images.shape[1:]) if s.images.dtype == torch.float32 else None,
        **({"label_kind": s.label_kind} if s.soft_labels is not None else {}),
        **({"step_size": s.step_size} if s.step_size is not None else {}),
    }


def _row_groups(parts: Iterable[SetRows], kind: PlainDict) -> Iterator[Any]:
    """Yield row groups of at most GROUP_ROWS rows and GROUP_BYTES bytes."""
    rows: list[PlainDict] = []
    size = 0
    for part in parts:
        for i, png in enumerate(thread_map(_png, part.images_uint8())):
            row: PlainDict = {"image": {"bytes": png, "path": None}}
            for name, column in _COLUMNS.items():
                row[name] = getattr(part, column)[i].item()
            if part.soft_labels is not None:
                row["soft_label"] = part.soft_labels[i].numpy().copy()
            if part.images.dtype == torch.float32:
                row["pixels"] = part.images[i].numpy().copy()
            row_size = len(row["image"]["bytes"]) + sum(v.nbytes for v in row.values() if isinstance(v, np.ndarray))
            if rows and (len(rows) == GROUP_ROWS or size + row_size > GROUP_BYTES):
                yield _table(rows, kind)
                rows, size = [], 0
            rows.append(row)
            size += row_size
        del part  # which would hold it while the next is made
    yield _table(rows, kind)


_COLUMNS = {
    "label": "labels",
    "weight": "weights",
    "prototype": "prototype",
    "count": "counts",
    "source_row": "source_row",
}


def _table(rows: list[PlainDict], kind: PlainDict) -> Any:
    from datasets import Dataset

    columns: PlainDict = {name: [r[name] for r in rows] for name in rows[0]}
    for name, values in columns.items():
        if isinstance(values[0], np.ndarray):
            columns[name] = np.stack(values)
    return Dataset.from_dict(columns, features=set_features(kind)).data.table.combine_chunks()


@contextlib.contextmanager
def _parquet_writer(path: Path, features: Any, kind: PlainDict) -> Iterator[Any]:
    """Open a Parquet writer with the settings of `Dataset.to_parquet`.

    Pages are cut by content, so that the Hub stores equal parts of two versions once; there is an index of pages;
    images are neither compressed twice nor put into dictionaries.
    """
    import datasets
    import pyarrow.parquet as pq

    schema = features.arrow_schema
    others = [f"{f.name}.list.element" if f.name == "soft_label" else f.name for f in schema if f.name != "image"]
    others = [f"pixels{'.list.element' * 3}" if name == "pixels" else name for name in others]
    images = ("image.bytes", "image.path")
    cutting = datasets.config.DEFAULT_CDC_OPTIONS
    with pq.ParquetWriter(
        path,
        schema,
        use_content_defined_chunking=cutting,
        write_page_index=True,
        compression={**dict.fromkeys(images, "none"), **dict.fromkeys(others, "snappy")},
        use_dictionary=others,
        column_encoding=dict.fromkeys(images, "PLAIN"),
    ) as writer:
        yield writer
        facts = {f"dq.{k}": str(kind[k]) for k in ("label_kind", "step_size") if k in kind}
        writer.add_key_value_metadata({"content_defined_chunking": json.dumps(cutting), **facts})


def _in_range(images: Tensor) -> bool:
    return bool(images.min() >= 0 and images.max() <= 1)


def _pixels(cell: PlainDict) -> np.ndarray:
    """The image (3, H, W) of a cell of a table."""
    return np.asarray(open_image(cell["bytes"]).convert("RGB")).transpose(2, 0, 1)


def _png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
