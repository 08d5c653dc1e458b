"""Sampling from a latent point: start, noise, and denoising.

The scheduler owns the noise schedule and the steps. It carries state, so every trajectory gets a fresh one. Guidance
is expressed as one `Predict` per entry of the time grid, so that schedulers need not support it.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dq.core.devices import tf32_products
from dq.core.errors import InputError, RunError

Predict = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, C, h, w), t) -> model output (B, C, h, w)

# settings of a scheduler that belong to the model
MODEL_SETTINGS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type",
)  # fmt: skip
# Schedulers that transport a Gaussian rightly under a model that is exact (tests/diffusion/test_sampling.py). Others
# expect other models (EDM, consistency, inverse, two-stage), and would draw noise without an error.
BOTH_SCHEDULERS = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")
NOISE_SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler",
    "DEISMultistepScheduler", *BOTH_SCHEDULERS,
)  # fmt: skip
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", *BOTH_SCHEDULERS)
RANDOM = ("Ancestral", "DDPM", "SDE", "LCM", "TCD")  # in the name of a scheduler whose steps draw noise


@dataclass(frozen=True)
class Start:
    """Where on the time grid a trajectory begins."""

    index: int  # into scheduler.timesteps
    timestep: float
    snr: float  # signal-to-noise ratio there
    strength: float  # share of the nominal steps that are taken
    calls: int  # model evaluations that follow


@dataclass(frozen=True)
class Level:
    """Signal and noise at an entry of the time grid.

    The model sees x = signal * x_0 + noise * eps.
    """

    signal: float
    noise: float
    snr: float  # (signal / noise)^2


def choose_scheduler(current: Any, name: str | None) -> Any:
    """The scheduler class `name` with the noise schedule of `current`.

    With None, `current`. Noise prediction ("epsilon", "v_prediction", "sample") goes to `NOISE_SCHEDULERS`; a flow
    goes to `FLOW_SCHEDULERS`, of which those without "FlowMatch" get use_flow_sigmas,
    prediction_type="flow_prediction" and the same shift of the grid. The rest (Karras spacing, order, lower-order last
    steps) is the class's default, or what `current` says. Latents are not clipped unless `current` does.

    Raises:
        InputError: if it is none of these, or cannot sample from what this model predicts.
    """
    if name is None:
        return current
    import diffusers

    if name not in NOISE_SCHEDULERS + FLOW_SCHEDULERS:
        fit = FLOW_SCHEDULERS if is_flow(current) else NOISE_SCHEDULERS
        raise InputError(
            f"generate.scheduler={name} is none that this model can be sampled with; use {', '.join(fit)}"
        )
    cls = getattr(diffusers, name)
    parameters = inspect.signature(cls.__init__).parameters
    current_name = type(current).__name__
    if is_flow(current):
        if "FlowMatch" in name:
            if "FlowMatch" in current_name:
                return cls.from_config(current.config)
            return cls(num_train_timesteps=current.config.num_train_timesteps, shift=current.config.flow_shift)
        if name not in FLOW_SCHEDULERS:
            raise InputError(
                f"generate.scheduler={name} samples from models that predict noise, but this one predicts a flow "
                f"({current_name}); set FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler or "
                "UniPCMultistepScheduler"
            )
        if "FlowMatch" not in current_name:
            return cls.from_config(current.config)
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": current.config.shift}
        return cls(num_train_timesteps=current.config.num_train_timesteps, **flow)
    if "FlowMatch" in name:
        raise InputError(
            f"generate.scheduler={name} samples from models that predict a flow, but this one predicts noise "
            f"({current_name}); set DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler or "
            "EulerDiscreteScheduler"
        )
    # by value, because from_config leaves out defaults of the current class, and Heun's betas default to others
    changed = {k: current.config[k] for k in MODEL_SETTINGS if k in parameters and k in current.config}
    if "clip_sample" in parameters and "clip_sample" not in current.config:
        changed["clip_sample"] = False  # the default of DDIM and DDPM is made for pixels
    if name == "PNDMScheduler":
        changed["skip_prk_steps"] = True  # its Runge-Kutta steps at the start are for trajectories from pure noise
    if str(current.config.get("variance_type")).startswith("learned") and "variance_type" in parameters:
        changed["variance_type"] = parameters["variance_type"].default  # see `fresh_scheduler`
    return cls.from_config(current.config, **changed)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is one of flow matching.

    Then x_t = (1 - sigma) x_0 + sigma noise, rather than a diffusion with alphas.
    """
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


def grid_levels(scheduler: object) -> list[Level]:
    """Signal and noise at every entry of `scheduler.timesteps`.

    signal + noise = 1 for flow matching, else signal^2 + noise^2 = 1: Euler and Heun keep their state in units of the
    signal, but scale what they hand to the model.
    """
    flow, levels = is_flow(scheduler), []
    for snr in grid_snr(scheduler).tolist():
        root = math.sqrt(snr)
        total = 1 + root if flow else math.sqrt(1 + snr)
        levels.append(Level(signal=root / total, noise=1 / total, snr=snr))
    return levels


