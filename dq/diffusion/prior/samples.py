"""Images of a prior from pure noise: what it knows by itself, without a prototype to start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dq.core.files import is_done, read_tensors, write_tensors
from dq.core.progress import progress
from dq.core.seeds import digest_of, generator
from dq.diffusion.codec import decode_latents, to_unit
from dq.diffusion.sampling import choose_start, denoise, dit_prediction, fresh_scheduler, guided, null_class

if TYPE_CHECKING:
    from dq.diffusion.generator import DistillPipeline


@dataclass(frozen=True)
class Draw:
    """All that decides the samples of a prior, but for the guidance scale."""

    pipe: DistillPipeline
    scheduler: Any  # of diffusers; its state is not used
    condition_ids: Sequence[int]  # the DiT's class for every class of the source
    counts: Sequence[int]  # images of every class of the source
    num_inference_steps: int
    image_size: int  # side in px
    seed: int
    batch_size: int  # changes samples by rounding at most

    @property
    def labels(self) -> Tensor:
        """Class of every sample, (N,) int64: class by class."""
        return torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts))

    def identity(self, guidance_scale: float) -> list[Any]:
        """What the images depend on, for digests."""
        settings = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        numbers = [self.num_inference_steps, self.image_size, self.seed, guidance_scale]
        dtype = str(self.pipe.transformer.dtype)
        where = [type(self.scheduler).__name__, settings, list(self.condition_ids), list(self.counts), dtype]
        return [self.pipe.digest("dit"), *numbers, *where]


def sample_images(draw: Draw, guidance_scale: float, *, main: bool = True) -> Tensor:
    """Draw images of every class: (N, 3, S, S) uint8, in the order of `draw.labels`.

    The noise of image i of class c comes from (seed, "prior sample", c, i) alone, and is the same at every guidance
    scale.
    """
    places = [(c, i) for c, n in enumerate(draw.counts) for i in range(n)]
    parts = []
    starts = range(0, len(places), draw.batch_size)
    for first in progress(starts, desc=f"samples, guidance {guidance_scale:g}", unit="batch", main=main):
        batch = places[first : first + draw.batch_size]
        latents = sample_latents(
            draw.pipe,
            [draw.condition_ids[c] for c, _ in batch],
            [generator(draw.seed, "prior sample", c, i) for c, i in batch],
            scheduler=draw.scheduler,
            guidance_scale=guidance_scale,
            num_inference_steps=draw.num_inference_steps,
        )
        with torch.no_grad():
            unit = to_unit(decode_latents(draw.pipe.vae, latents), draw.image_size)
        parts.append((unit * 255).round().to(torch.uint8).cpu())
    return torch.cat(parts)


def stored_samples(draw: Draw, guidance_scale: float, folder: Path, *, main: bool = True) -> Tensor:
    """`sample_images`, kept in a file of `folder` that is named by all that decides them."""
    file = folder / f"guidance-{guidance_scale:g}-{digest_of(draw.identity(guidance_scale))}.safetensors"
    if not is_done(file):
        images = sample_images(draw, guidance_scale, main=main)
        write_tensors(file, {"images": images, "labels": draw.labels}, {"guidance_scale": guidance_scale})
    return read_tensors(file)[0]["images"]


@torch.no_grad()
def sample_latents(
    pipe: DistillPipeline,
    classes: Sequence[int],
    generators: Sequence[torch.Generator],
    *,
    guidance_scale: float,
    num_inference_steps: int,
    scheduler: Any = None,
) -> Tensor:
    """Latents of classes, walked back over the whole time grid from noise of the scheduler's initial deviation.

    Args:
        classes: class of each latent, an index of the DiT's own.
        generators: one CPU generator per latent, of which it draws all its randomness.
        scheduler: of diffusers, diffusion or flow matching; None: the pipeline's.

    Returns:
        (B, C, h, w) float32 in the denoiser's space, on its device.

    Raises:
        RunError: if the result is not finite.
    """
    model = pipe.transformer
    walk = fresh_scheduler(scheduler or pipe.scheduler, num_inference_steps)
    cond = torch.tensor(list(classes), device=model.device)
    channels, side = int(model.config.in_channels), int(model.config.sample_size)
    # At the first step of the grid nothing is left of the clean latent.
    nothing = torch.zeros(len(cond), channels, side, side, device=model.device)
    start = choose_start(walk, num_inference_steps, strength=1.0)
    return denoise(
        guided(dit_prediction(model), cond, null_class(model, cond), guidance_scale), walk, nothing, start, generators
    )
