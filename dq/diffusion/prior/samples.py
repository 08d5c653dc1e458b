"""Samples of a prior from noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq.core.files import is_done, read_tensors, write_tensors
from dq.core.progress import progress
from dq.core.seeds import digest_of, generator
from dq.diffusion.class_sampling import ClassModel, sample_in_pieces
from dq.diffusion.codec import decode_images
from dq.diffusion.generator import LatentGenerator


@dataclass(frozen=True)
class Draw:
    """Settings of the samples of a prior, except the guidance scale."""

    pipe: LatentGenerator
    scheduler: Any  # of diffusers; its state is not used
    condition_ids: Sequence[int]  # the DiT's class for every class of the source
    counts: Sequence[int]  # images of every class of the source
    num_inference_steps: int
    image_size: int  # side in px
    seed: int
    batch_size: int  # changes samples by rounding at most
    internal_guidance: float = 1.0
    autoguidance: float = 1.0

    @property
    def labels(self) -> Tensor:
        """Class of every sample, (N,) int64: class by class."""
        return torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts))

    def identity(self, guidance_scale: float) -> list[object]:
        """What the images depend on, for digests."""
        settings = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        numbers = [self.num_inference_steps, self.image_size, self.seed, guidance_scale]
        dtype = str(self.pipe.transformer.dtype)
        sampling = [type(self.scheduler).__name__, settings, list(self.condition_ids), list(self.counts), dtype]
        weaker = [self.weaker_guidance] if self.weaker_guidance else []
        return [self.pipe.digest("dit"), *numbers, *sampling, *weaker]

    @property
    def weaker_guidance(self) -> dict[str, float]:
        """Scales of guidance by weaker versions, without those that are off.

        So digests and records of versions without these options stay valid.
        """
        scales = {"internal_guidance": self.internal_guidance, "autoguidance": self.autoguidance}
        return {name: scale for name, scale in scales.items() if scale != 1}


def sample_images(draw: Draw, guidance_scale: float, *, main: bool = True) -> Tensor:
    """Draw images of every class, in the order of `draw.labels`.

    They are (N, 3, S, S) uint8. The noise of image i of class c comes from (seed, "prior sample", c, i) alone, and is
    the same at every guidance scale.
    """
    samples = [(c, i) for c, n in enumerate(draw.counts) for i in range(n)]  # class, and number in the class
    predict = draw.pipe.prediction(draw.internal_guidance, draw.autoguidance)
    model = ClassModel(draw.pipe.transformer, draw.scheduler or draw.pipe.scheduler, predict)
    parts = []
    starts = range(0, len(samples), draw.batch_size)
    for first in progress(starts, desc=f"samples, guidance {guidance_scale:g}", unit="batch", main=main):
        batch = samples[first : first + draw.batch_size]
        latents = sample_in_pieces(
            model,
            [draw.condition_ids[c] for c, _ in batch],
            [generator(draw.seed, "prior sample", c, i) for c, i in batch],
            guidance_scale=guidance_scale,
            num_inference_steps=draw.num_inference_steps,
        )
        with torch.no_grad():
            parts.append(decode_images(draw.pipe.vae, latents, draw.image_size, dtype=torch.uint8))
    return torch.cat(parts)


def stored_samples(draw: Draw, guidance_scale: float, folder: Path, *, main: bool = True) -> Tensor:
    """`sample_images`, stored in a file of `folder` named by its digest."""
    file = folder / f"guidance-{guidance_scale:g}-{digest_of(draw.identity(guidance_scale))}.safetensors"
    if not is_done(file):
        images = sample_images(draw, guidance_scale, main=main)
        write_tensors(file, {"images": images, "labels": draw.labels}, {"guidance_scale": guidance_scale})
    return read_tensors(file)[0]["images"]
