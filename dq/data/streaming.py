"""Sources read by streaming: Parquet files and WebDataset tars, local or on the Hub.

No file is copied, extracted or downloaded as a whole, so that a source may be larger than the disk. In memory are a
label per row, the offsets of the rows, and the few blocks of neighboring rows that were read last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import posixpath
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dq.config.schema import SourceConfig
from dq.core.errors import InputError
from dq.core.files import is_done, read_tensors, write_tensors
from dq.core.progress import progress
from dq.core.seeds import digest_of
from dq.core.text import first_line
from dq.data.hf_datasets import (
    UNOPENED,
    choose_column,
    declared_names,
    labeled_split,
    open_builder,
    opening,
    tables_outside,
)
from dq.data.image_folder import walk_files
from dq.data.images import IMAGE_SUFFIXES
from dq.data.left_out import LeftOut
from dq.data.source import ImageSource, Split, checked_source, choose_train, match_split, number_labels

TAR_BLOCK = 64  # neighboring rows of a tar that are read at once
LARGEST_BLOCK = 2 << 30  # bytes; larger row groups are refused
LARGEST_IMAGE = 256 << 20  # bytes of an encoded image in a tar
CACHED_BYTES = 512 << 20  # of blocks that stay in memory
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # samples of a local file, and bytes of each, in the fingerprint


@dataclass(frozen=True)
class Shard:
    """One file."""

    url: str  # local path, or hf://datasets/ID@COMMIT/FILE
    size: int
    fs: Any = dataclasses.field(repr=False)  # of fsspec

    @property
    def name(self) -> str:
        return posixpath.basename(self.url)

    @property
    def local(self) -> bool:
        return "://" not in self.url


def open_shards(config: SourceConfig) -> ImageSource:
    """Open the source of `source.streaming: true`.

    Its fingerprint is that of names, sizes and labels, with the commit for files on the Hub and the bytes at sixteen
    offsets for local ones: a copy of a folder has it too, and no image has to be read for it.

    Raises:
        InputError: if it does not exist or not of Parquet files or tars, or lacks a split or a column; if a tar is
            compressed or has members with paths out of it.
    """
    kind, files, features = _find(config)
    readers = {"parquet": _open_parquet, "webdataset": _open_tars}
    train = choose_train(list(files), config)
    open_split = functools.cache(lambda s: readers[kind](files[s], s, config, features))
    test = labeled_split(list(files), train, config, lambda s: open_split(s).labels)
    opened = {s: open_split(s) for s in (train, test) if s}
    names, numbers = number_labels({s: o.labels for s, o in opened.items()}, _names(opened), config.path)
    splits = {s: Split(numbers[s], Blocks(o.starts, o.load), s) for s, o in opened.items()}
    h = hashlib.blake2b(digest_size=8)
    for s in splits:
        for shard in files[s]:
            _identify(h, shard, config)
        h.update(splits[s].labels.tobytes())
    source = checked_source(splits, names, h, config.path, train, test)
    return dataclasses.replace(source, sequential=True)


@dataclass(frozen=True)
class Opened:
    """A split before its classes have numbers."""

    labels: np.ndarray  # (n,) whole numbers, or text
    names: tuple[str, ...] | None  # of the classes, where the files have them
    starts: np.ndarray  # (blocks + 1,) first row of every block
    load: Callable[[int], Sequence[Any]]  # block -> encoded images


def _names(opened: dict[str, Opened]) -> tuple[str, ...] | None:
    first, *others = (o.names for o in opened.values())  # of a file, which may name its classes by anything
    if any(names != first for names in others):
        raise InputError(f"splits {' and '.join(map(repr, opened))} name their classes differently")
    return first


def _find(config: SourceConfig) -> tuple[str, dict[str, list[Shard]], Any]:
    """Kind of the files, the files of every split, and the features that a card declares."""
    from fsspec.core import url_to_fs

    local = Path(config.path).is_dir()
    with opening(config.path):
        left_out = LeftOut()
        paths = list(walk_files(Path(os.path.abspath(config.path)), left_out)) if local else []
        builder = open_builder(config, paths)
        left_out.merge(tables_outside(builder, paths))
        left_out.warn(config.path)
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in ("parquet", "webdataset") or not builder.config.data_files:
        raise InputError(
            f"{config.path} has no Parquet files or WebDataset tars, which source.streaming reads; leave streaming off"
        )
    files = {}
    for split, urls in builder.config.data_files.items():
        shards = []
        for url in map(str, urls):
            fs, path = url_to_fs(url)
            shards.append(Shard(path if local else url, int(fs.info(path)["size"]), fs))
        files[str(split)] = shards
    return kind, files, builder.info.features


def _identify(h: Any, shard: Shard, config: SourceConfig) -> None:
    name = shard.url if not shard.local else Path(shard.url).resolve().relative_to(Path(config.path).resolve())
    h.update(f"{name}|{shard.size}|".encode())
    if shard.local:
        with open(shard.url, "rb") as f:
            for i in range(SAMPLES):
                f.seek(max(0, shard.size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                h.update(f.read(SAMPLE_BYTES))


# --- blocks of rows -----------------------------------------------------------------------------------------------


class Blocks:
    """Rows by number, read in blocks of neighbors.

    The last blocks stay in memory; of threads that need the same block, one reads it and the others wait.
    """

    def __init__(self, starts: np.ndarray, load: Callable[[int], Sequence[Any]]) -> None:
        self._starts, self._load = starts, load
        self._lock = threading.Lock()
        self._cached: OrderedDict[int, Future] = OrderedDict()

    def __call__(self, row: int) -> Any:
        if not 0 <= row < self._starts[-1]:
            raise IndexError(f"row {row} of {self._starts[-1]}")
        block = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._block(block)[row - int(self._starts[block])]

    def _block(self, block: int) -> Sequence[Any]:
        with self._lock:
            future = self._cached.get(block)
            is_reader = future is None
            if future is None:
                future = self._cached[block] = Future()
            self._cached.move_to_end(block)
        if is_reader:
            try:
                future.set_result(self._load(block))
            except BaseException as e:
                with self._lock:
                    self._cached.pop(block, None)
                future.set_exception(e)
            self._forget()
        return future.result()

    def _forget(self) -> None:
        """Drop the least recently used blocks except two, as a batch may span two blocks."""
        with self._lock:
            done = [b for b, f in self._cached.items() if f.done() and not f.exception()]
            total = sum(_nbytes(self._cached[b].result()) for b in done)
            for b in done[:-2]:
                if total > CACHED_BYTES or len(self._cached) > 8:
                    total -= _nbytes(self._cached.pop(b).result())


def _nbytes(block: Sequence[Any]) -> int:
    return int(block.nbytes) if hasattr(block, "nbytes") else sum(map(len, block))


# --- Parquet ------------------------------------------------------------------------------------------------------


def _open_parquet(shards: list[Shard], split: str, config: SourceConfig, declared: object) -> Opened:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels: list[np.ndarray] = []
    sizes: list[int] = []
    groups: list[tuple[int, int]] = []  # file, row group
    features: Any = None
    column = ""
    for number, shard in enumerate(progress(shards, desc="open", unit="file", main=len(shards) > 20)):
        with _naming(shard), _open(shard) as f:
            file = pq.ParquetFile(f, pre_buffer=False)
            if features is None:
                features = declared or datasets.Features.from_arrow_schema(file.schema_arrow)
                image = choose_column("image", config.image_column, features, config.path)
                try:
                    column = choose_column("label", config.label_column, features, config.path)
                except InputError:
                    if match_split(config.train_split, [split]):
                        raise
                    return Opened(np.zeros(0, np.int64), None, np.zeros(1, np.int64), lambda block: [])
            elif names_of := declared_names(file.schema_arrow, column):
                first = features[column]
                if isinstance(first, datasets.ClassLabel) and names_of != first.names:
                    raise InputError(
                        f"files of {config.path} name their classes differently ({shard.url}); give them one order"
                    )
            for group in range(file.metadata.num_row_groups):
                facts = file.metadata.row_group(group)
                if facts.total_byte_size > LARGEST_BLOCK:
                    raise InputError(
                        f"row group {group} of {shard.url} has {facts.total_byte_size >> 20} MiB, more than can be "
                        f"read at once ({LARGEST_BLOCK >> 20} MiB); write the file with smaller row groups"
                    )
                values = _read_group(file, group, column)
                if values.null_count == len(values):
                    values = pa.array(np.full(len(values), -1))  # a split without labels, or it is refused later
                elif values.null_count:
                    raise InputError(f"column {column!r} of split {split!r} of {config.path} has rows without a label")
                is_whole = pa.types.is_integer(values.type)
                labels.append(values.cast(pa.int64()).to_numpy() if is_whole else np.asarray(values.to_pylist()))
                sizes.append(facts.num_rows)
                groups.append((number, group))

    def load(block: int) -> Any:
        number, group = groups[block]
        with _naming(shards[number]), _open(shards[number]) as f:
            return _Cells(_read_group(pq.ParquetFile(f, pre_buffer=False), group, image))

    feature = features[column] if features else None
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    starts = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))])
    return Opened(np.concatenate(labels) if labels else np.zeros(0, np.int64), names, starts, load)


def _read_group(file: Any, group: int, column: str) -> Any:
    """A column of a row group, read in this thread and without buffering ahead.

    A thread of Arrow that still holds the file when Python ends aborts the process ("terminate called without an
    active exception").
    """
    return file.read_row_group(group, columns=[column], use_threads=False)[column].combine_chunks()


class _Cells:
    """Image cells of a row group, converted to bytes on access."""

    def __init__(self, column: Any) -> None:
        self._column = column
        self.nbytes = column.nbytes

    def __getitem__(self, i: int) -> bytes:
        cell = self._column[i].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            raise ValueError("the cell holds no encoded image")
        return data


# --- WebDataset ---------------------------------------------------------------------------------------------------


def _open_tars(shards: list[Shard], split: str, config: SourceConfig, declared: object) -> Opened:
    """Open tars of `KEY.jpg` beside `KEY.cls`, or `KEY.json` with a `label`.

    The offsets of the images of a tar are cached in the cache folder of `datasets`.
    """
    import datasets

    index = []
    for shard in progress(shards, desc="index", unit="file", main=len(shards) > 1):
        stamp = Path(shard.url).stat().st_mtime_ns if shard.local else None
        key = digest_of([shard.url if not shard.local else str(Path(shard.url).resolve()), shard.size, stamp])
        path = Path(datasets.config.HF_DATASETS_CACHE) / f"dq-index-{key}.safetensors"
        if not is_done(path):
            with _naming(shard), _open(shard) as f:
                left_out = LeftOut()
                rows = list(_members(f, shard, left_out))
                if left_out and not rows:
                    raise InputError(
                        f"{shard.url} has no row that is read: {left_out}; name its members KEY.jpg, KEY.cls"
                    )
                left_out.warn(shard.url)
            if len({type(r[2]) for r in rows}) > 1:
                raise InputError(f"labels of {shard.url} are numbers in some rows and text in others; make them alike")
            places = torch.tensor([r[:2] for r in rows], dtype=torch.int64).reshape(-1, 2)
            write_tensors(path, {"places": places}, {"labels": [r[2] for r in rows]})
        tensors, meta = read_tensors(path)
        index.append((tensors["places"].numpy(), np.asarray(meta["labels"])))
    blocks = [(number, *block) for number, (places, _) in enumerate(index) for block in _tar_blocks(places)]

    def load(block: int) -> list[bytes]:
        number, first, last = blocks[block]
        shard, places = shards[number], index[number][0][first:last]
        begin, end = int(places[0, 0]), int(places[-1].sum())
        with _naming(shard):
            data = shard.fs.cat_file(_path(shard), start=begin, end=end)
        return [data[at - begin : at - begin + size] for at, size in places.tolist()]

    sizes = np.asarray([last - first for _, first, last in blocks], np.int64)
    kinds = {labels.dtype.kind for _, labels in index if len(labels)}
    if len(kinds) > 1:
        raise InputError(f"labels of {config.path} are numbers in some rows and text in others; make them alike")
    labels = np.concatenate([labels for _, labels in index if len(labels)] or [np.zeros(0, np.int64)])
    return Opened(labels, None, np.concatenate([[0], np.cumsum(sizes)]), load)


def _tar_blocks(places: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last + 1 of neighboring rows that are read at once."""
    first = 0
    for last in range(1, len(places) + 1):
        full = last - first == TAR_BLOCK or last == len(places)
        if full or int(places[last].sum()) - int(places[first, 0]) > LARGEST_IMAGE:
            yield first, last
            first = last


def _members(f: Any, shard: Shard, left_out: LeftOut) -> Iterator[tuple[int, int, int | str]]:
    """Yield offset, size and label of every image of a tar, in its order.

    Members of one key are neighbors. Labels without an image that is read are counted.
    """
    try:
        tar = tarfile.open(fileobj=f, mode="r:")  # noqa: SIM115  (it holds nothing but f)
    except tarfile.ReadError as e:
        raise InputError(
            f"{shard.url} is not a plain tar ({e}); a compressed one cannot be read at a place, so uncompress it"
        ) from e
    key, image, label = None, None, None
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # else it stores all of them
        name = member.name
        if name.startswith("/") or ".." in name.split("/"):
            raise InputError(f"{shard.url} has a member {name!r} that points out of it; get the file from elsewhere")
        if member.isdir():
            continue
        if not member.isfile() or not 0 <= member.size <= LARGEST_IMAGE:
            what = "is absurdly large" if member.isfile() else "is a link or a device"
            raise InputError(f"member {name!r} of {shard.url} {what}; get the file from elsewhere")
        folder, _, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if (folder, stem) != key:
            if image is not None:
                yield (*image, _need_label(label, key, shard))
            elif key and label is not None:
                left_out.add("label", "without an image of a suffix that is read", f"{key[1]} in {shard.name}")
            key, image, label = (folder, stem), None, None
        suffix = suffix.lower()
        if f".{suffix}" in IMAGE_SUFFIXES:
            if image is not None:
                raise InputError(f"{shard.url} has two images {name!r} of one key; give every row a key of its own")
            image = (member.offset_data, member.size)
        elif f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES:
            left_out.add("image", "with several dots in the name", f"{name} in {shard.name}")
        elif suffix in ("cls", "json"):
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
            label = _label(data, suffix, name, shard) if label is None or suffix == "cls" else label
    if image is not None:
        yield (*image, _need_label(label, key, shard))
    elif key and label is not None:
        left_out.add("label", "without an image of a suffix that is read", f"{key[1]} in {shard.name}")


def _label(data: bytes, suffix: str, name: str, shard: Shard) -> int | str | None:
    try:
        if suffix == "cls":
            text = data.decode().strip()
            return int(text) if text.lstrip("-").isdigit() else text
        record = json.loads(data)
        value = record.get("label", record.get("cls")) if isinstance(record, dict) else None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return value if isinstance(value, int | str) and not isinstance(value, bool) else None
    except ValueError as e:
        raise InputError(f"the label {name!r} of {shard.url} cannot be read ({e}); leave the row out") from e


def _need_label(label: int | str | None, key: Any, shard: Shard) -> int | str:
    if label is None:
        raise InputError(
            f"image {key[1]!r} of {shard.url} has no label: it needs a .cls right beside it, or a .json with a 'label'"
        )
    return label


# --- files --------------------------------------------------------------------------------------------------------


def _path(shard: Shard) -> str:
    return shard.url.removeprefix("hf://")


def _open(shard: Shard) -> Any:
    return shard.fs.open(_path(shard), "rb")


@contextlib.contextmanager
def _naming(shard: Shard) -> Iterator[None]:
    """Raise errors of libraries at a damaged or lost file as `InputError` that names it."""
    import pyarrow as pa

    try:
        yield
    except InputError:
        raise
    except (*UNOPENED, OverflowError, tarfile.TarError, pa.ArrowException) as e:
        raise InputError(f"{shard.url} cannot be read ({first_line(e)}); get the file again") from e
