from __future__ import annotations

import inspect
import itertools
import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

from dq.core.errors import InputError, RunError
from dq.core.seeds import generator
from dq.diffusion import time_grid
from dq.diffusion.guidance import toward
from dq.diffusion.sampling import (
    FLOW_SCHEDULERS,
    NOISE_SCHEDULERS,
    add_noise,
    choose_scheduler,
    choose_start,
    clean_and_noise,
    denoise,
    grid_levels,
    grid_snr,
    guided,
    invert,
    is_random,
    limited,
    model_times,
    prediction_type,
)
from dq.diffusion.time_grid import fresh_scheduler

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
    with pytest.raises(RunError, match=r"NaN or infinite latents; use .* or a start later than SNR 0\.24"):
        denoise(lambda x, t: x * float("inf"), scheduler, torch.ones(1, 1, 2, 2), start, [generator(0)])


# --- schedulers by name -------------------------------------------------------------------------------------------

MEAN, STD = 1.5, 0.4
NOISE_GIVEN = diffusers.DDIMScheduler(clip_sample=False)  # as a DiT ships it
V_GIVEN = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
FLOW_GIVEN = diffusers.FlowMatchEulerDiscreteScheduler()
FLOW_DPM_GIVEN = diffusers.DPMSolverMultistepScheduler(
    use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0
)
TO_NOISE = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
]
TO_FLOW = ["FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
CASES = [
    *((NOISE_GIVEN, name) for name in TO_NOISE),
    *((V_GIVEN, name) for name in TO_NOISE),
    *((FLOW_GIVEN, name) for name in TO_FLOW),
    *((FLOW_DPM_GIVEN, name) for name in TO_FLOW),
]


# grids of KDPM2 take a second each
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n.startswith("KDPM2") else n for n in NOISE_SCHEDULERS]
)
def test_kept_grids_are_those_that_are_set_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    real = time_grid._with_grid

    def counted(*args):
        nonlocal made
        made += 1
        return real(*args)

    monkeypatch.setattr(time_grid, "_with_grid", counted)
    monkeypatch.setattr(time_grid, "_grids", {})
    current = choose_scheduler(DDIMScheduler(clip_sample=False), name)
    first, second = fresh_scheduler(current, 5), fresh_scheduler(current, 5)
    assert made == 1
    x = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    ends = []
    for scheduler in (first, second, real(current, 5, "cpu")):  # the steps of one leave the others as they were
        assert torch.equal(scheduler.timesteps, first.timesteps)
        y = x
        extra = {"generator": torch.Generator().manual_seed(1)}
        extra = extra if "generator" in inspect.signature(scheduler.step).parameters else {}
        for t in scheduler.timesteps:
            y = scheduler.step(0.1 * scheduler.scale_model_input(y, t), t, y, **extra).prev_sample
        ends.append(y)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
    assert len(fresh_scheduler(current, 6).timesteps) != len(first.timesteps)
    other = choose_scheduler(DDIMScheduler(clip_sample=False, beta_end=0.03), name)
    assert not torch.equal(fresh_scheduler(other, 5).alphas_cumprod, first.alphas_cumprod)


def test_grids_of_a_second_table_of_betas_are_its_own() -> None:
    tables = [torch.linspace(1e-4, end, 1000).tolist() for end in (0.02, 0.03)]
    a, b = (fresh_scheduler(DDIMScheduler(trained_betas=table), 5) for table in tables)
    assert not torch.equal(a.alphas_cumprod, b.alphas_cumprod)


def walker(given, name: str | None, steps: int):
    return fresh_scheduler(choose_scheduler(given, name), steps)


def posterior_mean(scheduler, mean=MEAN, std=STD):
    """The exact model of data N(mean, std^2) in the scheduler's parameterization, at any time that it is given."""
    kind = prediction_type(scheduler)

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if kind == "flow_prediction":
            b = float(t) / scheduler.config.num_train_timesteps
            a = 1 - b
        else:
            # between two entries of the table, as Euler's grid lies
            table = scheduler.alphas_cumprod.double()
            low = min(int(t), len(table) - 1)
            high, part = min(low + 1, len(table) - 1), float(t) - low
            log = [float(((1 - table[i]) / table[i]).sqrt().log()) for i in (low, high)]
            sigma = math.exp((1 - part) * log[0] + part * log[1])
            a, b = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
        clean = mean + a * std**2 / (a**2 * std**2 + b**2) * (x - a * mean)
        if kind == "flow_prediction":
            return (x - clean) / b
        noise = (x - a * clean) / b
        return a * noise - b * clean if kind == "v_prediction" else noise

    return predict