def model_times(scheduler: Any) -> Tensor:
    """The model's time at every entry of `scheduler.timesteps`, (n,).

    Where flow sigmas are used that is 1000 sigma (num_train_timesteps sigma): DPM-Solver++ and UniPC cut their own
    timesteps to whole numbers.
    """
    if scheduler.config.get("use_flow_sigmas"):
        return scheduler.sigmas[: len(scheduler.timesteps)] * scheduler.config.num_train_timesteps
    return scheduler.timesteps


def prediction_type(scheduler: Any) -> str:
    """The model's output: "epsilon", "v_prediction", "sample" or "flow_prediction" (noise - x_0)."""
    if "FlowMatch" in type(scheduler).__name__:
        return "flow_prediction"
    return str(scheduler.config.get("prediction_type") or "epsilon")


def clean_and_noise(out: Tensor, x: Tensor, level: Level, kind: str) -> tuple[Tensor, Tensor]:
    """The x_0 and noise of a model output at a level.

    For x = signal * x_0 + noise * eps, both are (B, C, h, w). `kind` is that of `prediction_type`.
    """
    a, b = level.signal, level.noise
    if kind == "epsilon":
        return (x - b * out) / a, out
    if kind == "v_prediction":  # a eps - b x_0
        return a * x - b * out, b * x + a * out
    if kind == "flow_prediction":  # eps - x_0
        return x - b * out, x + a * out
    if kind == "sample":
        return out, (x - a * out) / b
    raise InputError(f"prediction_type={kind!r} is not one of epsilon, v_prediction, sample and flow_prediction")


def choose_start(
    scheduler: Any, num_inference_steps: int, *, snr: float | None = None, strength: float | None = None
) -> Start:
    """The grid step to start from, by SNR or strength.

    It is nearest in log SNR to `snr`, or by `strength` as diffusers' img2img counts it. The same strength means
    different noise on different backbones (0.7 of Stable Diffusion's grid is an SNR near 0.1, of DiT's linear grid
    0.007), so SNR is the parameter that carries over.
    """
    if (snr is None) == (strength is None):
        raise InputError("give exactly one of generate.snr and generate.strength; set the other to off")
    order = int(getattr(scheduler, "order", 1))
    grid = grid_snr(scheduler)
    if strength is not None:
        if not 0 < strength <= 1:
            raise InputError(f"generate.strength={strength} must lie in (0, 1]")
        steps_taken = min(int(num_inference_steps * strength), num_inference_steps)
        if steps_taken == 0:
            raise InputError(
                f"generate.strength={strength} of {num_inference_steps} steps is no step at all; raise either"
            )
        index = (num_inference_steps - steps_taken) * order
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


def check_start(scheduler: object, start: Start) -> None:
    """Check that the model's prediction at `start` depends on the image.

    Raises:
        InputError: at an SNR of zero with noise prediction: x_0 = (x - noise) / 0. Lin et al. (2024) train models of
            v-prediction for schedules that end there.
    """
    if start.snr == 0 and prediction_type(scheduler) == "epsilon":
        raise InputError(
            f"{type(scheduler).__name__} starts at an SNR of zero (timestep {start.timestep:g}), where predicted "
            "noise says nothing of the image, in any precision; start later (generate.snr, or a generate.strength "
            "below 1), or give the model's scheduler rescale_betas_zero_snr=False or timestep_spacing='leading'"
        )


def add_noise(scheduler: Any, latents: Tensor, noise: Tensor, start: Start) -> Tensor:
    """Noisy latents at `start`, in the scaling of the scheduler's `step`."""
    if hasattr(scheduler, "set_begin_index"):  # not DDIM, DDPM, PNDM
        scheduler.set_begin_index(start.index)
    t = scheduler.timesteps[start.index].repeat(len(latents)).to(latents.device)
    if hasattr(scheduler, "scale_noise"):  # flow matching has no add_noise
        return scheduler.scale_noise(latents, t, noise)
    return scheduler.add_noise(latents, noise, t)


@torch.no_grad()
def denoise(
    predict: Predict | Sequence[Predict],
    scheduler: object,
    latents: Tensor,
    start: Start,
    generators: Sequence[torch.Generator],
    *,
    noise: Tensor | None = None,
    guidance: Mapping[str, float] | None = None,
) -> Tensor:
    """Noise latents (B, C, h, w) to `start` and denoise them.

    The scheduler's grid may stay on the CPU: its arithmetic is of single numbers, and reading them from a device would
    wait for it at every step.

    Args:
        predict: one for the whole trajectory, or one for every entry of `scheduler.timesteps`.
        scheduler: with its time grid set.
        latents: (B, C, h, w).
        start: where the trajectory begins.
        generators: one per image, of which it draws all its randomness.
        noise: (B, C, h, w), in place of a draw from the generators.
        guidance: settings of `generate` that guide `predict`, for messages.

    Returns:
        Latents of the same shape and dtype.

    Raises:
        RunError: if the result is not finite.
    """
    if noise is None:
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(latents)
    noisy = add_noise(scheduler, latents, noise, start)
    return denoise_noisy(predict, scheduler, noisy, start, generators, guidance=guidance)


