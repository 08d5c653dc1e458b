"""Denoiser, sampling and codec on a card. Needs diffusers; all weights are drawn at random on the card."""

from __future__ import annotations

import dataclasses
import functools
import io
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.utils import logging
from gpu_items_train import profile
from gpu_measure import Session, compare, difference, no_tf32
from PIL import Image
from torch import Tensor

from dq.config.schema import CodecConfig, GenerateConfig
from dq.core.seeds import generator
from dq.data.images import read_images
from dq.data.source import ImageSource, Split
from dq.diffusion.codec import decode_latents, encode_latents, latent_shape, to_signed
from dq.diffusion.compiled import compile_codec, compile_denoiser
from dq.diffusion.generator import LatentGenerator
from dq.diffusion.latents import encode_source, open_cache
from dq.diffusion.sampling import dit_prediction

logging.set_verbosity_error()  # of modules that stay in float32, of which these models have none

GUIDANCE = 4.0
Model = Any


def dit(s: Session, device: torch.device, dtype: torch.dtype = torch.float32, *, layers: int | None = None) -> Model:
    """DiT-XL/2 of 256 px with random weights, the same on every device."""
    heads, width, depth, side = s.size((16, 72, 28, 32), (2, 8, 2, 4))
    torch.manual_seed(s.seed)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width,
        in_channels=4,
        out_channels=8,
        num_layers=layers or depth,
        sample_size=side,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    for p in model.parameters():  # a fresh output layer would be zero
        torch.nn.init.normal_(p, std=0.02)
    return model.to(device, dtype).eval().requires_grad_(False)


def kl(s: Session, device: torch.device, dtype: torch.dtype = torch.float32) -> Model:
    """The autoencoder of Stable Diffusion with random weights."""
    torch.manual_seed(s.seed)
    channels = s.size((128, 256, 512, 512), (8, 16))
    model = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=s.size(2, 1),
        norm_num_groups=s.size(32, 4),
        latent_channels=4,
    )
    model = model.eval().requires_grad_(False)
    return model.to(device, dtype, memory_format=torch.channels_last)


# --- denoiser -----------------------------------------------------------------------------------------------------


def denoiser(s: Session) -> None:
    """Forwards of DiT-XL/2 with guidance by batch and dtype, and compiled."""
    parity = denoiser_parity(s)
    models = {name: dit(s, s.device, dtype) for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16))}
    compiled = dit(s, s.device, torch.bfloat16)
    for batch in s.size((32, 8, 64), (2,)):
        rows = 2 * batch  # both halves of classifier-free guidance
        ways: dict[str, Callable[[], Any]] = {
            "float32": _forward(s, models["float32"], rows, tf32=False),
            "float32 with TF32 products": _forward(s, models["float32"], rows),
            "bfloat16": _forward(s, models["bf16"], rows),
        }
        counted = dict(ways)
        if batch == s.size(32, 2):
            began = time.perf_counter()
            active = compile_denoiser(compiled, (rows,))
            numbers = {"active": active, "seconds_to_decide": time.perf_counter() - began}
            s.write("compile=auto of DiT-XL/2, bfloat16", numbers=numbers)
            if active:
                ways["bfloat16, compiled"] = _forward(s, compiled, rows)
                counted["bfloat16, compiled"] = counted["bfloat16"]
        compare(
            s, f"DiT-XL/2 forward of {batch} images with guidance", ways, units=batch, unit="image forward",
            against="float32", parity=parity, counted=counted, repeats=s.size(3, 1),
        )  # fmt: skip


def _forward(s: Session, model: Model, rows: int, *, tf32: bool = True) -> Callable[[], Tensor]:
    """A prediction of noise for `rows` latents; `dit_prediction` multiplies float32 in TF32."""
    side = model.config.sample_size
    x = torch.randn(rows, 4, side, side, generator=torch.Generator().manual_seed(s.seed)).to(s.device)
    t, classes = torch.tensor(500, device=s.device), (torch.arange(rows) % 1000).to(s.device)
    predict = dit_prediction(model)

    @torch.no_grad()
    def forward() -> Tensor:
        if tf32:
            return predict(x, t, classes)
        return model(x, timestep=t.expand(rows), class_labels=classes).sample[:, :4].float()

    return forward