@pytest.mark.parametrize(("given", "name"), CASES)
def test_every_scheduler_carries_noise_to_the_data(given, name: str) -> None:
    """N(0, 1) ends as N(m, s^2). The walk of this model is affine, so standardized noise gives mean and deviation."""
    scheduler = walker(given, name, 100)
    start = choose_start(scheduler, 100, strength=1.0)
    noise = torch.randn(4, 1, 16, 16, generator=generator(0), dtype=torch.float64)
    noise = ((noise - noise.mean()) / noise.std()).float()
    end = denoise(posterior_mean(scheduler), scheduler, torch.zeros_like(noise), start, [], noise=noise)
    # Euler's and DDIM's error is of first order in the steps; leading grids start a little below pure noise
    second_order = name.startswith(("DPM", "UniPC", "Heun"))
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(end.std()) == pytest.approx(STD, rel=0.02 if second_order else 0.06)


@pytest.mark.parametrize(
    ("given", "name"),
    [*((NOISE_GIVEN, n) for n in NOISE_SCHEDULERS), *((FLOW_DPM_GIVEN, n) for n in FLOW_SCHEDULERS)],
)
@pytest.mark.parametrize("snr", [None, 1.0])
def test_every_scheduler_that_can_be_named_ends_at_the_data(given, name: str, snr: float | None) -> None:
    """From pure noise, and from points of the data law noised to SNR 1."""
    scheduler = walker(given, name, 100)
    start = choose_start(scheduler, 100, snr=snr, strength=1.0 if snr is None else None)
    g = generator(0)
    clean = MEAN + STD * torch.randn(16, 1, 16, 16, generator=g)
    end = denoise(posterior_mean(scheduler), scheduler, clean, start, [generator(i) for i in range(16)])
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.1)
    assert float(end.std()) == pytest.approx(STD, rel=0.1)


@pytest.mark.parametrize(
    "name", ["EDMEulerScheduler", "CMStochasticIterativeScheduler", "SASolverScheduler", "Nonsense"]
)
def test_a_scheduler_for_other_models_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"generate\.scheduler={name} "):
        choose_scheduler(NOISE_GIVEN, name)


@pytest.mark.parametrize(("given", "name"), CASES)
def test_the_start_says_the_signal_and_the_noise_that_add_noise_makes(given, name: str) -> None:
    one, zero = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    for settings in ({"snr": 0.1}, {"snr": 3.0}, {"strength": 0.4}):
        scheduler = walker(given, name, 30)
        start = choose_start(scheduler, 30, **settings)
        level = grid_levels(scheduler)[start.index]
        a = add_noise(walker(given, name, 30), one, zero, start)
        b = add_noise(walker(given, name, 30), zero, one, start)
        assert float((a / b).square().mean()) == pytest.approx(start.snr, rel=1e-4)
        first = add_noise(scheduler, one, zero, start)
        t = scheduler.timesteps[start.index]
        seen = scheduler.scale_model_input(first, t) if hasattr(scheduler, "scale_model_input") else first
        assert float(seen.mean()) == pytest.approx(level.signal, rel=1e-4)
        total = level.signal + level.noise if "Flow" in type(given).__name__ or given is FLOW_DPM_GIVEN else None
        assert total is None or total == pytest.approx(1)
        assert total is not None or level.signal**2 + level.noise**2 == pytest.approx(1)


@pytest.mark.parametrize(("given", "name"), [c for c in CASES if c[0] in (FLOW_GIVEN, FLOW_DPM_GIVEN)])
def test_a_flow_is_noised_on_the_straight_line_and_told_1000_sigma(given, name: str) -> None:
    scheduler = walker(given, name, 7)
    start = choose_start(scheduler, 7, snr=0.5)
    sigma = float(scheduler.sigmas[start.index])
    assert start.snr == pytest.approx(((1 - sigma) / sigma) ** 2, rel=1e-5)
    x, noise = torch.randn(2, 3, 1, 2, 2, generator=generator(1))
    assert torch.allclose(add_noise(scheduler, x, noise, start), (1 - sigma) * x + sigma * noise, atol=1e-6)
    times = []
    scheduler = walker(given, name, 7)
    denoise(lambda x, t: times.append(float(t)) or x, scheduler, x, start, [], noise=noise)
    assert times == pytest.approx([1000 * float(s) for s in scheduler.sigmas[start.index : -1]], rel=1e-6)
    assert model_times(scheduler).tolist() == pytest.approx((1000 * scheduler.sigmas[:-1]).tolist(), rel=1e-6)


