"""Sampling, codec and training of a denoiser on a CUDA device, against the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from gpu import float32_convolutions, needs_real_gpu
from models import tiny_dit, tiny_kl, toy_splits
from safetensors.torch import load_file
from small_prior import NAMES, encoded, interrupted_at_save, prior_in
from torch import Tensor

from dq.config.schema import GenerateConfig
from dq.core.processes import make_accelerator
from dq.core.seeds import generator
from dq.data.load import load_source
from dq.diffusion.codec import decode_latents, encode_latents, to_signed
from dq.diffusion.compiled import compile_codec, compile_denoiser
from dq.diffusion.generator import LatentGenerator
from dq.diffusion.prior.train_denoiser import train_denoiser
from dq.diffusion.sampling import FLOW_SCHEDULERS, NOISE_SCHEDULERS, dit_prediction

pytestmark = pytest.mark.gpu
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOW = {name: diffusers.FlowMatchEulerDiscreteScheduler() for name in FLOW_SCHEDULERS if "FlowMatch" in name}


def drawn(device: str, dtype: str, current: Any, n: int = 3, **changes: Any) -> Tensor:
    """Images of a tiny DiT, from noise and points that do not depend on the device."""
    pipe = LatentGenerator(vae=tiny_kl(), transformer=tiny_dit(), scheduler=current)
    pipe.to(device, DTYPES[dtype])
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    points = torch.randn(n, 4, 4, 4, generator=g)
    settings: dict[str, Any] = {"mode": "dit", "num_inference_steps": 6, "guidance_scale": 2.0, "batch_size": n}
    config = GenerateConfig(**{**settings, "snr": 0.1, **changes})
    seeds = [generator(0, "image", i) for i in range(n)]
    return pipe.synthesize(points, [0] * n, seeds, config, class_names=NAMES)


@pytest.mark.parametrize("name", [*NOISE_SCHEDULERS, *FLOW])
def test_every_scheduler_draws_what_the_cpu_draws(name: str) -> None:
    current = FLOW.get(name) or diffusers.DDIMScheduler(clip_sample=False)
    with float32_convolutions():
        cpu, gpu = (drawn(d, "float32", current, scheduler=name) for d in ("cpu", "cuda"))
    assert float(cpu.std()) > 0
    assert float((gpu - cpu).abs().max()) <= 2 / 255  # float32 products are TF32


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 1.0},
        {"guidance_interval": (0.05, 5.0)},
        {"prototype_guidance": 0.3},
        {"measure_guidance": 0.3},
        {"repulsion": 0.05},
        {"noise": "inversion"},
    ],
    ids=lambda c: next(iter(c)),
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_guidance_draws_what_the_cpu_draws(changes: dict[str, Any], dtype: str) -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    with float32_convolutions():
        cpu, gpu = (drawn(d, dtype, scheduler, **changes) for d in ("cpu", "cuda"))
    gap = (gpu - cpu).abs()
    if dtype == "float32":
        assert float(gap.max()) <= 2 / 255
    else:  # rounding to 8 bits at every layer, in another order
        assert float(gap.mean()) <= 0.02


def test_a_codec_in_bfloat16_decodes_nearly_the_same() -> None:
    x = (toy_splits()["train"][0][:8] * 255).to(torch.uint8)
    images = {}
    for name, dtype in DTYPES.items():
        codec = tiny_kl().to("cuda", dtype)
        with torch.no_grad():
            images[name] = decode_latents(codec, encode_latents(codec, to_signed(x.to("cuda")))).cpu()
    error = (images["bfloat16"] - images["float32"]).square().mean()
    assert 10 * torch.log10(4 / error) > 30  # dB, of a range of 2


def train(folder: Path, **denoiser: Any) -> Path:
    """Train a denoiser for three steps on the device; the folder of its transformer."""
    source = load_source(toy_splits(), class_names=list(NAMES))
    codec = tiny_kl().to("cuda")
    cache = encoded(source, folder / "cache", codec)
    settings = {"steps": 3, "save_every": 1, "batch_size": 8, "ema": (0.9,), "dtype": "float32"}
    prior = prior_in(folder / "prior", denoiser={**settings, **denoiser})
    return train_denoiser(cache, codec, prior, class_names=NAMES, accelerator=make_accelerator()) / "transformer"


@pytest.mark.slow  # samples are drawn at every save
def test_a_killed_training_of_a_denoiser_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole")
    with interrupted_at_save(monkeypatch, 2):
        train(tmp_path / "killed")
    resumed = train(tmp_path / "killed")
    first, second = (load_file(p / "diffusion_pytorch_model.safetensors") for p in (whole, resumed))
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-5)


@needs_real_gpu("compiled kernels")
def test_compiled_models_give_the_same_result() -> None:
    x = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0)).to("cuda")
    model, codec = tiny_dit().to("cuda"), tiny_kl().to("cuda")
    t, classes = torch.tensor(300, device="cuda"), torch.arange(6, device="cuda") % 3
    with torch.no_grad():
        before = dit_prediction(model)(x, t, classes), decode_latents(codec, x)
        assert compile_denoiser(model, (6,), min_gain=0.0)
        assert compile_codec(codec, "decoder", x.shape, min_gain=0.0)
        for n in (6, 5):
            torch.testing.assert_close(
                dit_prediction(model)(x[:n], t, classes[:n]), before[0][:n], rtol=1e-2, atol=1e-2
            )
            torch.testing.assert_close(decode_latents(codec, x[:n]), before[1][:n], rtol=1e-2, atol=1e-2)
