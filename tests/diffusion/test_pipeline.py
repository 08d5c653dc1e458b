from __future__ import annotations

import dataclasses
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler
from models import sd_pipe, tiny_dit, tiny_kl

from dq.config.schema import GenerateConfig, MethodConfig, RunConfig
from dq.core.errors import InputError
from dq.core.seeds import generator
from dq.diffusion.codec import decode_latents, to_unit
from dq.diffusion.sampling import choose_start, denoise
from dq.diffusion.time_grid import fresh_scheduler
from dq.run.distill import DistillPipeline

NAMES = ("red", "green", "blue")
DIT = GenerateConfig(mode="dit", num_inference_steps=6, guidance_scale=3.0)


def dit_pipe(**kwargs) -> DistillPipeline:
    scheduler = DDIMScheduler(clip_sample=False)
    pipe = DistillPipeline(vae=tiny_kl(), transformer=tiny_dit(**kwargs), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: DistillPipeline, config: GenerateConfig, rows: list[int], labels: list[int] | None = None
) -> torch.Tensor:
    z = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = labels or [r % 3 for r in rows]
    ids = pipe.check_inputs(config, 8, NAMES)
    seeds = [generator(0, "generate", r) for r in rows]
    return pipe.synthesize(z[rows], labels, seeds, config, class_names=NAMES, condition_ids=ids)


def test_decode_is_the_codec_alone() -> None:
    pipe = DistillPipeline(vae=tiny_kl())
    z = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = to_unit(decode_latents(pipe.vae, z[[1, 4]]))
    assert torch.equal(draw(pipe, GenerateConfig(mode="decode"), [1, 4]), expected)


@pytest.mark.parametrize("mode", ["decode", "dit", "img2img"])
def test_batch_is_single(mode: str, tmp_path: Path) -> None:
    pipe = {"decode": lambda: DistillPipeline(vae=tiny_kl()), "dit": dit_pipe, "img2img": lambda: sd_pipe(tmp_path)}[
        mode
    ]()
    config = dataclasses.replace(DIT, mode=mode)
    together = draw(pipe, config, [0, 1, 2, 3])
    assert together.shape == (4, 3, 8, 8)
    assert together.min() >= 0
    assert together.max() <= 1
    for r in (0, 3):
        assert torch.allclose(draw(pipe, config, [r])[0], together[r], atol=2e-5)
    assert (together[0] - together[3]).abs().max() > 1e-3  # same class, other prototype, other noise


@pytest.mark.parametrize("mode", ["dit", "img2img"])
def test_class_and_guidance_matter(mode: str, tmp_path: Path) -> None:
    pipe = dit_pipe() if mode == "dit" else sd_pipe(tmp_path)
    config = dataclasses.replace(DIT, mode=mode, guidance_scale=4.0)
    base = draw(pipe, config, [0], [0])
    assert (draw(pipe, config, [0], [1]) - base).abs().max() > 1e-6
    assert (draw(pipe, dataclasses.replace(config, guidance_scale=1.0), [0], [0]) - base).abs().max() > 1e-6


def test_null_class_is_the_last_row_of_this_models_table() -> None:
    """Guidance by hand against the pipeline, for three classes and for seven."""
    for classes in (3, 7):
        pipe = dit_pipe(classes=classes)
        config = dataclasses.replace(DIT, class_map={"red": "2", "green": "1", "blue": "0"})
        z = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        scheduler = fresh_scheduler(pipe.scheduler, 6)
        start = choose_start(scheduler, 6, snr=config.snr)

        def by_hand(x: torch.Tensor, t: torch.Tensor, pipe=pipe, classes=classes) -> torch.Tensor:
            time = t.expand(1)
            cond = pipe.transformer(x, timestep=time, class_labels=torch.tensor([2])).sample
            null = pipe.transformer(x, timestep=time, class_labels=torch.tensor([classes])).sample
            return null + 3.0 * (cond - null)

        latents = denoise(by_hand, scheduler, z[[0]], start, [generator(0, "generate", 0)])
        with torch.no_grad():
            expected = to_unit(decode_latents(pipe.vae, latents))
        assert torch.allclose(draw(pipe, config, [0], [0]), expected, atol=1e-5)


