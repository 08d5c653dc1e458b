"""Latents of classes from pure noise, as the stock `DiTPipeline` samples them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dq.core.errors import InputError
from dq.core.memory import run_with_batch_backoff
from dq.diffusion.sampling import (
    check_start,
    choose_start,
    denoise_noisy,
    dit_prediction,
    guided,
    null_class,
)
from dq.diffusion.time_grid import fresh_scheduler
from dq.diffusion.weaker_models import ClassPredict


@dataclass(frozen=True)
class ClassModel:
    """A class-conditional DiT of diffusers, and how it is sampled."""

    transformer: Any
    scheduler: Any  # of diffusers, diffusion or flow matching; its state is not used
    predict: ClassPredict | None = None  # in place of the transformer's own prediction


@torch.no_grad()
def sample_latents(
    model: ClassModel,
    classes: Sequence[int],
    generators: Sequence[torch.Generator],
    *,
    guidance_scale: float,
    num_inference_steps: int,
    noise: Tensor | None = None,
) -> Tensor:
    """Sample latents of classes from noise, as diffusers' pipelines do.

    They are denoised over the whole time grid from Gaussian noise times the scheduler's `init_noise_sigma`. That is
    not the forward process at the first timestep: a grid of few leading steps begins where a part of the image is
    left, and Euler's deviation is sqrt(sigma^2 + 1) rather than sigma.

    Args:
        model: what is sampled, and how.
        classes: class of each latent, an index of the DiT's own.
        generators: one CPU generator per latent, of which it draws all its randomness.
        guidance_scale: weight of classifier-free guidance; 1 is none.
        num_inference_steps: steps of the scheduler.
        noise: (B, C, h, w), in place of a draw from the generators.

    Returns:
        (B, C, h, w) float32 in the denoiser's space, on its device.

    Raises:
        InputError: if there is no scheduler, or it starts where the prediction does not depend on the image.
        RunError: if the result is not finite.
    """
    transformer, scheduler = model.transformer, model.scheduler
    if scheduler is None:
        raise InputError("sampling needs a scheduler, which this model does not have; give one, e.g. DDIMScheduler()")
    trajectory = fresh_scheduler(scheduler, num_inference_steps)
    start = choose_start(trajectory, num_inference_steps, strength=1.0)
    check_start(trajectory, start)
    cond = torch.tensor(list(classes), dtype=torch.long, device=transformer.device)
    channels, side = int(transformer.config.in_channels), int(transformer.config.sample_size)
    if noise is None:
        noise = torch.stack([torch.randn(channels, side, side, generator=g) for g in generators])
    if hasattr(trajectory, "set_begin_index"):  # not DDIM, DDPM, PNDM
        trajectory.set_begin_index(0)
    # flow-matching schedulers have no initial deviation: their state is the noise itself
    sigma = float(getattr(trajectory, "init_noise_sigma", 1.0))
    predict = model.predict or dit_prediction(transformer)
    steps = guided(predict, cond, null_class(transformer, cond), guidance_scale)
    return denoise_noisy(steps, trajectory, sigma * noise.to(transformer.device), start, generators)


def sample_in_pieces(
    model: ClassModel,
    classes: Sequence[int],
    generators: Sequence[torch.Generator],
    *,
    noise: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`sample_latents`, in pieces where memory is short; what a failed call drew is drawn again."""
    states = [g.get_state() for g in generators]

    def sample(s: slice) -> Tensor:
        for g, state in zip(generators[s], states[s], strict=True):
            g.set_state(state)
        return sample_latents(model, classes[s], generators[s], noise=None if noise is None else noise[s], **options)

    config = model.transformer.config
    return run_with_batch_backoff("sample", len(classes), sample, like=(config.in_channels, config.sample_size))


def noise_of_images(
    generator: torch.Generator | Sequence[torch.Generator] | None, shape: tuple[int, int, int, int]
) -> tuple[Tensor, list[torch.Generator]]:
    """Initial noise as diffusers' `randn_tensor` draws it, and generators.

    The noise is (B, C, h, w) float32. There is a CPU generator for each image, for the steps of schedulers that draw
    noise.

    Args:
        generator: one for all images, one for each, or None for fresh noise; on any device.
        shape: (B, C, h, w).

    Raises:
        InputError: for another type, or another number of generators.
    """
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if isinstance(generator, torch.Generator):
        noise = torch.randn(shape, generator=generator, device=generator.device).cpu()
        seeds = torch.randint(2**62, (shape[0],), generator=generator, device=generator.device).tolist()
        return noise, [torch.Generator().manual_seed(seed) for seed in seeds]
    if not isinstance(generator, (list, tuple)) or not all(isinstance(g, torch.Generator) for g in generator):
        raise InputError(f"generator is a torch.Generator or a list of them, not {type(generator).__name__}")
    if len(generator) != shape[0]:
        raise InputError(f"there are {len(generator)} generators for {shape[0]} images; give one, or one for each")
    rows = [torch.randn(shape[1:], generator=g, device=g.device).cpu() for g in generator]
    noise = torch.stack(rows) if rows else torch.zeros(shape)
    return noise, [g if g.device.type == "cpu" else _on_cpu(g) for g in generator]


def _on_cpu(generator: torch.Generator) -> torch.Generator:
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))
