from __future__ import annotations

import dataclasses
import functools
import threading
from pathlib import Path

import pytest
import torch
from models import tiny_kl

import dq.data.image_cache
from dq.config.schema import CodecConfig
from dq.core.errors import InputError, RunError
from dq.core.files import open_tensors
from dq.core.processes import assign_units
from dq.data.image_cache import Reading, fill
from dq.data.images import read_images
from dq.data.load import load_source
from dq.diffusion.codec import encode_latents, to_signed
from dq.diffusion.latents import LatentCache, encode_source, open_cache

CODEC = CodecConfig(path="x", resolution=8, batch_size=4)


def cache_in(folder: Path, source, codec, **codec_settings) -> LatentCache:
    return open_cache(folder, source, codec, dataclasses.replace(CODEC, **codec_settings), seed=0)


@torch.no_grad()
def test_shards_hold_the_latents_of_their_class(tmp_path: Path, toy_source) -> None:
    codec = tiny_kl()
    cache = cache_in(tmp_path, toy_source, codec)
    encode_source(toy_source, codec, cache, CODEC, seed=0)
    for c, n in enumerate((9, 8, 7)):
        z, rows = cache.load(c)
        assert z.shape == (n, 4, 4, 4)
        assert z.dtype == torch.float16
        assert (toy_source.train.labels[rows.numpy()] == c).all()
        images, _, _ = read_images(toy_source.train, rows.tolist(), 8, "crop")
        assert torch.allclose(z.float(), encode_latents(codec, to_signed(images)), atol=2e-3)
    assert cache.missing() == []


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_batch_size_does_not_matter(tmp_path: Path, toy_source, posterior: str) -> None:
    codec = tiny_kl()
    results = []
    for size in (2, 9):
        cache = cache_in(tmp_path / str(size), toy_source, codec, posterior=posterior)
        config = dataclasses.replace(CODEC, batch_size=size, posterior=posterior)
        encode_source(toy_source, codec, cache, config, seed=0)
        results.append(cache.load(0)[0].float())
    assert torch.allclose(*results, atol=2e-3)


def test_interrupted_equals_uninterrupted(tmp_path: Path, toy_source) -> None:
    codec = tiny_kl()
    whole, parts = (cache_in(tmp_path / n, toy_source, codec) for n in ("whole", "parts"))
    encode_source(toy_source, codec, whole, CODEC, seed=0)
    assert len(whole.parts) == 3
    read, calls = toy_source.train.read, []

    def stop(row: int):
        calls.append(row)
        if len(calls) == 14:  # in the middle of the second file
            raise KeyboardInterrupt
        return read(row)

    broken = dataclasses.replace(
        toy_source, splits={**toy_source.splits, "train": dataclasses.replace(toy_source.train, read=stop)}
    )
    with pytest.raises(KeyboardInterrupt):
        encode_source(broken, codec, parts, CODEC, seed=0)
    assert parts.missing() == [1, 2]
    stamp = parts.path(0).stat().st_mtime_ns
    encode_source(toy_source, codec, parts, CODEC, seed=0)
    assert parts.path(0).stat().st_mtime_ns == stamp
    for c in range(3):
        assert parts.path(c).read_bytes() == whole.path(c).read_bytes()
    assert not [f for f in parts.folder.iterdir() if f.name.endswith(".tmp")]