@torch.no_grad()
def denoise_noisy(
    predict: Predict | Sequence[Predict],
    scheduler: Any,
    noisy: Tensor,
    start: Start,
    generators: Sequence[torch.Generator],
    *,
    guidance: Mapping[str, float] | None = None,
) -> Tensor:
    """Denoise latents that are at the noise level of `start`.

    They are (B, C, h, w), in the scaling of the scheduler's `step`. See `denoise` for arguments, result and errors.
    """
    x = noisy
    random_step = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": list(generators)} if random_step else {}
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    times = model_times(scheduler).to(x.device)
    for i in range(start.index, len(scheduler.timesteps)):
        t = scheduler.timesteps[i]
        step_predict = predict if callable(predict) else predict[i]
        x = scheduler.step(step_predict(scale(x, t), times[i]), t, x, **extra).prev_sample
    if not torch.isfinite(x).all():
        scales = ", ".join(f"generate.{name}={scale:g}" for name, scale in (guidance or {}).items())
        raise RunError(
            "the denoiser ended in NaN or infinite latents; use --set generate.dtype=float32 (or bfloat16 in place of "
            f"float16), or in float32 another generate.scheduler or a start later than SNR {start.snr:.3g}"
            + (f", or guide it less (now {scales})" if scales else "")
        )
    return x


@torch.no_grad()
def invert(predict: Predict, scheduler: object, latents: Tensor, start: Start) -> tuple[Tensor, Tensor]:
    """DDIM inversion (Song et al. 2021) of clean latents up to `start`.

    From one level to the next noisier one, x' = signal' x_0 + noise' eps with the x_0 and the noise that the model
    sees in x; for flow matching this is Euler's step x' = x + (sigma' - sigma) v of the ODE, backwards. One model call
    per level. The first, at the least noisy level, sees the clean latents (B, C, h, w).

    Returns:
        x_0 and noise, (B, C, h, w) both, of which `add_noise` makes the point at `start`; no random number is drawn.
    """
    kind, levels, times = prediction_type(scheduler), grid_levels(scheduler), model_times(scheduler).to(latents.device)
    grid = [(levels[i], times[i]) for i in reversed(range(start.index, len(levels)))]
    # a scheduler of second order has its levels twice
    grid = [grid[0], *(b for a, b in itertools.pairwise(grid) if b[0] != a[0])]
    clean = latents
    out = predict(clean, grid[0][1])
    # at level zero a flow's velocity is noise - x_0 of the clean point itself
    noise = clean + out if kind == "flow_prediction" else clean_and_noise(out, clean, grid[0][0], kind)[1]
    for level, t in grid[:-1]:
        x = level.signal * clean + level.noise * noise
        clean, noise = clean_and_noise(predict(x, t), x, level, kind)
    return clean, noise


def dit_prediction(model: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A class-conditional DiT as a function of (x, t, classes).

    For x (B, C, h, w) and classes (B,) it returns the prediction (B, C, h, w) float32 without the variance that it may
    have learned.
    """
    channels, dtype = int(model.config.in_channels), model.dtype

    def predict(x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        with tf32_products():
            out = model(x.to(dtype), timestep=t.expand(len(x)), class_labels=classes).sample
        return out[:, :channels].float()

    return predict


def null_class(model: Any, classes: Tensor) -> Tensor:
    """The null class for each of `classes` (B,).

    It is the last row of the DiT's table. Stock DiTPipeline has the literal 1000.
    """
    return torch.full_like(classes, int(model.config.num_embeds_ada_norm))


def is_random(scheduler: Any) -> bool:
    """Whether the scheduler's own steps draw noise (ancestral, DDPM, SDE, LCM)."""
    config = scheduler.config
    return (
        any(word in type(scheduler).__name__ for word in RANDOM)
        or str(config.get("algorithm_type")).startswith("sde")
        or bool(config.get("stochastic_sampling"))
    )


def guided(predict: Callable[[Tensor, Tensor, Any], Tensor], cond: Any, null: Any, scale: float) -> Predict:
    """Classifier-free guidance: null + scale * (cond - null).

    `cond` and `null` are tensors with one row per image; both halves go through the model in one batch. A scale of 1
    calls the model once.
    """
    if scale <= 1:  # settings refuse less than 1
        return lambda x, t: predict(x, t, cond)
    conditions = torch.cat([cond, null])

    def both(x: Tensor, t: Tensor) -> Tensor:
        out_cond, out_null = predict(torch.cat([x, x]), t, conditions).chunk(2)
        return out_null + scale * (out_cond - out_null)

    return both


def limited(inside: Predict, outside: Predict, scheduler: Any, interval: Sequence[float]) -> list[Predict]:
    """Guidance in an interval of SNR (Kynkäänniemi et al. 2024).

    `inside` applies at the entries of the grid whose SNR lies in `interval` (low, high), ends included, `outside` at
    the others; everywhere `inside` if there is no interval. The paper states it in sigma = SNR^-1/2.
    """
    if not interval:
        return [inside] * len(scheduler.timesteps)
    low, high = interval
    return [inside if low <= level.snr <= high else outside for level in grid_levels(scheduler)]
