from __future__ import annotations

import math

import diffusers
import pytest
import torch

from dq.dist import generator
from dq.errors import InputError, RunError
from dq.sampling import add_noise, choose_start, denoise, fresh_scheduler, grid_snr, guided

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
DIT = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
VP = ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"]
SIGMA = ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"]
STOCHASTIC = ["EulerAncestralDiscreteScheduler", "DDPMScheduler"]
FLOW = ["FlowMatchEulerDiscreteScheduler"]


def make(name: str, config: dict | None = None, steps: int = 50):
    settings = {} if name in FLOW else dict(config or DIT)
    if name in ("DDIMScheduler", "DDPMScheduler"):
        settings["clip_sample"] = False  # as latent models ship them
    if name == "PNDMScheduler":
        settings["skip_prk_steps"] = True
    return fresh_scheduler(getattr(diffusers, name)(**settings), steps)


def test_strength_of_stable_diffusion_gives_the_known_timesteps() -> None:
    ddim = choose_start(make("DDIMScheduler", SD), 50, strength=0.7)
    assert (ddim.timestep, ddim.calls, ddim.strength) == (681, 35, 0.7)
    pndm = choose_start(make("PNDMScheduler", SD), 50, strength=0.7)
    assert (pndm.timestep, pndm.calls) == (701, 36)


@pytest.mark.parametrize(
    ("config", "strength", "root", "snr"),
    [
        (SD, 0.5, 0.52, 0.38),
        (SD, 0.6, 0.40, 0.19),
        (SD, 0.7, 0.30, 0.095),
        (SD, 0.8, 0.19, 0.04),
        (DIT, 0.5, 0.28, 0.084),
        (DIT, 0.6, 0.16, 0.026),
        (DIT, 0.7, 0.083, 0.007),
        (DIT, 0.8, 0.039, 0.0015),
    ],
)
def test_the_same_strength_is_another_noise_on_another_backbone(config, strength, root, snr) -> None:
    # the table takes t = 1000 * strength; a fine grid comes nearest
    start = choose_start(make("DDIMScheduler", {**config, "steps_offset": 0}, 1000), 1000, strength=strength)
    assert start.snr == pytest.approx(snr, rel=0.08)
    assert math.sqrt(start.snr / (1 + start.snr)) == pytest.approx(root, rel=0.04)


def test_strength_07_of_stable_diffusion_is_about_05_on_dit() -> None:
    sd = choose_start(make("DDIMScheduler", SD), 50, strength=0.7)
    assert choose_start(make("DDIMScheduler", DIT), 50, snr=sd.snr).strength == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("name", VP + SIGMA + FLOW)
def test_snr_of_the_grid_is_that_of_the_noised_latents(name: str) -> None:
    """add_noise on known data: the ratio of signal and noise variance is what `grid_snr` says."""
    scheduler = make(name, steps=20)
    order = getattr(scheduler, "order", 1)
    x, noise = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    for index in (order * 4, order * 12):
        start = choose_start(make(name, steps=20), 20, snr=float(grid_snr(scheduler)[index]))
        assert start.index == index
        signal = add_noise(make(name, steps=20), x, noise, start).mean()
        spread = add_noise(make(name, steps=20), noise, x, start).mean()
        assert float((signal / spread) ** 2) == pytest.approx(start.snr, rel=2e-3)


@pytest.mark.parametrize("name", VP + SIGMA + FLOW)
def test_a_perfect_denoiser_brings_the_point_back(name: str) -> None:
    """With a model that knows x0, every scheduler walks from any start back to x0."""
    x0 = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    scheduler = make(name, steps=20)
    start = choose_start(scheduler, 20, snr=0.1)
    flow = name in FLOW

    def perfect(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if flow:
            sigma = t / 1000
            return (x - x0) / sigma  # velocity noise - x0
        alpha = scheduler.alphas_cumprod[int(t)]
        if name in VP or name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
            return (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        sigma = ((1 - alpha) / alpha).sqrt()  # Euler and Heun scale the model input
        return (x * (sigma**2 + 1).sqrt() - x0) / sigma

    out = denoise(perfect, scheduler, x0, start, [generator(0, i) for i in range(3)])
    assert torch.allclose(out, x0, atol=0.15 if name in ("DDPMScheduler", "PNDMScheduler") else 2e-2)


@pytest.mark.parametrize("name", VP + SIGMA + FLOW + STOCHASTIC)
def test_an_image_depends_on_its_own_generator_only(name: str) -> None:
    x0 = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(1))

    def run(rows: list[int]) -> torch.Tensor:
        scheduler = make(name, steps=10)
        start = choose_start(scheduler, 10, snr=0.1)
        return denoise(lambda x, t: 0.3 * x, scheduler, x0[rows], start, [generator(5, r) for r in rows])

    together = run([0, 1, 2, 3])
    apart = torch.cat([run([3]), run([1, 2])])
    assert torch.allclose(together[[3, 1, 2]], apart, atol=1e-5)
    assert not torch.allclose(run([0]), denoise_with(name, x0[[0]], 6), atol=1e-3)


def denoise_with(name: str, x: torch.Tensor, seed: int) -> torch.Tensor:
    scheduler = make(name, steps=10)
    start = choose_start(scheduler, 10, snr=0.1)
    return denoise(lambda x, t: 0.3 * x, scheduler, x, start, [generator(seed, 0)])


def test_guidance() -> None:
    seen = []

    def model(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x * c.view(-1, 1)

    x, t = torch.ones(2, 3), torch.tensor(5)
    cond, null = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0])
    assert torch.equal(guided(model, cond, null, 4.0)(x, t), torch.tensor([[5.0] * 3, [9.0] * 3]))
    assert torch.equal(guided(model, cond, null, 1.0)(x, t), torch.tensor([[2.0] * 3, [3.0] * 3]))
    assert seen == [4, 2]  # without guidance the null class is not computed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0.01}, "strength=0.01 of 50 steps is no step at all"),
        ({"strength": 1.5}, "must lie in"),
        ({"snr": -1.0}, "must be positive"),
        ({"snr": 0.1, "strength": 0.5}, "exactly one of"),
        ({}, "exactly one of"),
    ],
)
def test_wrong_starts(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_start(make("DDIMScheduler"), 50, **settings)


def test_overflow_is_an_error() -> None:
    scheduler = make("DDIMScheduler", steps=5)
    start = choose_start(scheduler, 5, snr=0.1)
    with pytest.raises(RunError, match="NaN or infinite latents in float32"):
        denoise(lambda x, t: x * float("inf"), scheduler, torch.ones(1, 1, 2, 2), start, [generator(0)])