def test_a_scheduler_by_name_keeps_what_the_model_predicts() -> None:
    shifted = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for name in TO_FLOW[1:]:
        chosen = choose_scheduler(shifted, name)
        assert (chosen.config.prediction_type, chosen.config.flow_shift) == ("flow_prediction", 3.0)
        assert chosen.config.use_flow_sigmas
        back = choose_scheduler(chosen, "FlowMatchEulerDiscreteScheduler")
        assert (back.config.shift, back.config.num_train_timesteps) == (3.0, 1000)
    scaled = diffusers.DPMSolverMultistepScheduler(**SD, prediction_type="v_prediction", variance_type="learned_range")
    for name in TO_NOISE:
        chosen = choose_scheduler(scaled, name)
        assert (chosen.config.prediction_type, chosen.config.beta_end) == ("v_prediction", 0.012)
        assert not chosen.config.get("clip_sample")  # DDIM clips unless told not to
    assert choose_scheduler(scaled, "UniPCMultistepScheduler").config.get("use_flow_sigmas") is False
    assert choose_scheduler(scaled, "DDPMScheduler").config.variance_type == "fixed_small"
    assert choose_scheduler(scaled, None) is scaled
    for name in TO_NOISE:  # Heun's own betas are those of Stable Diffusion
        assert choose_scheduler(NOISE_GIVEN, name).config.beta_end == NOISE_GIVEN.config.beta_end


@pytest.mark.parametrize("given", [FLOW_GIVEN, FLOW_DPM_GIVEN])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_noise_schedulers_refuse_flows(given, name: str) -> None:
    message = f"scheduler={name} samples from models that predict noise, but this one predicts a flow .*set FlowMatch"
    with pytest.raises(InputError, match=message):
        choose_scheduler(given, name)


def test_flow_schedulers_refuse_noise() -> None:
    with pytest.raises(InputError, match=r"predicts noise \(DDIMScheduler\); set DDIMScheduler"):
        choose_scheduler(NOISE_GIVEN, "FlowMatchEulerDiscreteScheduler")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction", "sample"])
def test_what_a_model_output_means(kind: str) -> None:
    clean, noise = torch.randn(2, 5, generator=generator(2))
    scheduler = make("FlowMatchEulerDiscreteScheduler" if kind == "flow_prediction" else "DDIMScheduler")
    for level in grid_levels(scheduler)[5::10]:
        a, b = level.signal, level.noise
        out = {
            "epsilon": noise,
            "v_prediction": a * noise - b * clean,
            "flow_prediction": noise - clean,
            "sample": clean,
        }
        for got, wanted in zip(
            clean_and_noise(out[kind], a * clean + b * noise, level, kind), (clean, noise), strict=True
        ):
            assert torch.allclose(got, wanted, atol=2e-4)
    with pytest.raises(InputError, match="prediction_type='score' is not one of"):
        clean_and_noise(noise, clean, level, "score")


# --- what steers the walk -----------------------------------------------------------------------------------------


def test_guidance_in_an_interval_calls_the_model_once_elsewhere() -> None:
    scheduler = make("EulerDiscreteScheduler", steps=20)
    start = choose_start(scheduler, 20, snr=0.01)
    seen: list[int] = []

    def model(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return 0.1 * x * c.view(-1, 1, 1, 1)

    cond, null = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0])
    both, plain = guided(model, cond, null, 4.0), guided(model, cond, null, 1.0)
    x = torch.ones(2, 1, 2, 2)

    def walk(interval: tuple[float, ...]) -> torch.Tensor:
        seen.clear()
        fresh = make("EulerDiscreteScheduler", steps=20)
        steps = limited(both, plain, fresh, interval)
        return denoise(steps, fresh, x, start, [generator(0), generator(1)])

    snr = grid_snr(scheduler)
    inside = walk((0.05, 5.0))
    assert seen == [4 if 0.05 <= float(s) <= 5.0 else 2 for s in snr[start.index :]]
    assert {2, 4} == set(seen)
    everywhere = walk(())
    assert set(seen) == {4}
    assert torch.equal(everywhere, walk((0.0, float("inf"))))
    nowhere = walk((1e9, 1e10))
    assert set(seen) == {2}
    for a, b in ((inside, everywhere), (inside, nowhere)):
        assert not torch.allclose(a, b)


