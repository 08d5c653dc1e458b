"""From a latent point to a sample of the diffusion prior: where to start, how to noise, how to walk back.

The scheduler owns all noise arithmetic; nothing here knows a beta. A scheduler carries state, so every walk gets a
fresh one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dq.errors import InputError, RunError

Predict = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, C, h, w), t) -> model output (B, C, h, w)


@dataclass(frozen=True)
class Start:
    """Where on the time grid a walk begins."""

    index: int  # into scheduler.timesteps
    timestep: float
    snr: float  # signal-to-noise ratio there
    strength: float  # share of the nominal steps that are walked
    calls: int  # model evaluations that follow


def fresh_scheduler(scheduler: Any, num_inference_steps: int, device: torch.device | str = "cpu") -> Any:
    """A new scheduler of the same settings with its time grid set."""
    new = type(scheduler).from_config(scheduler.config)
    new.set_timesteps(num_inference_steps, device=device)
    return new


def is_flow(scheduler: Any) -> bool:
    """Whether x_t = (1 - sigma) x_0 + sigma noise (flow matching), rather than a diffusion with alphas."""
    return "FlowMatch" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas"))


def grid_snr(scheduler: Any) -> Tensor:
    """Signal-to-noise ratio at every entry of `scheduler.timesteps`, float64, rising.

    alpha_bar / (1 - alpha_bar) for variance-preserving grids (DDIM, DDPM, PNDM); 1 / sigma^2 for grids in sigma
    (Euler, Heun, DPM-Solver++, UniPC); ((1 - sigma) / sigma)^2 for flow matching.
    """
    n = len(scheduler.timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        s = torch.as_tensor(sigmas).double().cpu()[:n].clamp(min=1e-12)
        return ((1 - s) / s).square() if is_flow(scheduler) else 1 / s.square()
    table = scheduler.alphas_cumprod.double().cpu()
    # a full grid with an offset runs one past the table
    alpha_bar = table[scheduler.timesteps.long().cpu().clamp(max=len(table) - 1)]
    return alpha_bar / (1 - alpha_bar)


def choose_start(
    scheduler: Any, num_inference_steps: int, *, snr: float | None = None, strength: float | None = None
) -> Start:
    """The grid step to start from: nearest in log SNR to `snr`, or by `strength` as diffusers' img2img counts it.

    The same strength means different noise on different backbones (0.7 of Stable Diffusion's grid is an SNR near 0.1,
    of DiT's linear grid 0.007), so SNR is the parameter that carries over.
    """
    if (snr is None) == (strength is None):
        raise InputError("give exactly one of generate.snr and generate.strength; set the other to null")
    order = int(getattr(scheduler, "order", 1))
    grid = grid_snr(scheduler)
    if strength is not None:
        if not 0 < strength <= 1:
            raise InputError(f"generate.strength={strength} must lie in (0, 1]")
        walked = min(int(num_inference_steps * strength), num_inference_steps)
        if walked == 0:
            raise InputError(
                f"generate.strength={strength} of {num_inference_steps} steps is no step at all; raise either"
            )
        index = (num_inference_steps - walked) * order
    else:
        assert snr is not None
        if not snr > 0:
            raise InputError(f"generate.snr={snr} must be positive")
        candidates = torch.arange(0, len(grid), order)
        index = int(candidates[(grid[candidates].log() - math.log(snr)).abs().argmin()])
    return Start(
        index=index,
        timestep=float(scheduler.timesteps[index]),
        snr=float(grid[index]),
        strength=(num_inference_steps - index // order) / num_inference_steps,
        calls=len(scheduler.timesteps) - index,
    )


def add_noise(scheduler: Any, latents: Tensor, noise: Tensor, start: Start) -> Tensor:
    """The noisy latents at `start`, in the scaling that the scheduler's own `step` expects."""
    if hasattr(scheduler, "set_begin_index"):  # not DDIM, DDPM, PNDM
        scheduler.set_begin_index(start.index)
    t = scheduler.timesteps[start.index].repeat(len(latents)).to(latents.device)
    if hasattr(scheduler, "scale_noise"):  # flow matching has no add_noise
        return scheduler.scale_noise(latents, t, noise)
    return scheduler.add_noise(latents, noise, t)


@torch.no_grad()
def denoise(
    predict: Predict, scheduler: Any, latents: Tensor, start: Start, generators: Sequence[torch.Generator]
) -> Tensor:
    """Noise `latents` (B, C, h, w) to `start` and walk back; image b draws all its randomness from generators[b].

    Returns latents of the same shape and dtype.

    Raises:
        RunError: if the result is not finite.
    """
    noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(latents)
    x = add_noise(scheduler, latents, noise, start)
    random_step = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": list(generators)} if random_step else {}
    for t in scheduler.timesteps[start.index :]:
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(predict(model_input, t), t, x, **extra).prev_sample
    if not torch.isfinite(x).all():
        raise RunError(
            f"the denoiser ended in NaN or infinite latents in {str(latents.dtype).removeprefix('torch.')}; "
            "use --set generate.dtype=float32"
        )
    return x


def guided(predict: Callable[[Tensor, Tensor, Any], Tensor], cond: Any, null: Any, scale: float) -> Predict:
    """Classifier-free guidance: null + scale * (cond - null); a scale of at most 1 calls the model once.

    `cond` and `null` are tensors with one row per image; both halves go through the model in one batch.
    """
    if scale <= 1:
        return lambda x, t: predict(x, t, cond)

    def both(x: Tensor, t: Tensor) -> Tensor:
        out_cond, out_null = predict(torch.cat([x, x]), t, torch.cat([cond, null])).chunk(2)
        return out_null + scale * (out_cond - out_null)

    return both