def test_learned_variance_is_dropped() -> None:
    pipe = dit_pipe(out_channels=8)
    assert draw(pipe, DIT, [0, 1]).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    "name",
    [
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "HeunDiscreteScheduler",
        "DDPMScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_schedulers_can_be_swapped(name: str) -> None:
    pipe = dit_pipe()
    before = dict(pipe.scheduler.config)
    config = dataclasses.replace(DIT, scheduler=name)
    assert torch.allclose(draw(pipe, config, [0, 4])[1], draw(pipe, config, [4])[0], atol=2e-5)
    assert dict(pipe.scheduler.config) == before


def test_flow_matching() -> None:
    pipe = dit_pipe()
    pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler())
    assert torch.isfinite(draw(pipe, DIT, [0, 1, 2])).all()
    # sigmas 1, 0.8002, 0.6004, ...: of the SNR 0.062 and 0.443 of the last two the logarithm of the first is nearer
    start = pipe.start(DIT)
    assert (start.index, start.calls) == (1, 5)
    assert start.snr == pytest.approx((0.1998 / 0.8002) ** 2, rel=1e-4)


FLOW = FlowMatchEulerDiscreteScheduler()


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_flow_model_walks_other_grids(name: str) -> None:
    pipe = dit_pipe()
    pipe.register_modules(scheduler=FLOW)
    config = dataclasses.replace(DIT, scheduler=name, num_inference_steps=60, guidance_scale=1.0, snr=0.5)
    other, own = draw(pipe, config, [0, 1]), draw(pipe, dataclasses.replace(config, scheduler=None), [0, 1])
    assert (other - own).abs().max() < 0.1 < (own[0] - own[1]).abs().max()  # the same ODE from nearly the same start
    with pytest.raises(InputError, match=r"scheduler=DDIMScheduler samples from models that predict noise"):
        pipe.check_inputs(dataclasses.replace(config, scheduler="DDIMScheduler"), 8, NAMES)


@pytest.mark.parametrize("mode", ["dit", "img2img"])
@pytest.mark.parametrize("flow", [False, True])
def test_the_knobs_change_the_image_and_their_defaults_do_not(mode: str, flow: bool, tmp_path: Path) -> None:
    pipe = dit_pipe() if mode == "dit" else sd_pipe(tmp_path)
    if flow:
        pipe.register_modules(scheduler=FLOW)
    config = dataclasses.replace(DIT, mode=mode)
    base = draw(pipe, config, [0, 4])
    for same in (
        {"guidance_interval": (0.0, float("inf"))},
        {"prototype_guidance": 0.0, "prototype_guidance_stop": 1.0},
        {"noise": "random"},
    ):
        assert torch.equal(draw(pipe, dataclasses.replace(config, **same), [0, 4]), base)
    for other in ({"guidance_interval": (0.2, 2.0)}, {"prototype_guidance": 0.3}, {"noise": "inversion"}):
        changed = draw(pipe, dataclasses.replace(config, **other), [0, 4])
        assert torch.isfinite(changed).all()
        assert (changed - base).abs().max() > 1e-6
        assert torch.allclose(draw(pipe, dataclasses.replace(config, **other), [4])[0], changed[1], atol=2e-5)


def test_inversion_needs_no_generator_and_brings_the_point_back() -> None:
    pipe = dit_pipe()
    z = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))[:2]
    config = dataclasses.replace(DIT, noise="inversion", guidance_scale=1.0, num_inference_steps=250, snr=2.0)

    def images(seed: int | None, **settings) -> torch.Tensor:
        made = [] if seed is None else [generator(seed, i) for i in range(2)]
        wanted = dataclasses.replace(config, **settings)
        return pipe.synthesize(z, [0, 1], made, wanted, class_names=NAMES, condition_ids=[0, 1, 2])

    assert torch.equal(images(1), images(2))
    assert torch.equal(images(1), images(None))
    with torch.no_grad():
        point = to_unit(decode_latents(pipe.vae, z))
    assert (images(1) - point).abs().max() < 0.05 < (images(1, noise="random") - point).abs().max()


def test_inversion_refuses_schedulers_that_draw_noise() -> None:
    config = dataclasses.replace(DIT, noise="inversion", scheduler="DDPMScheduler")
    with pytest.raises(InputError, match="noise=inversion is deterministic but DDPMScheduler draws noise"):
        dit_pipe().check_inputs(config, 8, NAMES)