def test_an_error_of_writing_stops_the_stage_and_loses_no_file(
    tmp_path: Path, toy_source, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = tiny_kl()
    whole, parts = (cache_in(tmp_path / n, toy_source, codec) for n in ("whole", "parts"))
    encode_source(toy_source, codec, whole, CODEC, seed=0)
    write = dq.data.image_cache.write_tensors

    def full(path: Path, *args, **options) -> None:
        if path.name == "part-000001.safetensors":
            raise RunError(f"the disk is full while writing {path}")
        write(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("dq.data.image_cache.write_tensors", full)
        with pytest.raises(RunError, match=r"disk is full.*part-000001"):
            encode_source(toy_source, codec, parts, CODEC, seed=0)
    assert 1 in parts.missing()
    assert 0 not in parts.missing()
    encode_source(toy_source, codec, parts, CODEC, seed=0)
    assert [parts.path(c).read_bytes() for c in range(3)] == [whole.path(c).read_bytes() for c in range(3)]


def test_a_file_is_written_while_the_next_is_computed(
    tmp_path: Path, toy_source, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_in(tmp_path, toy_source, tiny_kl())
    first_batch_of_second = threading.Event()
    write = dq.data.image_cache.write_tensors

    def slow(path: Path, *args, **options) -> None:
        if path.name == "part-000000.safetensors":
            assert first_batch_of_second.wait(10), "computation waits for the disk"
        write(path, *args, **options)

    monkeypatch.setattr("dq.data.image_cache.write_tensors", slow)

    def compute(images: torch.Tensor, rows: list[int]) -> torch.Tensor:
        if rows[0] >= 8:
            first_batch_of_second.set()
        return images[:, 0, 0, :1].float()

    fill(cache, toy_source, compute, Reading(8, 4))
    assert cache.missing() == []


def test_classes_in_many_files_are_read_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes of a stream lie in all files: each is opened once for all of them, or as memory allows."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (96, 3, 8, 8), dtype=torch.uint8, generator=g)
    source = dataclasses.replace(load_source((images, torch.randint(0, 3, (96,), generator=g))), sequential=True)
    cache = cache_in(tmp_path, source, tiny_kl())
    encode_source(source, tiny_kl(), cache, CODEC, seed=0)
    assert len(cache.parts) == 12
    alone = [cache.load(c) for c in range(3)]
    opened: list[str] = []

    def opening(path: Path):
        opened.append(path.name)
        return open_tensors(path)

    planned = dataclasses.replace(cache, order=(2, 0, 1, 2, 0))
    assert planned == cache
    planned.check()
    monkeypatch.setattr("dq.data.image_cache.open_tensors", opening)
    for c in planned.order:
        assert all(torch.equal(a, b) for a, b in zip(planned.load(c), alone[c], strict=True))
    assert len(opened) <= 2 * 13 + 13  # two passes and a look at the size of a row in each; alone it is five
    opened.clear()
    monkeypatch.setattr("dq.data.image_cache.BUFFER_BYTES", 1)
    little = dataclasses.replace(cache, order=(2, 0, 1))
    for c in little.order:
        assert torch.equal(little.load(c)[0], alone[c][0])
    assert len(opened) > 3 * 10


def test_bytes_become_the_same_floats() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_signed(levels), levels.float() / 127.5 - 1.0)


def test_rows_in_the_order_of_a_stream_give_the_same_classes(tmp_path: Path, toy_images) -> None:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    images, labels = (t[order] for t in toy_images["train"])
    source = load_source((images, labels))
    stream = dataclasses.replace(source, sequential=True)
    codec = tiny_kl()
    one = cache_in(tmp_path / "one", source, codec)
    two = cache_in(tmp_path / "two", stream, codec)
    encode_source(source, codec, one, CODEC, seed=0)
    encode_source(stream, codec, two, CODEC, seed=0)
    # neighbors in the stream are neighbors in the files, class by class within each
    with open_tensors(two.path(0)) as f:
        assert sorted(f.get_tensor("rows").tolist()) == list(range(8))
        assert f.get_tensor("labels").tolist() == sorted(labels[:8].tolist())
    for c in range(3):
        (a, rows_a), (b, rows_b) = one.load(c), two.load(c)
        assert torch.equal(rows_a, rows_b)
        assert rows_a.tolist() == (labels == c).nonzero().flatten().tolist()
        assert torch.allclose(a.float(), b.float(), atol=2e-3)


def test_files_are_divided_over_processes(tmp_path: Path, toy_source) -> None:
    codec = tiny_kl()
    alone, shared = (cache_in(tmp_path / n, toy_source, codec) for n in ("alone", "shared"))
    encode_source(toy_source, codec, alone, CODEC, seed=0)
    for rank in (1, 0):
        local_units = functools.partial(assign_units, rank=rank, world_size=2)
        encode_source(toy_source, codec, shared, CODEC, seed=0, local_units=local_units)
        assert shared.missing() == ([0, 2] if rank == 1 else [])
    for c in range(3):
        assert shared.path(c).read_bytes() == alone.path(c).read_bytes()


def test_a_damaged_file_of_another_process_is_its_own_affair(tmp_path: Path, toy_source) -> None:
    codec = tiny_kl()
    cache = cache_in(tmp_path, toy_source, codec)
    encode_source(toy_source, codec, cache, CODEC, seed=0)
    whole = cache.path(1).read_bytes()
    cache.path(1).write_bytes(whole[:-9])
    encode_source(
        toy_source, codec, cache, CODEC, seed=0, local_units=functools.partial(assign_units, rank=0, world_size=2)
    )
    assert cache.path(1).read_bytes() == whole[:-9]
    encode_source(
        toy_source, codec, cache, CODEC, seed=0, local_units=functools.partial(assign_units, rank=1, world_size=2)
    )
    assert cache.path(1).read_bytes() == whole


def test_the_key_follows_what_decides_the_latents(tmp_path: Path, toy_source, toy_images) -> None:
    codec = tiny_kl()
    base = cache_in(tmp_path, toy_source, codec).key
    assert cache_in(tmp_path, toy_source, codec, batch_size=99).key == base
    assert cache_in(tmp_path, toy_source, tiny_kl(seed=1)).folder.name != f"latents-{base}"
    assert cache_in(tmp_path, toy_source, codec, resolution=16).key != base
    assert cache_in(tmp_path, toy_source, codec, posterior="sample").key != base
    other = load_source({**toy_images, "train": (toy_images["train"][0].flip(0), toy_images["train"][1].flip(0))})
    assert cache_in(tmp_path, other, codec).key != base
    squash = load_source(toy_source, preprocess="squash")
    assert open_cache(tmp_path, squash, codec, CODEC, seed=0).key != base
    assert open_cache(tmp_path, toy_source, codec, CODEC, seed=5).key == base


def test_bad_images_are_set_aside_and_listed(tmp_path: Path) -> None:
    from PIL import Image

    for c in "ab":
        for i in range(3):
            (tmp_path / "set" / c).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "set" / c / f"{i}.png")
    (tmp_path / "set" / "b" / "1.png").write_bytes(b"broken")
    source = load_source(tmp_path / "set")
    codec = tiny_kl()
    skip = load_source(source, on_bad_image="skip")
    cache = open_cache(tmp_path / "cache", skip, codec, CODEC, seed=0)
    encode_source(skip, codec, cache, CODEC, seed=0)
    assert cache.load(1)[1].tolist() == [3, 5]
    assert len(cache.bad_images()) == 1
    assert "1.png" in cache.bad_images()[0]
    strict = open_cache(tmp_path / "cache", source, codec, CODEC, seed=0)
    with pytest.raises(InputError, match=r"1\.png cannot be read"):
        encode_source(source, codec, strict, CODEC, seed=0)


def test_a_class_without_a_readable_image_is_named(tmp_path: Path) -> None:
    from PIL import Image

    for c in "ab":
        (tmp_path / "set" / c).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "set" / "a" / "0.png")
    (tmp_path / "set" / "b" / "0.png").write_bytes(b"broken")
    source = load_source(tmp_path / "set")
    skip = load_source(source, on_bad_image="skip")
    cache = open_cache(tmp_path / "cache", skip, tiny_kl(), CODEC, seed=0)
    encode_source(skip, tiny_kl(), cache, CODEC, seed=0)
    with pytest.raises(InputError, match="no image of class 1 'b'"):
        cache.check()


