"""`compile: auto` of denoiser and codec: equal results, padded batches, nothing compiled for the last one."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from models import tiny_dc, tiny_dit, tiny_kl
from torch import Tensor

from dq.config.reader import to_dict
from dq.config.schema import CodecConfig, GenerateConfig
from dq.diffusion.codec import decode_latents, encode_latents
from dq.diffusion.compiled import compile_codec, compile_denoiser, compile_generator, denoiser_rows
from dq.diffusion.generator import LatentGenerator
from dq.diffusion.sampling import dit_prediction
from dq.run.folder import deciding


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def predicted(model: Any, n: int) -> Tensor:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, 4, 4, 4, generator=g)
    with torch.no_grad():
        return dit_prediction(model)(x, torch.tensor(300), torch.arange(n) % 3)


@pytest.mark.slow
def test_a_compiled_denoiser_predicts_the_same_and_compiles_once_per_size() -> None:
    backend, model, sizes = Counting(), tiny_dit(), (6, 3, 2, 5)
    expected = {n: predicted(model, n) for n in sizes}
    names = list(model.state_dict())
    assert compile_denoiser(model, (6, 3), backend=backend, min_gain=0.0)
    graphs = backend.graphs
    assert graphs >= 2  # one for each number of rows
    for n in sizes:
        torch.testing.assert_close(predicted(model, n), expected[n], rtol=1e-5, atol=1e-6)
    assert backend.graphs == graphs
    assert list(model.state_dict()) == names
    assert compile_denoiser(model, (6, 3), backend=backend, min_gain=0.0)  # it is already
    assert backend.graphs == graphs


@pytest.mark.parametrize("make", [pytest.param(tiny_kl, marks=pytest.mark.slow), tiny_dc])
def test_a_compiled_codec_gives_the_same_latents_and_images(make: Any) -> None:
    backend, codec = Counting(), make().eval().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    x, z = 2 * torch.rand(4, 3, 8, 8, generator=g) - 1, torch.randn(4, 4, 4, 4, generator=g)
    with torch.no_grad():
        latents, images = encode_latents(codec, x), decode_latents(codec, z)
    assert compile_codec(codec, "encoder", x.shape, backend=backend, min_gain=0.0)
    assert compile_codec(codec, "decoder", z.shape, backend=backend, min_gain=0.0)
    graphs = backend.graphs
    assert graphs >= 2
    for n in (4, 1, 3):
        with torch.inference_mode():  # as the encode stage
            torch.testing.assert_close(encode_latents(codec, x[:n]), latents[:n], rtol=1e-5, atol=1e-5)
        with torch.no_grad():  # as `synthesize`
            torch.testing.assert_close(decode_latents(codec, z[:n]), images[:n], rtol=1e-5, atol=1e-5)
    assert backend.graphs == graphs


def test_on_a_cpu_auto_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pipe = LatentGenerator(vae=tiny_kl(), transformer=tiny_dit())
    settings = GenerateConfig(mode="dit", compile="auto")
    with caplog.at_level(logging.INFO, "dq"):
        compile_generator(pipe, [settings], CodecConfig(resolution=8, compile="auto"))
    assert not any(m._compiled_call_impl for part in (pipe.vae, pipe.transformer) for m in part.modules())
    assert [r for r in caplog.records if r.name == "dq"] == []


def test_guidance_by_single_blocks_is_left_eager(caplog: pytest.LogCaptureFixture) -> None:
    pipe = LatentGenerator(vae=tiny_kl(), transformer=tiny_dit())
    with caplog.at_level(logging.INFO, "dq"):
        compile_generator(pipe, [GenerateConfig(mode="dit", compile="auto", internal_guidance=1.5)], CodecConfig())
    assert [r.getMessage() for r in caplog.records if r.name == "dq"] == [
        "compile: the denoiser is not compiled, as generate.internal_guidance reads its single blocks"
    ]


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"guidance_scale": 1.0}, (8,)),
        ({"guidance_scale": 2.0}, (16,)),
        ({"guidance_scale": 2.0, "guidance_interval": (0.1, 2.0)}, (16, 8)),
        ({"guidance_scale": 2.0, "repulsion": 0.1}, (8,)),
    ],
)
def test_rows_of_the_denoiser(settings: dict[str, Any], rows: tuple[int, ...]) -> None:
    assert denoiser_rows(GenerateConfig(mode="dit", batch_size=8, **settings)) == rows


def test_compilation_is_off_and_decides_no_result() -> None:
    assert (CodecConfig().compile, GenerateConfig().compile) == (None, None)
    for make in (CodecConfig, GenerateConfig):
        assert deciding(to_dict(make(compile="auto"))) == deciding(to_dict(make()))
