"""Cache of the latents of all train images.

Runs of images are the units of work. A run has one file, in which rows lie class by class, so that a class is read in
slices of a few files. Which images belong to which file depends on the data alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from dq.config.schema import CodecConfig
from dq.core.devices import reader_threads
from dq.core.errors import InputError
from dq.core.files import is_done, read_json
from dq.core.memory import run_with_batch_backoff
from dq.core.plain import PlainDict
from dq.core.seeds import digest_of, generator
from dq.data.image_cache import ImageCache, Reading, fill, write_manifest
from dq.data.source import ImageSource
from dq.diffusion.codec import Codec, codec_digest, encode_latents, latent_shape, load_codec, to_signed


@dataclass(frozen=True)
class LatentCache(ImageCache):
    """Latents in float16, `shape` (C, h, w) each."""

    shape: tuple[int, int, int]
    flip: bool = False  # of the images mirrored left to right

    name: ClassVar[str] = "latents"


def open_cache(
    cache_dir: str | Path,
    source: ImageSource,
    codec: Codec,
    config: CodecConfig,
    seed: int,
    *,
    flip: bool = False,
) -> LatentCache:
    """The cache folder of data, codec and settings, with its manifest written.

    `flip` is for latents of the mirrored images.
    """
    identity = _full_identity(source, codec, config, seed)
    if flip:
        identity["flip"] = True
    key = digest_of(identity)
    folder = Path(cache_dir) / f"latents-{key}"
    write_manifest(folder, {**identity, "origin": source.origin, "classes": list(source.class_names)})
    shape = latent_shape(codec, config.resolution)
    return LatentCache(folder, source.class_names, key, len(source.train), shape, flip)


def latents_key(source: ImageSource, codec: Codec, config: CodecConfig, seed: int) -> str:
    """The key of `open_cache`'s cache, without writing."""
    return digest_of(_full_identity(source, codec, config, seed))


def _full_identity(source: ImageSource, codec: Codec, config: CodecConfig, seed: int) -> PlainDict:
    codec_dtype = str(next(codec.parameters()).dtype).removeprefix("torch.")
    dtype = codec_dtype if config.dtype == "auto" else config.dtype
    return {**_identity(source, config, seed), "codec": codec_digest(codec), "dtype": dtype}


def _identity(source: ImageSource, config: CodecConfig, seed: int) -> PlainDict:
    """What decides latents beside the codec.

    The seed matters only where latents are drawn; batch size and process count never do.
    """
    return {
        "data": source.fingerprint,
        "resolution": config.resolution,
        "preprocess": source.preprocess,
        "on_bad_image": "raise",  # decides whether there is a result, never which
        "posterior": config.posterior,
        "seed": seed if config.posterior == "sample" else None,
    }


def cached_dtype(cache_dir: str | Path, source: ImageSource, config: CodecConfig, seed: int, dtype: str) -> str:
    """The dtype of existing latents of these images, else `dtype`.

    `dtype` is preferred, and nothing is loaded unless latents were made in another.
    """
    identity = _identity(source, config, seed)
    digests: dict[str, set[str]] = {}  # dtype -> those of codecs
    for manifest in sorted(Path(cache_dir).glob("latents-*/manifest.json")):
        if is_done(manifest):
            facts = read_json(manifest)
            if {k: facts.get(k) for k in identity} == identity:
                digests.setdefault(facts["dtype"], set()).add(facts["codec"])
    if not set(digests) - {dtype}:
        return dtype
    for candidate in (dtype, *(d for d in digests if d != dtype)):
        codec = load_codec(config.path, subfolder=config.subfolder, revision=config.revision, dtype=candidate)
        if codec_digest(codec) in digests.get(candidate, ()):
            return candidate
    return dtype


def encode_source(
    source: ImageSource,
    codec: Codec,
    cache: LatentCache,
    config: CodecConfig,
    *,
    seed: int,
    local_units: Callable[[list[float]], list[int]] | None = None,
    main: bool = True,
) -> float:
    """Encode the images that the cache lacks; see `fill`.

    Raises:
        InputError: if latents do not fit into float16, in which they are stored.
    """
    sampled = config.posterior == "sample"
    device = next(codec.parameters()).device

    def compute(images: Tensor, rows: list[int]) -> Tensor:
        def encode(s: slice) -> Tensor:
            generators = [generator(seed, "posterior", row) for row in rows[s]] if sampled else None
            x = images[s].to(device, non_blocking=True)  # as bytes, a quarter of the floats
            x = x.flip(-1) if cache.flip else x
            z = encode_latents(codec, to_signed(x), posterior=config.posterior, generators=generators)
            return z.half().cpu()

        with torch.inference_mode():
            z = run_with_batch_backoff("encode", len(images), encode, like=(cache.key,))
        if not torch.isfinite(z).all():
            row = rows[int((~torch.isfinite(z).flatten(1).all(1)).nonzero()[0])]
            raise InputError(
                f"the latent of {source.train.where(row)} exceeds the float16 range in which latents are stored; this "
                "codec's scaling factor is not that of its latents"
            )
        return z

    reading = Reading(config.resolution, config.batch_size, reader_threads(device), pin=device.type == "cuda")
    return fill(cache, source, compute, reading, local_units=local_units, main=main)