def test_guidance_in_an_interval_saves_model_calls() -> None:
    pipe = dit_pipe()
    rows: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    draw(pipe, dataclasses.replace(DIT, num_inference_steps=20, guidance_interval=(0.5, 5.0)), [0, 1])
    assert set(rows) == {2, 4}
    assert rows.count(4) < rows.count(2)


def test_full_mode_guidance_ends_at_the_prototype() -> None:
    pipe = dit_pipe()
    z = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        point = to_unit(decode_latents(pipe.vae, z[[0, 4]]))
    images = draw(pipe, dataclasses.replace(DIT, prototype_guidance=1.0, prototype_guidance_stop=1.0), [0, 4])
    assert torch.allclose(images, point, atol=1e-3)


def test_half_precision_is_the_models_alone() -> None:
    """The walk between two model calls stays in float32."""
    pipe = dit_pipe()
    wanted = draw(pipe, DIT, [0, 1])
    pipe.transformer.to(torch.bfloat16)
    seen: set[torch.dtype] = set()
    pipe.transformer.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    full = dataclasses.replace(DIT, prototype_guidance=1.0, prototype_guidance_stop=1.0)
    z = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        point = to_unit(decode_latents(pipe.vae, z[[0, 1]]))
    assert (draw(pipe, DIT, [0, 1]) - wanted).abs().max() < 0.1
    assert (draw(pipe, full, [0, 1]) - point).abs().max() < 0.02
    assert seen == {torch.bfloat16}


def test_products_are_rounded_to_tf32_in_denoiser_and_text_encoder_only(tmp_path: Path) -> None:
    """k-means, views and the codec keep their bits, also in the process that draws."""
    for pipe, config in ((dit_pipe(), DIT), (sd_pipe(tmp_path), dataclasses.replace(DIT, mode="img2img"))):
        seen: dict[str, set[bool]] = {}

        def look(module: torch.nn.Module, args: object, seen: dict[str, set[bool]] = seen) -> None:
            seen.setdefault(type(module).__name__, set()).add(torch.backends.cuda.matmul.allow_tf32)

        networks = [m for m in (pipe.transformer, pipe.unet, pipe.text_encoder) if m is not None]
        for module in (*networks, pipe.vae.decoder):
            module.register_forward_pre_hook(look)
        draw(pipe, config, [0, 1])
        assert seen == {**{type(m).__name__: {True} for m in networks}, "Decoder": {False}}
        assert not torch.backends.cuda.matmul.allow_tf32


# --- loading and saving -------------------------------------------------------------------------------------------


def test_a_saved_dit_opens_in_stock_diffusers_and_back(tmp_path: Path) -> None:
    pipe = dit_pipe()
    pipe.register_to_config(id2label={str(i): n for i, n in enumerate(NAMES)})
    pipe.save_pretrained(tmp_path / "mine")
    stock = DiTPipeline.from_pretrained(tmp_path / "mine")
    stock.set_progress_bar_config(disable=True)
    assert stock.get_label_ids(["green"]) == [1]
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "mine")) is DiTPipeline
    images = stock(
        [1], num_inference_steps=2, guidance_scale=1.0, generator=torch.manual_seed(0), output_type="np"
    ).images
    assert images.shape == (1, 8, 8, 3)
    stock.save_pretrained(tmp_path / "stock")
    for folder in ("mine", "stock"):
        again = DistillPipeline.from_pretrained(tmp_path / folder)
        assert again.default_mode == "dit"
        assert torch.equal(draw(again, DIT, [0, 1]), draw(pipe, DIT, [0, 1]))
    assert again.digest("dit") == pipe.digest("dit")


def test_a_saved_stable_diffusion_opens_in_stock_diffusers_and_back(tmp_path: Path) -> None:
    pipe = sd_pipe(tmp_path / "tokens")
    pipe.save_pretrained(tmp_path / "mine")
    stock = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "mine", safety_checker=None)
    stock.save_pretrained(tmp_path / "stock")
    again = DistillPipeline.from_pretrained(tmp_path / "stock")
    config = dataclasses.replace(DIT, mode="img2img")
    assert torch.equal(draw(again, config, [0, 1]), draw(pipe, config, [0, 1]))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_image_to_image_equals_the_stock_pipeline(name: str, tmp_path: Path) -> None:
    pipe = sd_pipe(tmp_path)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    parts = {k: v for k, v in pipe.components.items() if k != "transformer"}
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    stock = diffusers.StableDiffusionImg2ImgPipeline(**parts, **extra)
    stock.set_progress_bar_config(disable=True)
    z = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    config = GenerateConfig(mode="img2img", num_inference_steps=10, snr=None, strength=0.7, guidance_scale=4.0)
    ours = pipe.synthesize(z, [0, 1, 2], [generator(i) for i in range(3)], config, class_names=NAMES)
    theirs = stock(
        prompt=list(NAMES),
        negative_prompt=[config.negative_prompt] * 3,
        image=z,
        strength=0.7,
        guidance_scale=4.0,
        num_inference_steps=10,
        generator=[generator(i) for i in range(3)],
        output_type="pt",
    ).images
    assert 255 * (ours - theirs).abs().max() < 1e-3  # 7e-5 measured


