"""The encode stage of a run: cached latents of train images."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from dq.core.errors import InputError
from dq.core.files import read_json, write_json, write_text
from dq.core.text import plural
from dq.diffusion.codec import Codec
from dq.diffusion.compiled import compile_codec
from dq.diffusion.latents import LatentCache, encode_source, open_cache
from dq.run.folder import Run

log = logging.getLogger("dq")


def encode(run: Run, codec: Codec) -> LatentCache:
    """Encode every image into the latent cache; existing files are kept."""
    began = time.perf_counter()
    c = run.config
    codec.to(run.device)
    if c.codec.compile == "auto":
        compile_codec(codec, "encoder", (c.codec.batch_size, 3, c.codec.resolution, c.codec.resolution))
    cache = open_cache(c.cache_dir, run.source, codec, c.codec, c.seed)
    encode_source(run.source, codec, cache, c.codec, seed=c.seed, local_units=run.local_units, main=run.main)
    run.finish("encode", began, images=cache.images, cache=cache.key)
    cache.check()
    if run.main:
        write_json(run.folder / "latents.json", {"key": cache.key, "shape": list(cache.shape)})
    run.accelerator.wait_for_everyone()
    if run.main and (bad := cache.bad_images()):
        write_text(run.folder / "bad_images.txt", "\n".join(bad) + "\n")
        log.warning("%s set aside, listed in %s", plural(len(bad), "unreadable image"), run.folder / "bad_images.txt")
    return cache


def cache_of(run: Run) -> LatentCache:
    """Open the latent cache of this run without loading the codec."""
    pointer = run.folder / "latents.json"
    if not pointer.is_file():
        raise InputError(f"{run.folder} has no latents yet; run `dq encode` first")
    record = read_json(pointer)
    folder = Path(run.config.cache_dir) / f"latents-{record['key']}"
    images = len(run.source.train)
    cache = LatentCache(folder, run.source.class_names, record["key"], images, tuple(record["shape"]))
    cache.check()
    return cache