def test_missing_files_are_named_and_damaged_ones_made_anew(
    tmp_path: Path, toy_source, caplog: pytest.LogCaptureFixture
) -> None:
    codec = tiny_kl()
    cache = cache_in(tmp_path, toy_source, codec)
    with pytest.raises(InputError, match=r"lacks 3 of 3 .*part-000000\.safetensors.*`dq encode`"):
        cache.load(1)
    encode_source(toy_source, codec, cache, CODEC, seed=0)
    whole = [cache.path(i).read_bytes() for i in range(3)]
    cache.path(0).write_bytes(whole[0][:100])
    flipped = bytearray(whole[2])
    flipped[-3] ^= 4  # in the last tensor, where nothing but a checksum would show it
    cache.path(2).write_bytes(flipped)
    stamp = cache.path(1).stat().st_mtime_ns
    with pytest.raises(RunError, match=r"part-00000[02].safetensors cannot be read"):
        cache_in(tmp_path, toy_source, codec).load(0)
    with pytest.raises(RunError, match=r"part-00000[02].safetensors cannot be read"):
        cache_in(tmp_path, toy_source, codec).load(2)
    encode_source(toy_source, codec, cache, CODEC, seed=0)
    assert [cache.path(i).read_bytes() for i in range(3)] == whole
    assert cache.path(1).stat().st_mtime_ns == stamp
    assert [r.message for r in caplog.records if "part-000002" in r.message and "is made again" in r.message]


def test_latents_that_do_not_fit_are_named(tmp_path: Path, toy_source) -> None:
    codec = tiny_kl(scaling_factor=1e9)
    cache = cache_in(tmp_path, toy_source, codec)
    with pytest.raises(InputError, match=r"row 0 of split 'train' .*float16"):
        encode_source(toy_source, codec, cache, CODEC, seed=0)
    assert cache.missing() == [0, 1, 2]