def test_a_codec_alone_and_from_pipe(tmp_path: Path) -> None:
    tiny_kl().save_pretrained(tmp_path / "vae")
    pipe = DistillPipeline.from_pretrained(tmp_path / "vae")
    assert pipe.default_mode == "decode"
    other = DistillPipeline.from_pipe(dit_pipe())
    assert other.transformer is not None


def test_missing_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no model folder no/such-model"):
        DistillPipeline.from_pretrained("no/such-model")
    (tmp_path / "x").mkdir()
    with pytest.raises(InputError, match=r"x has no config.json"):
        DistillPipeline.from_pretrained(tmp_path / "x")


# --- what does not fit --------------------------------------------------------------------------------------------


def test_a_codec_that_does_not_fit_the_denoiser() -> None:
    pipe = DistillPipeline(vae=tiny_kl(latent_channels=3), transformer=tiny_dit(), scheduler=DDIMScheduler())
    with pytest.raises(InputError, match=r"codec has 3 .*denoiser takes 4"):
        pipe.check_inputs(DIT, 8, NAMES)
    with pytest.raises(InputError, match=r"codec.resolution=16 gives 8x8 latents but the DiT takes 4x4"):
        dit_pipe().check_inputs(DIT, 16, NAMES)


def test_missing_parts() -> None:
    with pytest.raises(InputError, match=r"generate\.mode=dit needs a transformer"):
        DistillPipeline(vae=tiny_kl()).check_inputs(DIT, 8, NAMES)
    with pytest.raises(InputError, match=r"generate\.mode=img2img needs a unet"):
        dit_pipe().check_inputs(dataclasses.replace(DIT, mode="img2img"), 8, NAMES)
    with pytest.raises(InputError, match=r"generate\.scheduler=Foo is none that this model"):
        dit_pipe().start(dataclasses.replace(DIT, scheduler="Foo"))


def test_classes_are_matched_by_name_never_by_chance() -> None:
    pipe = dit_pipe(classes=4)
    pipe.register_to_config(id2label={"0": "sea, blue", "1": "red", "2": "gray", "3": "green"})
    assert pipe.condition_ids(NAMES) == [1, 3, 0]
    assert pipe.condition_ids(("a", "red"), {"a": "2"}) == [2, 1]
    assert pipe.condition_ids(("a",), {"a": "gray"}) == [2]
    with pytest.raises(InputError, match=r"4 classes.* 'cat'.*generate\.class_map"):
        pipe.condition_ids(("red", "cat"))
    with pytest.raises(InputError, match="lacks class 'a'"):
        pipe.condition_ids(("a",), {"a": "9"})
    with pytest.raises(InputError, match="lacks class 'red'"):
        dit_pipe(classes=4).condition_ids(NAMES)  # four unnamed classes are not these three
    assert dit_pipe(classes=3).condition_ids(NAMES) == [0, 1, 2]


def test_the_whole_story(tmp_path: Path, toy_source) -> None:
    pipe = dit_pipe()
    config = RunConfig(cache_dir=str(tmp_path / "cache"), generate=GenerateConfig(mode="dit"))

    def distil():
        return pipe.distill(
            toy_source,
            ipc=2,
            output_dir=tmp_path / "run",
            config=config,
            generate=GenerateConfig(mode="dit", num_inference_steps=4),
            method=MethodConfig(weights="mass"),
        )

    small = distil()
    assert len(small) == 6
    assert small.images.shape == (6, 3, 8, 8)
    assert small.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for c, n in enumerate((9, 8, 7)):
        own = small.labels == c
        assert small.counts[own].sum() == n
        assert torch.allclose(small.weights[own], 2 * small.counts[own] / n)
    assert torch.equal(distil().images, small.images)
