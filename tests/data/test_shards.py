"""Sources read where they lie: the same rows as from the ordinary ones, in any order, and what damage says."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forking import Forked
from models import tiny_kl
from PIL import Image
from sets import make

from dq.config.schema import CodecConfig, SourceConfig
from dq.core.errors import InputError
from dq.data import streaming as shards
from dq.data.images import read_image, read_images
from dq.data.load import load_source
from dq.data.source import number_labels
from dq.diffusion.latents import encode_source, open_cache
from dq.distilled.set import DistilledSet

NAMES = ["zebra", "ant", "bee"]
SIZES = {"train": 50, "test": 9}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def rows(split: str) -> list[tuple[bytes, int]]:
    """PNG files with their labels, in mixed order."""
    rng = np.random.default_rng(len(split))
    results = []
    for i in range(SIZES[split]):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
        results.append((buffer.getvalue(), i if i < 3 else int(rng.integers(3))))
    return results


def parquet(folder: Path, *, files: int = 3, group: int = 7, named: bool = True) -> Path:
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    kind = ClassLabel(names=NAMES) if named else Value("int64")
    folder.mkdir(parents=True)
    for split in SIZES:
        data = rows(split)
        columns = {"image": [{"bytes": b, "path": None} for b, _ in data], "label": [c for _, c in data]}
        table = Dataset.from_dict(columns, features=Features({"image": ImageFeature(), "label": kind})).data.table
        cuts = [len(data) * i // files for i in range(files + 1)]
        for i in range(files):
            name = f"{split}-{i:05d}-of-{files:05d}.parquet"
            pq.write_table(table.slice(cuts[i], cuts[i + 1] - cuts[i]), folder / name, row_group_size=group)
    return folder


def tars(folder: Path, *, label: str = "cls", extra: dict[str, bytes] | None = None) -> Path:
    folder.mkdir(parents=True)
    for split in SIZES:
        data = rows(split)
        for i in range(2):
            with tarfile.open(folder / f"{split}-{i:04d}.tar", "w") as tar:
                for j in range(i * len(data) // 2, (i + 1) * len(data) // 2):
                    text = str(data[j][1]) if label == "cls" else json.dumps({"label": NAMES[data[j][1]], "x": 1})
                    for name, content in ((f"{j:04d}.png", data[j][0]), (f"{j:04d}.{label}", text.encode())):
                        _add(tar, name, content)
                for name, content in (extra or {}).items():
                    _add(tar, name, content)
    return folder


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def images(source: Any, split: str, order: list[int]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(read_image(source.splits[split], i, 8, "crop")) for i in order])


def streamed(folder: Path, **more: Any) -> Any:
    return load_source(SourceConfig(path=str(folder), streaming=True, **more))


@pytest.mark.parametrize("named", [True, False])
def test_parquet_files_give_the_rows_of_the_ordinary_source(tmp_path: Path, named: bool) -> None:
    folder = parquet(tmp_path / "set", named=named)
    usual, stream = load_source(folder), load_source(folder, streaming=True)
    assert stream.sequential
    assert not usual.sequential
    assert stream.class_names == usual.class_names == (tuple(NAMES) if named else ("0", "1", "2"))
    for split, n in SIZES.items():
        assert np.array_equal(stream.splits[split].labels, usual.splits[split].labels)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).tolist()
        assert torch.equal(images(stream, split, order), images(usual, split, order))
    with pytest.raises(IndexError):
        stream.train.read(SIZES["train"])


@pytest.mark.parametrize("label", ["cls", "json"])
def test_tars_give_their_rows(tmp_path: Path, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "TAR_BLOCK", 7)
    stream = streamed(tars(tmp_path / "set", label=label))
    assert stream.class_names == (("0", "1", "2") if label == "cls" else ("ant", "bee", "zebra"))
    for split, n in SIZES.items():
        data = rows(split)
        text = [str(c) if label == "cls" else NAMES[c] for _, c in data]
        assert [stream.class_names[c] for c in stream.splits[split].labels] == text
        assert [stream.splits[split].read(i) for i in reversed(range(n))] == [b for b, _ in reversed(data)]


def test_nothing_is_copied_and_a_tar_is_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed(parquet(tmp_path / "parquet"))
    assert not list((tmp_path / "datasets").rglob("*.arrow"))
    scanned: list[str] = []
    real = shards._members
    monkeypatch.setattr(
        shards, "_members", lambda f, shard, *rest: scanned.append(shard.name) or real(f, shard, *rest)
    )
    folder = tars(tmp_path / "tars")
    first, second = streamed(folder), streamed(folder)
    assert sorted(scanned) == ["test-0000.tar", "test-0001.tar", "train-0000.tar", "train-0001.tar"]
    assert first.fingerprint == second.fingerprint


def test_threads_share_blocks(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "set")
    usual, stream = load_source(folder), streamed(folder)
    order = torch.randint(0, 50, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    with ThreadPoolExecutor(8) as pool:
        result = list(pool.map(stream.train.read, order))
    assert result == [usual.train.read(i) for i in order]


def test_neighbors_come_in_one_reading_and_old_blocks_go() -> None:
    loaded: list[int] = []

    def load(block: int) -> list[bytes]:
        loaded.append(block)
        return [bytes([block])] * 10

    read = shards.Blocks(np.arange(0, 201, 10), load)
    assert [read(i) for i in range(200)] == [bytes([i // 10]) for i in range(200)]
    assert loaded == list(range(20))
    assert len(read._cached) <= 9
    read(0)
    assert loaded[-1] == 0


def test_threads_that_want_a_block_wait_for_one_reading() -> None:
    ready, calls = threading.Event(), []

    def load(block: int) -> list[bytes]:
        calls.append(block)
        ready.wait(5)
        return [b"x"] * 4

    read = shards.Blocks(np.array([0, 4]), load)
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(read, i) for i in range(4)]
        ready.set()
        assert [f.result() for f in results] == [b"x"] * 4
    assert calls == [0]


def test_a_failed_reading_is_tried_again() -> None:
    calls: list[int] = []

    def load(block: int) -> list[bytes]:
        calls.append(block)
        if len(calls) == 1:
            raise InputError("the network is gone")
        return [b"x"]

    read = shards.Blocks(np.array([0, 1]), load)
    with pytest.raises(InputError, match="the network is gone"):
        read(0)
    assert read(0) == b"x"


@pytest.mark.parametrize("make", [parquet, tars])
def test_the_fingerprint_follows_content_and_not_place(tmp_path: Path, make: Any) -> None:
    folder = make(tmp_path / "set")
    before = streamed(folder).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert streamed(tmp_path / "copy").fingerprint == before
    file = sorted((tmp_path / "copy").glob("train*"))[0]
    data = bytearray(file.read_bytes())
    data[data.index(b"IDAT") + 9] ^= 1
    file.write_bytes(data)
    assert streamed(tmp_path / "copy").fingerprint != before


def test_a_stream_is_encoded_like_any_source(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "set")
    codec = tiny_kl()
    config = CodecConfig(path="x", resolution=8, batch_size=4)
    results = []
    for name, source in (("usual", load_source(folder)), ("stream", streamed(folder))):
        cache = open_cache(tmp_path / name, source, codec, config, seed=0)
        encode_source(source, codec, cache, config, seed=0)
        cache.check()
        results.append([cache.load(c) for c in range(3)])
    for (a, rows_a), (b, rows_b) in zip(*results, strict=True):
        assert torch.equal(rows_a, rows_b)
        assert torch.allclose(a.float(), b.float(), atol=2e-3)


def test_bad_images_of_a_stream_are_set_aside(tmp_path: Path) -> None:
    stream = streamed(tars(tmp_path / "set", extra={"9999.png": b"broken", "9999.cls": b"1"}))
    assert len(stream.train) == SIZES["train"] + 2
    with pytest.raises(InputError, match=r"row 25 of split 'train' cannot be read .*on_bad_image=skip"):
        read_images(stream.train, range(30), 8, "crop")
    _, good, bad = read_images(stream.train, range(30), 8, "crop", on_bad="skip")
    assert (len(good), len(bad)) == (29, 1)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("../../evil.png", "points out of it"),
        ("/etc/evil.png", "points out of it"),
        ("link.png", "is a link or a device"),
        ("huge.png", "is absurdly large"),
    ],
)
def test_tars_with_strange_members_are_refused(tmp_path: Path, member: str, message: str) -> None:
    folder = tars(tmp_path / "set")
    info = tarfile.TarInfo(member)
    if member == "link.png":
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    if member == "huge.png":
        info.size = 10**12
    (folder / "train-0000.tar").write_bytes(info.tobuf() + bytes(10240))
    with pytest.raises(InputError, match=message):
        streamed(folder)
    assert not list(tmp_path.rglob("evil.png"))


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    import gzip

    folder = tars(tmp_path / "set")
    file = folder / "train-0000.tar"
    file.write_bytes(gzip.compress(file.read_bytes()))
    with pytest.raises(InputError, match=r"train-0000.tar is not a plain tar .* so uncompress it"):
        streamed(folder)


def test_what_cannot_be_streamed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a" / "0.png")
    with pytest.raises(InputError, match=r"Parquet .*source\.streaming"):
        streamed(tmp_path / "images")
    folder = parquet(tmp_path / "a")
    with pytest.raises(InputError, match="has no split 'dev'"):
        streamed(folder, train_split="dev")
    with pytest.raises(InputError, match="has no column 'pixels'"):
        streamed(folder, image_column="pixels")
    (folder / "train-00001-of-00003.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(InputError, match=r"train-00001-of-00003.parquet cannot be read"):
        streamed(folder)
    with pytest.raises(InputError, match=r"image 'lonely' of .*-0000.tar has no label"):
        streamed(tars(tmp_path / "b", extra={"lonely.png": b"x"}))
    stream = streamed(parquet(tmp_path / "c"))
    (tmp_path / "c" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(InputError, match=r"train-00001-of-00003.parquet cannot be read"):
        stream.train.read(20)
    monkeypatch.setattr(shards, "LARGEST_BLOCK", 100)
    with pytest.raises(InputError, match=r"row group 0 of .* write the file with smaller row groups"):
        streamed(parquet(tmp_path / "d"))
    with pytest.raises(InputError, match="whole numbers or text, and alike"):
        number_labels({"train": np.array([1.5])}, None, "x")


def test_rows_without_a_label_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = parquet(tmp_path / "set", files=1, named=False)
    file = folder / "train-00000-of-00001.parquet"
    table = pq.read_table(file)
    labels = table["label"].to_pylist()
    labels[7] = None
    pq.write_table(table.set_column(1, table.schema.field(1), pa.array(labels, pa.int64())), file)
    with pytest.raises(InputError, match=r"column 'label' of split 'train' of .* has rows without a label"):
        streamed(folder)


def test_a_tar_that_was_replaced_is_scanned_again(tmp_path: Path) -> None:
    import os

    folder = tars(tmp_path / "set")
    file = folder / "train-0000.tar"
    first = streamed(folder)
    data, then = file.read_bytes(), file.stat()
    # members of equal size in another order: only the time tells
    half = [data[i : i + 512] for i in range(0, len(data), 512)]
    with tarfile.open(file) as tar:
        names = tar.getnames()
    assert names[1].endswith(".cls")
    at = next(i for i, block in enumerate(half) if block.startswith(names[1].encode())) + 1
    other = bytes([half[at][0] ^ 1]) + half[at][1:]
    file.write_bytes(b"".join([*half[:at], other, *half[at + 1 :]]))
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns + 10**9))
    second = streamed(folder)
    assert second.fingerprint != first.fingerprint
    assert second.train.labels.tolist() != first.train.labels.tolist()


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [[0], [1]]}, "column 'label' of .* holds no labels but List"),
        ({"label": [{"a": 1}, {"a": 2}]}, "column 'label' of .* holds no labels but dict"),
        ({"image": [3, 4]}, "holds no image|holds no encoded image"),
        ({"image": [{"bytes": None, "path": None}] * 2}, "the cell is empty|holds no encoded image"),
    ],
)
def test_columns_of_other_types_are_refused(tmp_path: Path, columns: dict, message: str, streaming: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": b, "path": "x.png"} for b, _ in rows("test")[:2]]
    columns = {"image": cells, "label": [0, 1]} | columns
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=message):
        read_image(load_source(tmp_path, streaming=streaming).train, 0, 8, "crop")


def test_a_column_that_is_there_twice_is_one_sentence(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pa.array([{"bytes": b, "path": "x.png"} for b, _ in rows("test")[:2]])
    table = pa.table([images, pa.array([0, 1]), images], names=["image", "label", "image"])
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"train\.parquet cannot be read .*2 times"):
        read_image(load_source(tmp_path, streaming=True).train, 0, 8, "crop")


def test_keys_and_labels_of_tars_are_clear(tmp_path: Path) -> None:
    png = rows("train")[0][0]
    for name, members, message in (
        ("a", ["0.png", "0.cls=0", "0.png", "0.cls=1"], "has two images '0.png' of one key"),
        ("b", ["0.png", "0.jpg", "0.cls=0"], "has two images '0.jpg' of one key"),
        ("c", ["0.png", "0.cls=0", "1.png", "1.cls=cat"], "numbers in some rows and text in others"),
        ("d", ["0.png", "1.png", "0.cls=0", "1.cls=1"], "image '0' of .* needs a .cls right beside it"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        with tarfile.open(folder / "train-0000.tar", "w") as tar:
            for member in members:
                file, _, label = member.partition("=")
                _add(tar, file, label.encode() if label else png)
        with pytest.raises(InputError, match=message):
            streamed(folder)
    (tmp_path / "e").mkdir()
    with tarfile.open(tmp_path / "e" / "train-0000.tar", "w") as tar:
        for file, content in (("0.PNG", png), ("0.CLS", b"0")):
            _add(tar, file, content)
    assert len(streamed(tmp_path / "e").train) == 1
    (tmp_path / "f").mkdir()
    with tarfile.open(tmp_path / "f" / "train-0000.tar", "w") as tar:
        for file, content in (("0.png", png), ("0.cls", b"7"), ("1.png", png), ("1.cls", str(2**40).encode())):
            _add(tar, file, content)
    assert streamed(tmp_path / "f").class_names == ("7", str(2**40))


def test_blocks_of_tars_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = np.array([[0, 10], [600, 10], [1200, 10], [5000, 900], [6000, 10]])
    assert list(shards._tar_blocks(places)) == [(0, 5)]
    monkeypatch.setattr(shards, "LARGEST_IMAGE", 1000)
    assert list(shards._tar_blocks(places)) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    monkeypatch.setattr(shards, "TAR_BLOCK", 1)
    assert len(list(shards._tar_blocks(places))) == 5


def test_large_labels_are_taken(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": b, "path": None} for b, _ in rows("test")[:2]]
    pq.write_table(pa.table({"image": cells, "label": [2**40, 7]}), tmp_path / "train.parquet")
    assert streamed(tmp_path).class_names == ("7", str(2**40))


@pytest.mark.parametrize("name", [b"1.5", b'{"a": 1}'])
@pytest.mark.parametrize("streaming", [True, False])
def test_class_names_that_are_no_text_are_refused(tmp_path: Path, streaming: bool, name: bytes) -> None:
    import pyarrow.parquet as pq

    folder = parquet(tmp_path / "set", files=1)
    for file in folder.glob("*.parquet"):
        table = pq.read_table(file)
        metadata = table.schema.metadata[b"huggingface"].replace(b'"ant"', name)
        pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), file)
    with pytest.raises(InputError, match=r"class names of .* are not all text"):
        load_source(folder, streaming=streaming)


@pytest.mark.multi_process
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted by Linux")
def test_reading_starts_no_threads_of_arrow(tmp_path: Path) -> None:
    """They may still hold the file when Python ends, which aborts the process."""
    make(soft=True).save(tmp_path, "x")

    def threads() -> int:
        return len(os.listdir("/proc/self/task")) - threading.active_count()

    def read() -> None:
        before = threads()
        source = load_source(tmp_path / "x", streaming=True)
        read_images(source.train, range(6), 5, "crop", threads=1)
        DistilledSet.load(tmp_path)
        end = time.monotonic() + 5
        while threads() > before and time.monotonic() < end:  # joined threads leave the list of tasks a little later
            time.sleep(0.01)
        print(threads() - before)

    forked = Forked(read)  # has none of the threads of the tests before it
    assert (forked.communicate(timeout=60)[0], forked.returncode) == ("0\n", 0)