@pytest.mark.parametrize(("given", "name"), CASES)
def test_an_inverted_point_comes_back_and_no_random_number_is_used(given, name: str) -> None:
    points = MEAN + STD * torch.randn(3, 1, 4, 4, generator=generator(3))

    def there_and_back(steps: int, seed: int = 0) -> torch.Tensor:
        scheduler = walker(given, name, steps)
        assert not is_random(scheduler)
        start = choose_start(scheduler, steps, snr=0.05)
        predict = posterior_mean(scheduler)
        clean, noise = invert(predict, scheduler, points, start)
        return denoise(predict, scheduler, clean, start, [generator(seed, i) for i in range(3)], noise=noise)

    few, many = there_and_back(40), there_and_back(400)
    # of first order in the steps, whatever the order of the walk back
    assert (many - points).abs().max() < (few - points).abs().max() / 4
    assert torch.allclose(many, points, atol=0.03)
    assert torch.equal(few, there_and_back(40, seed=9))


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_inversion_calls_the_model_once_per_level(name: str) -> None:
    scheduler = walker(NOISE_GIVEN, name, 20)
    start = choose_start(scheduler, 20, snr=0.1)
    times: list[float] = []
    invert(lambda x, t: times.append(float(t)) or 0.1 * x, scheduler, torch.ones(1, 1, 2, 2), start)
    levels = sorted({float(t) for t in scheduler.timesteps[start.index :]})
    # the least noisy level sees the clean point, then its own; the start is where the walk back begins
    assert times == [levels[0], *levels[:-1]]


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EulerAncestralDiscreteScheduler(),
        diffusers.DDPMScheduler(),
        diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ],
)
def test_schedulers_that_draw_noise_are_known(scheduler) -> None:
    assert is_random(scheduler)


# without Heun, whose trapezoids overshoot the target where a coarse grid ends in long steps
@pytest.mark.parametrize(("given", "name"), [(g, n) for g, n in CASES if g is not FLOW_DPM_GIVEN and n[:4] != "Heun"])
def test_mode_guidance_pulls_towards_the_prototype(given, name: str) -> None:
    target = torch.full((2, 1, 8, 8), MEAN + 4 * STD)

    def distance(share: float, stop: float = 1.0) -> float:
        scheduler = walker(given, name, 20)
        start = choose_start(scheduler, 20, snr=0.02)
        steps = [posterior_mean(scheduler)] * len(scheduler.timesteps)
        steps = toward(steps, scheduler, start, target, share=share, stop=stop)
        out = denoise(steps, scheduler, target, start, [generator(4, i) for i in range(2)])
        return float((out - target).square().mean().sqrt())

    away = [distance(share) for share in (0.0, 0.1, 0.3, 0.6, 1.0)]
    assert all(a > b for a, b in itertools.pairwise(away))
    assert away[-1] < 1e-3
    assert distance(0.3, stop=0.0) == distance(0.0)
    assert distance(0.0) > distance(0.3, stop=0.5) > distance(0.3)


def test_no_mode_guidance_is_the_same_functions() -> None:
    scheduler = make("DDIMScheduler")
    start = choose_start(scheduler, 50, snr=0.1)
    steps = [lambda x, t: x] * 50
    assert toward(steps, scheduler, start, torch.ones(1), share=0.0, stop=0.5) == steps
    moved = toward(steps, scheduler, start, torch.ones(1), share=0.1, stop=0.5)
    changed = [i for i, (a, b) in enumerate(zip(steps, moved, strict=True)) if a is not b]
    assert changed == list(range(start.index, start.index + round(0.5 * start.calls)))


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("DDIMScheduler", 1001, "more than the 1000 steps that the model was trained for"),
        ("EulerDiscreteScheduler", 1001, "more than the 1000 steps that the model was trained for"),
        ("LCMScheduler", 60, "LCMScheduler has no grid of 60 steps"),  # 50 by its own settings
        ("DDIMScheduler", 1000, None),
        ("FlowMatchEulerDiscreteScheduler", 1001, None),  # its time is continuous
    ],
)
def test_numbers_of_steps_without_a_grid_are_refused(name: str, steps: int, message: str | None) -> None:
    scheduler = getattr(diffusers, name)()
    if message is None:
        assert len(fresh_scheduler(scheduler, steps).timesteps) == steps
        return
    with pytest.raises(InputError, match=message):
        fresh_scheduler(scheduler, steps)
