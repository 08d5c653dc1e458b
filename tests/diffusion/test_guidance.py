"""Guidance of a class by its prototypes: steps with known answers, and that nothing depends on batches."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ot
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from models import tiny_dit, tiny_kl

from dq.config.reader import from_dict
from dq.config.schema import GenerateConfig, RunConfig
from dq.core.errors import InputError, RunError
from dq.core.files import read_tensors
from dq.core.seeds import generator
from dq.core.sinkhorn import sinkhorn
from dq.diffusion.codec import decode_latents, to_unit
from dq.diffusion.guidance import in_chunks, measure_step, moved_by, repulsion_step, toward
from dq.diffusion.sampling import choose_start
from dq.diffusion.time_grid import fresh_scheduler
from dq.run.distill import DistillPipeline
from dq.run.folder import open_run
from dq.run.stages.cluster import cluster
from dq.run.stages.encode import cache_of, encode
from dq.run.stages.generate import generate

CONFIG = GenerateConfig(mode="dit", num_inference_steps=6, guidance_scale=3.0)
NAMES = ("red", "green", "blue")
G = torch.Generator().manual_seed(0)
X, POINTS = torch.randn(6, 2, 3, 3, generator=G), torch.randn(4, 2, 3, 3, generator=G)
MASSES = torch.tensor([0.4, 0.3, 0.2, 0.1])


def test_sinkhorn_is_that_of_pot_with_exact_columns() -> None:
    cost = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2], dtype=torch.float64)
    logs = {"log_a": a.log()[None, :, None], "log_b": MASSES.double().log()[None, None]}
    kernel = -cost / 0.05
    plans = sinkhorn(kernel, n_iter=5000, tol=1e-14, **logs)
    for plan, c in zip(plans, cost, strict=True):
        expected = ot.sinkhorn(
            a.numpy(), MASSES.double().numpy(), c.numpy(), 0.05,
            method="sinkhorn_log", numItermax=5000, stopThr=1e-9, warn=False,
        )  # fmt: skip
        assert torch.allclose(plan, torch.from_numpy(expected), atol=1e-8)
        assert torch.allclose(plan.sum(1), a, atol=1e-10)
    once, few = (sinkhorn(kernel, n_iter=n, **logs) for n in (1, 5))
    assert torch.allclose(few.sum(1), MASSES.double(), atol=1e-12)
    assert (few.sum(2) - a).abs().sum() < (once.sum(2) - a).abs().sum() / 2


def test_a_step_goes_to_the_barycentric_projection() -> None:
    step = measure_step(X, POINTS, MASSES, share=1.0, entropy=0.1, n_iter=5)
    cost = torch.cdist(X.flatten(1), POINTS.flatten(1)).square()
    kernel = -cost[None] / (0.1 * (cost.mean(0) @ MASSES))
    plan = sinkhorn(kernel, n_iter=5, log_a=-torch.tensor(6.0).log(), log_b=MASSES.log()[None, None])[0]
    target = (plan / plan.sum(1, keepdim=True)) @ POINTS.flatten(1)
    assert torch.allclose((X + step).flatten(1), target, atol=1e-5)
    half = measure_step(X, POINTS, MASSES, share=0.5, entropy=0.1, n_iter=5)
    assert torch.allclose(half, step / 2, atol=1e-6)
    # the same point twice with halves of its mass is one point
    twice, shares = POINTS[[0, 0, 1, 2, 3]], torch.tensor([0.2, 0.2, 0.3, 0.2, 0.1])
    assert torch.allclose(measure_step(X, twice, shares, share=1.0, entropy=0.1, n_iter=5), step, atol=1e-5)
    # every image near a point of its own stays with it; two at one point share the others' room
    near = POINTS + 0.01 * X[:4]
    step = measure_step(near, POINTS, torch.full((4,), 0.25), share=1.0, entropy=1e-3, n_iter=200)
    assert torch.allclose(near + step, POINTS, atol=1e-4)


def test_images_of_one_place_are_spread_over_the_points() -> None:
    """A pull of each image to the nearest point would leave all at one of them."""
    crowd = POINTS[:1] + 0.01 * torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(2))
    uniform = torch.full((4,), 0.25)
    moved = crowd + measure_step(crowd, POINTS, uniform, share=1.0, entropy=1e-4, n_iter=3000)
    nearest = torch.cdist(moved.flatten(1), POINTS.flatten(1)).argmin(1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3]
    weighed = crowd + measure_step(crowd, POINTS, MASSES, share=1.0, entropy=0.1, n_iter=50, image_masses=MASSES)
    assert torch.allclose((MASSES[:, None] * weighed.flatten(1)).sum(0), MASSES @ POINTS.flatten(1), atol=1e-3)


def test_repulsion_is_the_gradient_of_the_log_determinant() -> None:
    def volume(x: torch.Tensor) -> torch.Tensor:
        u = x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True)
        return -torch.logdet(u @ u.T + 0.1 * torch.eye(len(u), dtype=x.dtype))

    x = X.double().requires_grad_()
    (gradient,) = torch.autograd.grad(volume(x), x)
    scale = x.detach().flatten(1).square().sum(1).view(-1, 1, 1, 1)
    step = repulsion_step(x.detach(), rate=0.01, ridge=0.1)
    assert torch.allclose(step, -0.01 * scale * gradient, atol=1e-10)
    assert volume(x.detach() + step) < volume(x.detach())
    assert torch.allclose(
        repulsion_step(3 * X, rate=0.01, ridge=0.1), 3 * repulsion_step(X, rate=0.01, ridge=0.1), atol=1e-6
    )
    assert repulsion_step(X[:1], rate=1.0, ridge=0.1).abs().max() < 1e-5  # nothing to be kept apart from


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_any_prediction_is_moved_as_mode_guidance_moves_it(kind: str) -> None:
    given: Any = FlowMatchEulerDiscreteScheduler() if kind == "flow" else DDIMScheduler(prediction_type=kind)
    scheduler = fresh_scheduler(given, 10)
    start = choose_start(scheduler, 10, snr=0.05)
    plain = [lambda x, t: 0.3 * x + 0.1] * 10
    ours = moved_by(lambda clean: 0.4 * (POINTS - clean), plain, scheduler, start, (0.0, 0.5))
    theirs = toward(plain, scheduler, start, POINTS, share=0.4, stop=0.5)
    x = X[:4]
    moved = 0
    for i in range(10):
        a, b = ours[i](x, scheduler.timesteps[i]), theirs[i](x, scheduler.timesteps[i])
        assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))
        moved += ours[i] is not plain[i]
    assert moved == round(0.5 * start.calls)
    middle = moved_by(lambda clean: clean, plain, scheduler, start, (0.4, 0.8))
    stretch = [i for i in range(10) if middle[i] is not plain[i]]
    assert stretch == list(range(start.index + round(0.4 * start.calls), start.index + round(0.8 * start.calls)))


def test_a_model_in_chunks_is_the_model() -> None:
    sizes = []

    def model(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return x * t + c[:, None, None, None]

    condition = torch.arange(6)
    assert torch.equal(in_chunks(model, 4)(X, torch.tensor(2.0), condition), 2 * X + condition[:, None, None, None])
    assert sizes == [4, 2]


# --- in a pipeline ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe() -> DistillPipeline:
    return DistillPipeline(vae=tiny_kl(), transformer=tiny_dit(), scheduler=DDIMScheduler(clip_sample=False))


Z = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(3))


def drawn(pipe: DistillPipeline, rows: list[int], masses: torch.Tensor | None = None, **settings: Any) -> torch.Tensor:
    config = dataclasses.replace(CONFIG, **settings)
    seeds = [generator("image", i) for i in rows]
    options: dict[str, Any] = {"class_names": NAMES, "condition_ids": [0, 1, 2], "masses": masses}
    return pipe.synthesize(Z[rows], [1] * len(rows), seeds, config, **options)


BOTH = {"measure_guidance": 0.4, "measure_interval": (0.0, 1.0), "repulsion": 0.05, "repulsion_interval": (0.0, 1.0)}


def test_without_guidance_nothing_changes(pipe) -> None:
    every = list(range(5))
    plain = drawn(pipe, every)
    off = {"measure_interval": (0.0, 1.0), "measure_entropy": 0.5, "measure_iterations": 9, "repulsion_ridge": 0.3}
    assert torch.equal(drawn(pipe, every, torch.rand(5), **off), plain)
    for name in ("measure_guidance", "repulsion"):
        assert (drawn(pipe, every, **{**BOTH, name: 0.0}) - plain).abs().max() > 1e-4


def test_a_class_in_chunks_is_a_class_at_once_and_depends_on_all_of_it(pipe) -> None:
    every, masses = list(range(5)), torch.tensor([5.0, 4, 3, 2, 1])
    for weights in ("uniform", "mass"):
        at_once = drawn(pipe, every, masses, **BOTH, measure_weights=weights)
        for size in (1, 2, 4):
            in_parts = drawn(pipe, every, masses, **BOTH, measure_weights=weights, batch_size=size)
            assert torch.allclose(in_parts, at_once, atol=2e-5)
        order = [4, 2, 0, 1, 3]
        assert torch.allclose(
            drawn(pipe, order, masses[order], **BOTH, measure_weights=weights), at_once[order], atol=2e-5
        )
        assert (drawn(pipe, every[:4], masses[:4], **BOTH, measure_weights=weights) - at_once[:4]).abs().max() > 1e-4
    config = dataclasses.replace(CONFIG, **BOTH)
    with pytest.raises(InputError, match="images of one class"):
        pipe.synthesize(
            Z[:2], [0, 1], [generator(0), generator(1)], config, class_names=NAMES, condition_ids=[0, 1, 2]
        )


def test_full_guidance_ends_at_the_points(pipe) -> None:
    full = {
        "measure_guidance": 1.0,
        "measure_interval": (0.0, 1.0),
        "measure_entropy": 1e-3,
        "measure_iterations": 500,
    }
    images = drawn(pipe, list(range(5)), **full)
    with torch.no_grad():
        points = to_unit(decode_latents(pipe.vae, Z))
    distance = torch.cdist(images.flatten(1), points.flatten(1))
    assert distance.min(1).values.max() < 0.01
    assert sorted(distance.argmin(1).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["measure_interval", "repulsion_interval"])
def test_intervals_are_rising_shares(name: str) -> None:
    for wrong in ([0.5, 0.2], [0.1], [0.0, 1.2]):
        with pytest.raises(
            InputError, match=rf"{name} must be two rising shares|{name}\.1 must be a number in \[0, 1\], not 1\.2"
        ):
            from_dict(GenerateConfig, {name: wrong})


@pytest.mark.parametrize("settings", [{"repulsion": 1e30}, {"guidance_scale": 1e38}])
def test_guidance_that_breaks_the_walk_is_named(pipe, settings: dict[str, float]) -> None:
    (name,) = settings
    with pytest.raises(
        RunError, match=rf"ended in NaN or infinite latents; .* guide it less \(now .*generate\.{name}=1e"
    ):
        drawn(pipe, list(range(5)), **settings)


# --- in a run -----------------------------------------------------------------------------------------------------


def files(out: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in out.glob("run/images/*/*.safetensors")}


def test_a_class_is_a_unit_whatever_the_batch_and_a_killed_run_goes_on(
    tmp_path: Path, toy_source, accelerator, pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_of(name: str, batch_size: int, **more: Any):
        data = {
            "output_dir": str(tmp_path / name / "run"),
            "cache_dir": str(tmp_path / "cache"),
            "codec": {"resolution": 8},
            "generate": {
                "mode": "dit", "num_inference_steps": 3, "batch_size": batch_size, "images_per_prototype": 2,
                **{k: list(v) if isinstance(v, tuple) else v for k, v in BOTH.items()}, **more,
            },
            "ipc": [3],
        }  # fmt: skip
        run = open_run(from_dict(RunConfig, data), toy_source, accelerator)
        cluster(run, encode(run, pipe.vae))
        return run

    one = run_of("one", 16)
    generate(one, pipe, cache_of(one))
    small = run_of("small", 4)
    generate(small, pipe, cache_of(small))
    for a, b in zip(*(sorted((tmp_path / n).glob("run/images/*/class-*")) for n in ("one", "small")), strict=True):
        x, y = (read_tensors(f)[0]["images"].int() for f in (a, b))
        assert len(x) == 6
        assert (x - y).abs().max() <= 1
    plain = run_of("plain", 16, measure_guidance=0.0, repulsion=0.0)
    generate(plain, pipe, cache_of(plain))
    assert not set(files(tmp_path / "plain").values()) & set(files(tmp_path / "one").values())
    from dq.run.stages import generate as stage

    killed, write, calls = run_of("killed", 16), stage.write_tensors, []

    def stop(*arguments: Any) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(write(*arguments))

    monkeypatch.setattr(stage, "write_tensors", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(killed, pipe, cache_of(killed))
    monkeypatch.setattr(stage, "write_tensors", write)
    generate(killed, pipe, cache_of(killed))
    assert files(tmp_path / "killed") == files(tmp_path / "one")


def test_each_candidate_of_a_class_is_guided_among_its_likes(tmp_path: Path, toy_source, accelerator, pipe) -> None:
    from dq.run.stages.cluster import prototype_folder
    from dq.run.stages.generate import Draw, _generated

    data = {
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
        "codec": {"resolution": 8},
        "generate": {"mode": "dit", "num_inference_steps": 3, "measure_guidance": 0.5, "measure_interval": [0, 1]},
        "ipc": [3],
    }
    run = open_run(from_dict(RunConfig, data), toy_source, accelerator)
    cluster(run, encode(run, pipe.vae))
    resolved = run.resolved("ddoq")
    points = prototype_folder(run, cache_of(run), 3, resolved)
    ids = pipe.check_inputs(resolved.generate, 8, run.source.class_names)

    def stretches(candidates: int) -> list[torch.Tensor]:
        config = dataclasses.replace(resolved.generate, candidates=candidates)
        selector: Any = object() if candidates > 1 else None
        draw = Draw(run, tmp_path / "drawn", points, resolved.method, config, ids, selector)
        assert [len(piece) for _, piece, _ in draw.units] == [3] * 3 * candidates
        units = [(draw, unit) for unit in draw.units]
        return [images for _, unit, images in _generated(pipe, units) if unit[0] == 1]

    one, three = stretches(1), stretches(3)
    assert torch.equal(one[0], three[0])
    assert not torch.equal(three[1], three[0])
    assert torch.equal(stretches(2)[1], three[1])