def denoiser_parity(s: Session) -> dict[str, float]:
    """Predictions of a DiT of four blocks of XL's width, against float64 on the CPU."""
    layers, cpu = s.size(4, 2), torch.device("cpu")
    x = torch.randn(2, 4, *[s.size(32, 4)] * 2, generator=torch.Generator().manual_seed(s.seed))
    t, classes = torch.tensor([500, 500]), torch.tensor([1, 2])
    with torch.no_grad():
        model = dit(s, cpu, torch.float64, layers=layers)
        reference = model(x.double(), timestep=t, class_labels=classes).sample[:, :4]
    differences = {}
    for name, dtype in (("float32 with TF32", torch.float32), ("bfloat16", torch.bfloat16)):
        predict = dit_prediction(dit(s, s.device, dtype, layers=layers))
        with torch.no_grad():
            out = predict(x.to(s.device), t[0].to(s.device), classes.to(s.device))
        differences[f"{name} against float64 on the CPU"] = difference(out, reference)
    return differences


def sampling(s: Session) -> None:
    """Images per second of whole trajectories, against the stock pipeline in equal batches and class by class."""
    images, steps = s.size((64, 50), (4, 2))
    config = GenerateConfig(
        mode="dit", num_inference_steps=steps, snr=None, strength=1.0, guidance_scale=GUIDANCE, batch_size=images
    )
    ways: dict[str, Callable[[], Any]] = {}
    plans = [("bfloat16", torch.bfloat16, steps), ("float32", torch.float32, s.size(10, 2))]
    for name, dtype, few in plans:  # of float32 a part of the steps, which are equal in time
        ways = {}
        pipe = LatentGenerator(vae=kl(s, s.device, dtype), transformer=dit(s, s.device, dtype), scheduler=_ddim())
        stock = DiTPipeline(vae=pipe.vae, transformer=pipe.transformer, scheduler=_ddim())
        for p in (pipe, stock):
            p.set_progress_bar_config(disable=True)
        short = dataclasses.replace(config, num_inference_steps=few)
        ways["dq"] = functools.partial(_draw, s, pipe, short, images)
        ways["stock, equal batches"] = functools.partial(_draw_stock, s, stock, few, images, images)
        ways["stock, class by class"] = functools.partial(_draw_stock, s, stock, few, images, s.size(10, 2))
        group = f"{images} images of DiT-XL/2, {few} steps, guidance, {name}"
        compare(s, group, ways, units=images, unit="image", against="stock, equal batches", repeats=1)


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False)


def _draw(s: Session, pipe: LatentGenerator, config: GenerateConfig, images: int) -> Tensor:
    points = torch.zeros(images, 4, *[pipe.transformer.config.sample_size] * 2)
    seeds = [generator(s.seed, "gpu session", i) for i in range(images)]
    labels = [i % 10 for i in range(images)]
    return pipe.synthesize(points, labels, seeds, config, class_names=[str(c) for c in range(1000)])


def _draw_stock(s: Session, stock: DiTPipeline, steps: int, images: int, batch: int) -> None:
    for first in range(0, images, batch):
        labels = [i % 10 for i in range(first, min(images, first + batch))]
        g = torch.Generator().manual_seed(s.seed)
        stock(labels, guidance_scale=GUIDANCE, num_inference_steps=steps, generator=g, output_type="np")


# --- codec --------------------------------------------------------------------------------------------------------


