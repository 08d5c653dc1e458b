from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import tiny_kl

from dq.codec import encode_latents, to_signed
from dq.config import CodecConfig, SourceConfig
from dq.data import load_source, read_images
from dq.dist import read_tensors
from dq.errors import InputError, RunError
from dq.latents import LatentCache, encode_class, encode_source, open_cache

CODEC = CodecConfig(path="x", resolution=8, batch_size=4)


def cache_in(folder: Path, source, codec, **codec_settings) -> LatentCache:
    return open_cache(folder, source, codec, SourceConfig(), dataclasses.replace(CODEC, **codec_settings), seed=0)


@torch.no_grad()
def test_shards_hold_the_latents_of_their_class(tmp_path: Path, toy_source) -> None:
    codec = tiny_kl()
    cache = cache_in(tmp_path, toy_source, codec)
    encode_source(toy_source, codec, cache, SourceConfig(), CODEC, labels=[0, 1, 2], seed=0)
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
        encode_class(toy_source, 0, codec, cache, SourceConfig(), config, seed=0)
        results.append(cache.load(0)[0].float())
    assert torch.allclose(*results, atol=2e-3)


def test_interrupted_equals_uninterrupted(tmp_path: Path, toy_source) -> None:
    codec = tiny_kl()
    whole, parts = (cache_in(tmp_path / n, toy_source, codec) for n in ("whole", "parts"))
    encode_source(toy_source, codec, whole, SourceConfig(), CODEC, labels=[0, 1, 2], seed=0)
    calls = 0

    def stop(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # in the middle of the second class
            raise KeyboardInterrupt

    encode_class(toy_source, 0, codec, parts, SourceConfig(), CODEC, seed=0, on_batch=stop)
    with pytest.raises(KeyboardInterrupt):
        encode_class(toy_source, 1, codec, parts, SourceConfig(), CODEC, seed=0, on_batch=stop)
    assert parts.missing() == [1, 2]
    stamp = parts.path(0).stat().st_mtime_ns
    encode_source(toy_source, codec, parts, SourceConfig(), CODEC, labels=[0, 1, 2], seed=0)
    assert parts.path(0).stat().st_mtime_ns == stamp
    for c in range(3):
        assert parts.path(c).read_bytes() == whole.path(c).read_bytes()
    assert not [f for f in parts.folder.iterdir() if f.name.endswith(".tmp")]


def test_the_key_follows_what_decides_the_latents(tmp_path: Path, toy_source, toy_images) -> None:
    codec = tiny_kl()
    base = cache_in(tmp_path, toy_source, codec).key
    assert cache_in(tmp_path, toy_source, codec, batch_size=99).key == base
    assert cache_in(tmp_path, toy_source, tiny_kl(seed=1)).folder.name != f"latents-{base}"
    assert cache_in(tmp_path, toy_source, codec, resolution=16).key != base
    assert cache_in(tmp_path, toy_source, codec, posterior="sample").key != base
    other = load_source({**toy_images, "train": (toy_images["train"][0].flip(0), toy_images["train"][1].flip(0))})
    assert cache_in(tmp_path, other, codec).key != base
    squash = SourceConfig(preprocess="squash")
    assert open_cache(tmp_path, toy_source, codec, squash, CODEC, seed=0).key != base
    assert open_cache(tmp_path, toy_source, codec, SourceConfig(), CODEC, seed=5).key == base


def test_bad_images_are_set_aside_and_listed(tmp_path: Path) -> None:
    from PIL import Image

    for c in "ab":
        for i in range(3):
            (tmp_path / "set" / c).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "set" / c / f"{i}.png")
    (tmp_path / "set" / "b" / "1.png").write_bytes(b"broken")
    source = load_source(tmp_path / "set")
    codec = tiny_kl()
    skip = SourceConfig(on_bad_image="skip")
    cache = open_cache(tmp_path / "cache", source, codec, skip, CODEC, seed=0)
    encode_source(source, codec, cache, skip, CODEC, labels=[0, 1], seed=0)
    assert cache.load(1)[1].tolist() == [3, 5]
    assert len(cache.bad_images()) == 1
    assert "1.png" in cache.bad_images()[0]
    with pytest.raises(InputError, match=r"1\.png cannot be read"):
        encode_class(source, 1, codec, cache, SourceConfig(), CODEC, seed=0)


def test_damaged_and_missing_shards_are_named(tmp_path: Path, toy_source) -> None:
    codec = tiny_kl()
    cache = cache_in(tmp_path, toy_source, codec)
    with pytest.raises(InputError, match=r"class 1 'green' has no latents in .*; run `dq encode` first"):
        cache.load(1)
    encode_source(toy_source, codec, cache, SourceConfig(), CODEC, labels=[1], seed=0)
    cache.path(1).write_bytes(cache.path(1).read_bytes()[:100])
    with pytest.raises(RunError, match=r"class-00001.safetensors cannot be read .*; delete it"):
        read_tensors(cache.path(1))
