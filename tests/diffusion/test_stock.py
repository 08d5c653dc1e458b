"""Sampling by class beside the stock `DiTPipeline`, and near-miss arguments of the call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from models import tiny_dit, tiny_kl

from dq.core.errors import InputError
from dq.core.seeds import generator
from dq.diffusion.class_sampling import ClassModel, sample_latents
from dq.diffusion.sampling import choose_start
from dq.diffusion.time_grid import fresh_scheduler
from dq.run.distill import DistillPipeline

SCHEDULERS = {
    "DDIM": DDIMScheduler(clip_sample=False),
    "DDIM trailing": DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "DPM-Solver++": DPMSolverMultistepScheduler(),
}


def generators(seeds: int | list[int]) -> torch.Generator | list[torch.Generator]:
    if isinstance(seeds, int):
        return torch.Generator().manual_seed(seeds)
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pipe_with(scheduler) -> DistillPipeline:
    # 1000 classes: the stock pipeline has the null class 1000 written into it
    pipe = DistillPipeline(vae=tiny_kl(), transformer=tiny_dit(classes=1000), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_pixels_equal_those_of_the_stock_pipeline(name: str, steps: int, guidance_scale: float) -> None:
    pipe = pipe_with(SCHEDULERS[name])
    stock = DiTPipeline(vae=pipe.vae, transformer=pipe.transformer, scheduler=SCHEDULERS[name])
    stock.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "np"}
    for seeds in (0, [0, 1, 2]):
        ours = pipe([7, 0, 999], generator=generators(seeds), **options).images
        theirs = stock([7, 0, 999], generator=generators(seeds), **options).images
        assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_schedulers_in_sigma_start_at_their_initial_deviation(cls, spacing: str) -> None:
    """The loop of Stable Diffusion's pipelines; `DiTPipeline` leaves `init_noise_sigma` out."""
    pipe = pipe_with(cls(timestep_spacing=spacing))
    scheduler = fresh_scheduler(pipe.scheduler, 4)
    x = scheduler.init_noise_sigma * torch.randn(1, 4, 4, 4, generator=generators(0))
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = pipe.transformer(
                scheduler.scale_model_input(x, t), timestep=t.expand(1), class_labels=torch.tensor([5])
            ).sample
            x = scheduler.step(out, t, x).prev_sample
    options = {"guidance_scale": 1.0, "num_inference_steps": 4}
    z = sample_latents(ClassModel(pipe.transformer, pipe.scheduler), [5], [generators(0)], **options)
    torch.testing.assert_close(z, x, atol=1e-5, rtol=1e-5)


def test_the_noise_of_many_images_is_drawn_at_once() -> None:
    pipe = pipe_with(DDIMScheduler(clip_sample=False))
    many = pipe(range(40), generator=generators(3), num_inference_steps=2, output_type="pt").images
    few = pipe(range(33), generator=generators(3), num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(many[:33], few, atol=1e-5, rtol=0)


def test_a_learned_variance_is_not_handed_to_the_models_own_scheduler() -> None:
    own = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    fixed = DDPMScheduler(clip_sample=False)
    transformer = tiny_dit(out_channels=8)

    def latents(scheduler) -> torch.Tensor:
        return sample_latents(
            ClassModel(transformer, scheduler), [1], [generator("test")], guidance_scale=2.0, num_inference_steps=3
        )

    assert torch.equal(latents(own), latents(fixed))
    assert own.config.variance_type == "learned_range"


def test_full_noise_and_predicted_noise_are_refused_with_the_reason() -> None:
    scheduler = DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pipe = pipe_with(scheduler)
    with pytest.raises(InputError, match=r"SNR of zero \(timestep 999\).* in any precision"):
        pipe([0], num_inference_steps=4)
    # what the message advises
    leading = DDIMScheduler.from_config(scheduler.config, timestep_spacing="leading")
    predicts_v = DDIMScheduler.from_config(scheduler.config, prediction_type="v_prediction")
    for other in (leading, predicts_v):
        pipe.scheduler = other
        assert torch.isfinite(pipe([0], num_inference_steps=4, output_type="pt").images).all()
    assert choose_start(fresh_scheduler(scheduler, 4), 4, strength=0.75).snr > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": "fig"}, "a class label is a whole number or a class name, not 'fig'"),
        ({"class_labels": [True]}, "a class label is a whole number or a class name, not True"),
        ({"class_labels": [1.0]}, "a class label is a whole number or a class name, not 1.0"),
        ({"class_labels": [1000]}, "this model has no class 1000; its classes are 0 to 999"),
        ({"num_inference_steps": 0}, "num_inference_steps is a whole number of at least 1, not 0"),
        ({"num_inference_steps": 2.0}, "num_inference_steps is a whole number of at least 1, not 2.0"),
        ({"num_inference_steps": "5"}, "num_inference_steps is a whole number of at least 1, not '5'"),
        ({"num_inference_steps": True}, "num_inference_steps is a whole number of at least 1, not True"),
        ({"guidance_scale": "4"}, "guidance_scale is a finite number, not '4'"),
        ({"image_size": 0}, "image_size is a whole number of at least 1, not 0"),
        ({"generator": 3}, "generator is a torch.Generator or a list of them, not int"),
        ({"generator": [3]}, "generator is a torch.Generator or a list of them, not list"),
        ({"generator": [torch.Generator()] * 2}, "there are 2 generators for 1 images"),
        ({"output_type": "latent"}, "output_type must be 'pil', 'np' or 'pt', not 'latent'"),
    ],
)
def test_near_miss_arguments_of_the_call_are_refused(arguments: dict, message: str) -> None:
    pipe = pipe_with(DDIMScheduler(clip_sample=False))
    with pytest.raises(InputError, match=message):
        pipe(**{"class_labels": [0], "num_inference_steps": 2, **arguments})


def test_one_label_no_label_and_no_scheduler() -> None:
    pipe = pipe_with(DDIMScheduler(clip_sample=False))
    pipe.register_to_config(id2label={"0": "fig", "1": "kiwi"})
    options = {"num_inference_steps": 2, "output_type": "pt"}
    expected = pipe([1], generator=generators(0), **options).images
    for one in (1, np.int64(1), torch.tensor(1), torch.tensor([1]), "kiwi", ["kiwi"], range(1, 2)):
        assert torch.equal(pipe(one, generator=generators(0), **options).images, expected)
    assert pipe([], **options).images.shape == (0, 3, 8, 8)
    assert pipe([], num_inference_steps=2).images == []
    assert isinstance(pipe(1, return_dict=False, **options), tuple)
    pipe.scheduler = None
    with pytest.raises(InputError, match="needs a scheduler"):
        pipe([1])
