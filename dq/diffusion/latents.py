"""What a network makes of every train image, kept for all later runs: latents of a codec, features of a teacher.

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
from dq.core.memory import in_pieces
from dq.core.seeds import digest_of, generator
from dq.data.image_cache import ImageCache, fill, write_manifest
from dq.data.source import ImageSource
from dq.diffusion.codec import Codec, codec_digest, encode_latents, latent_shape, to_signed


@dataclass(frozen=True)
class LatentCache(ImageCache):
    """Latents in float16, `shape` (C, h, w) each."""

    shape: tuple[int, int, int]

    name: ClassVar[str] = "latents"


def open_cache(
    cache_dir: str | Path,
    source: ImageSource,
    codec: Codec,
    config: CodecConfig,
    seed: int,
) -> LatentCache:
    """The cache folder of this combination of data, codec and settings, with its manifest written."""
    # The seed matters only where latents are drawn; batch size and process count never do.
    identity = {
        "data": source.fingerprint,
        "codec": codec_digest(codec),
        "resolution": config.resolution,
        "preprocess": source.preprocess,
        "on_bad_image": "raise",  # decides whether there is a result, never which
        "posterior": config.posterior,
        "dtype": config.dtype,
        "seed": seed if config.posterior == "sample" else None,
    }
    key = digest_of(identity)
    folder = Path(cache_dir) / f"latents-{key}"
    write_manifest(folder, {**identity, "origin": source.origin, "classes": list(source.class_names)})
    return LatentCache(folder, source.class_names, key, len(source.train), latent_shape(codec, config.resolution))


def encode_source(
    source: ImageSource,
    codec: Codec,
    cache: LatentCache,
    config: CodecConfig,
    *,
    seed: int,
    mine: Callable[[list[float]], list[int]] | None = None,
    main: bool = True,
) -> float:
    """Encode the images that the cache lacks; see `fill`.

    Raises:
        InputError: if latents do not fit into float16, in which they are kept.
    """
    sampled = config.posterior == "sample"

    def compute(images: Tensor, rows: list[int]) -> Tensor:
        def encode(s: slice) -> Tensor:
            generators = [generator(seed, "posterior", row) for row in rows[s]] if sampled else None
            z = encode_latents(codec, to_signed(images[s]), posterior=config.posterior, generators=generators)
            return z.half().cpu()

        with torch.inference_mode():
            z = in_pieces("encode", len(images), encode, like=(cache.key,))
        if not torch.isfinite(z).all():
            row = rows[int((~torch.isfinite(z).flatten(1).all(1)).nonzero()[0])]
            raise InputError(
                f"the latent of {source.train.where(row)} exceeds the float16 range in which latents are stored; this "
                "codec's scaling factor is not that of its latents"
            )
        return z

    return fill(
        cache,
        source,
        compute,
        side=config.resolution,
        batch_size=config.batch_size,
        mine=mine,
        threads=reader_threads(next(codec.parameters()).device),
        main=main,
    )