def codec(s: Session) -> None:
    """Encoding and decoding by dtype, layout of memory and compilation."""
    side, encoded, decoded = s.size((256, 64, 16), (16, 2, 2))
    g = torch.Generator().manual_seed(s.seed)
    x = torch.randint(0, 256, (encoded, 3, side, side), dtype=torch.uint8, generator=g).to(s.device)
    models: dict[str, Model] = {
        "float32": kl(s, s.device),
        "bfloat16": kl(s, s.device, torch.bfloat16),
        "bfloat16, contiguous": kl(s, s.device, torch.bfloat16).to(memory_format=torch.contiguous_format),
    }
    parity = codec_parity(s)
    z = torch.randn(decoded, *latent_shape(models["float32"], side), generator=g).to(s.device)
    fast = kl(s, s.device, torch.bfloat16)
    active = {
        "encode": compile_codec(fast, "encoder", (encoded, 3, side, side)),
        "decode": compile_codec(fast, "decoder", tuple(z.shape)),
    }
    s.write("compile=auto of the codec of Stable Diffusion, bfloat16", numbers=active)
    for what, units in (("encode", encoded), ("decode", decoded)):
        run = _encode if what == "encode" else _decode
        data = x if what == "encode" else z
        ways = {name: functools.partial(run, model, data) for name, model in models.items()}
        counted: dict[str, Callable[[], Any]] = dict(ways)
        if active[what]:
            ways["bfloat16, compiled"] = functools.partial(run, fast, data)
            counted["bfloat16, compiled"] = ways["bfloat16"]
        group = f"codec of Stable Diffusion, {what} {units} images of {side} px"
        rows: dict[str, Any] = {"units": units, "unit": "image", "against": "float32", "parity": parity}
        compare(s, group, ways, **rows, counted=counted)


@torch.no_grad()
def _encode(model: Model, x: Tensor) -> Tensor:
    return encode_latents(model, to_signed(x))


@torch.no_grad()
def _decode(model: Model, z: Tensor) -> Tensor:
    return decode_latents(model, z)


def codec_parity(s: Session) -> dict[str, float]:
    """Latents of two images, against float64 on the CPU."""
    side = s.size(256, 16)
    x = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(s.seed))
    reference = _encode(kl(s, torch.device("cpu"), torch.float64), x)
    differences = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with no_tf32():
            z = _encode(kl(s, s.device, dtype), x.to(s.device))
        differences[f"{name} against float64 on the CPU"] = difference(z, reference)
    return differences


def encode_stage(s: Session) -> None:
    """The encode stage from JPEG files in memory to latents on the disk, against a loop over images in memory."""
    side, n = s.size((256, 2048), (16, 12))
    noise = np.random.default_rng(s.seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(s.size((500, 375), (40, 30)), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    split = Split(np.arange(n) % 2, lambda row: buffer.getvalue(), "train")
    source = ImageSource({"train": split}, ("a", "b"), f"gpu session {s.seed}", "noise")
    model = kl(s, s.device, torch.bfloat16)
    config = CodecConfig(resolution=side, dtype="bfloat16", batch_size=s.size(64, 4))
    images, _, _ = read_images(split, range(n), side, "crop")
    with tempfile.TemporaryDirectory() as folder:
        runs = iter(range(1000))

        def stage() -> float:
            cache = open_cache(f"{folder}/{next(runs)}", source, model, config, 0)
            return float(encode_source(source, model, cache, config, seed=0, main=False))

        def bare() -> None:
            for batch in images.split(config.batch_size):
                _encode(model, batch.to(s.device)).half().cpu()

        ways = {"stage": stage, "bare loop": bare}
        group = f"encode {n} images of {side} px, bfloat16"
        compare(s, group, ways, units=n, unit="image", against="bare loop", repeats=s.size(2, 1))


def profile_draw(s: Session) -> None:
    """Profiles of a forward of the denoiser and of encoding."""
    batch = s.size(32, 2)
    profile(s, "DiT-XL/2 in bfloat16", _forward(s, dit(s, s.device, torch.bfloat16), 2 * batch))
    side = s.size(256, 16)
    x = torch.zeros(s.size(64, 2), 3, side, side, dtype=torch.uint8, device=s.device)
    profile(s, "encoding in bfloat16", functools.partial(_encode, kl(s, s.device, torch.bfloat16), x))


if __name__ == "__main__":
    raise SystemExit("gpu_items_draw is a module of gpu_session.py; run that")
