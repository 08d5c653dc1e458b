"""The latent cache: one safetensors shard per class, keyed by data x codec x resolution x preprocessing.

A cache serves every number of prototypes and every later run. A shard is there under its final name or not at all.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq.codec import Codec, codec_digest, encode_latents, latent_shape, to_signed
from dq.config import CodecConfig, SourceConfig
from dq.data import ImageSource, read_images
from dq.dist import digest_of, generator, progress, read_json, read_metadata, read_tensors, write_json, write_tensors
from dq.errors import InputError


@dataclass(frozen=True)
class LatentCache:
    """A folder of latent shards. `shape` is (C, h, w)."""

    folder: Path
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    key: str

    def path(self, label: int) -> Path:
        return self.folder / f"class-{label:05d}.safetensors"

    def missing(self) -> list[int]:
        return [c for c in range(len(self.class_names)) if not self.path(c).is_file()]

    def load(self, label: int) -> tuple[Tensor, Tensor]:
        """Latents (n, C, h, w) float16 and source rows (n,) int64 of one class."""
        tensors, _ = read_tensors(self._existing(label))
        return tensors["latents"], tensors["rows"]

    def bad_images(self) -> list[str]:
        """Sentences on images set aside while encoding, over all classes."""
        present = (c for c in range(len(self.class_names)) if self.path(c).is_file())
        return [s for c in present for s in read_metadata(self.path(c)).get("bad_images", [])]

    def _existing(self, label: int) -> Path:
        path = self.path(label)
        if not path.is_file():
            raise InputError(
                f"class {label} {self.class_names[label]!r} has no latents in {self.folder}; run `dq encode` first"
            )
        return path


def open_cache(
    cache_dir: str | Path,
    source: ImageSource,
    codec: Codec,
    source_config: SourceConfig,
    config: CodecConfig,
    seed: int,
) -> LatentCache:
    """The cache folder of this combination of data, codec and settings, with its manifest written."""
    # The seed matters only where latents are drawn; batch size and process count never do.
    identity = {
        "data": source.fingerprint,
        "codec": codec_digest(codec),
        "resolution": config.resolution,
        "preprocess": source_config.preprocess,
        "on_bad_image": source_config.on_bad_image,
        "posterior": config.posterior,
        "dtype": config.dtype,
        "seed": seed if config.posterior == "sample" else None,
    }
    key = digest_of(identity)
    folder = Path(cache_dir) / f"latents-{key}"
    cache = LatentCache(folder, latent_shape(codec, config.resolution), source.class_names, key)
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        write_json(manifest, {**identity, "origin": source.origin, "classes": list(source.class_names)})
    elif {k: read_json(manifest).get(k) for k in identity} != identity:
        raise InputError(
            f"{manifest} does not describe its own folder; delete {folder} and give the same command again"
        )
    return cache


def encode_class(
    source: ImageSource,
    label: int,
    codec: Codec,
    cache: LatentCache,
    source_config: SourceConfig,
    config: CodecConfig,
    *,
    seed: int,
    on_batch: Any = None,
) -> None:
    """Encode the train images of one class and write its shard. Reading runs one batch ahead of the codec."""
    rows = source.rows_of_class(label)
    starts = range(0, len(rows), config.batch_size)
    parts, kept, bad = [], [], []

    def read(start: int) -> tuple[Tensor, list[int], list[str]]:
        return read_images(
            source.train,
            rows[start : start + config.batch_size],
            config.resolution,
            source_config.preprocess,
            on_bad=source_config.on_bad_image,
            threads=1 if next(codec.parameters()).device.type == "cpu" else 4,  # the codec has the other cores
        )

    with ThreadPoolExecutor(1) as ahead, torch.inference_mode():
        pending = ahead.submit(read, 0)
        for start in starts:
            images, good, problems = pending.result()
            if start + config.batch_size < len(rows):
                pending = ahead.submit(read, start + config.batch_size)
            bad += problems
            kept += good
            if len(images):
                draw = config.posterior == "sample"
                generators = [generator(seed, "posterior", row) for row in good] if draw else None
                z = encode_latents(codec, to_signed(images), posterior=config.posterior, generators=generators)
                parts.append(z.half().cpu())
            if on_batch is not None:
                on_batch(min(config.batch_size, len(rows) - start))
    if not kept:
        raise InputError(
            f"no image of class {label} {source.class_names[label]!r} can be read; replace them or drop the class"
        )
    tensors = {"latents": torch.cat(parts), "rows": torch.tensor(kept)}
    if not torch.isfinite(tensors["latents"]).all():
        raise InputError(
            f"latents of class {label} {source.class_names[label]!r} exceed the float16 range in which they "
            "are stored; this codec's scaling factor is not that of its latents"
        )
    write_tensors(cache.path(label), tensors, {"label": label, "bad_images": bad})


def encode_source(
    source: ImageSource,
    codec: Codec,
    cache: LatentCache,
    source_config: SourceConfig,
    config: CodecConfig,
    *,
    labels: list[int],
    seed: int,
    main: bool = True,
) -> float:
    """Encode the classes in `labels` that the cache lacks; returns seconds spent."""
    began = time.perf_counter()
    todo = [c for c in labels if not cache.path(c).is_file()]
    counts = source.class_counts()
    with progress([], desc="encode", total=int(counts[todo].sum()), unit="img", main=main and bool(todo)) as bar:
        for c in todo:
            encode_class(source, c, codec, cache, source_config, config, seed=seed, on_batch=bar.update)
    return time.perf_counter() - began
