"""`compile: auto`: denoiser and codec compiled where a GPU shows the result equal and faster.

Batches are padded to full size, so that nothing is compiled again for the last one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dq.config.schema import CodecConfig, GenerateConfig
from dq.core.compilation import compile_if_faster, fix_rows, fixed_rows
from dq.core.plain import PlainDict
from dq.core.seeds import generator
from dq.diffusion.codec import Codec, latent_shape
from dq.diffusion.sampling import dit_prediction

log = logging.getLogger("dq")

Backend = str | Callable[..., Any]


def compile_generator(pipe: Any, configs: Sequence[GenerateConfig], codec: CodecConfig) -> None:
    """Compile what a `LatentGenerator` draws with, as its settings ask for.

    Not the denoiser with guidance by its own intermediate head, which reads the hidden states of single blocks.

    Args:
        pipe: the generator, on its device.
        configs: settings of all draws.
        codec: settings of the codec.
    """
    chosen = [c for c in configs if c.compile == "auto" and c.mode == "dit"]
    if any(c.internal_guidance != 1 for c in chosen):
        log.info("compile: the denoiser is not compiled, as generate.internal_guidance reads its single blocks")
    elif chosen:
        compile_denoiser(pipe.transformer, [n for c in chosen for n in denoiser_rows(c)])
    if configs and codec.compile == "auto":
        rows = max(c.batch_size for c in configs)
        compile_codec(pipe.vae, "decoder", (rows, *latent_shape(pipe.vae, codec.resolution)))


def denoiser_rows(config: GenerateConfig) -> tuple[int, ...]:
    """Rows of the batches that the DiT sees under some settings, largest first."""
    if config.together or config.guidance_scale <= 1:  # batches of a class go in chunks of that size
        return (config.batch_size,)
    return (2 * config.batch_size, *([config.batch_size] if config.guidance_interval else []))


def compile_denoiser(
    model: Any, rows: Sequence[int], *, backend: Backend = "inductor", min_gain: float | None = None
) -> bool:
    """Compile the repeated blocks of a DiT in place and fix its numbers of rows, if that is equal and faster.

    Args:
        model: a `DiTTransformer2DModel` on its device.
        rows: of the batches that it will see; smaller ones are padded.
        backend: of torch.compile.
        min_gain: see `compile_if_faster`; None: its default.

    Returns:
        Whether it is compiled. On a CPU it never is, unless `backend` is given.
    """
    device = next(model.parameters()).device
    if device.type == "cpu" and backend == "inductor":
        return False
    blocks = list(model.transformer_blocks)
    if blocks[0]._compiled_call_impl is not None:
        return True
    sizes, predict = sorted(set(rows)), dit_prediction(model)
    side, g = int(model.config.sample_size), generator("compile")
    x = torch.randn(max(sizes), int(model.config.in_channels), side, side, generator=g).to(device)
    classes = torch.arange(len(x), device=device) % (int(model.config.num_embeds_ada_norm) + 1)
    # in the middle of the schedule both signal and noise matter
    t = torch.tensor(500, device=device)

    @torch.no_grad()
    def call() -> Tensor:
        return torch.cat([predict(x[:n], t, classes[:n]) for n in sizes])

    options: PlainDict = {} if min_gain is None else {"min_gain": min_gain}
    with fixed_rows(model, sizes):
        active = compile_if_faster("the denoiser", blocks, call, device, dtype=model.dtype, backend=backend, **options)
    if active:
        fix_rows(model, sizes)
    return active


def compile_codec(
    codec: Codec,
    part: Literal["encoder", "decoder"],
    shape: Sequence[int],
    *,
    backend: Backend = "inductor",
    min_gain: float | None = None,
) -> bool:
    """Compile the encoder or decoder of a codec in place and fix its number of rows, if that is equal and faster.

    Args:
        codec: on its device.
        part: which.
        shape: (n, C, H, W) of a full batch: images for the encoder, latents for the decoder.
        backend: of torch.compile.
        min_gain: see `compile_if_faster`; None: its default.

    Returns:
        Whether it is compiled. On a CPU it never is, unless `backend` is given.
    """
    parameter, module = next(codec.parameters()), getattr(codec, part)
    if parameter.device.type == "cpu" and backend == "inductor":
        return False
    # parts and not the module itself, whose hooks, which pad its batches, would be compiled with it
    children = (m for c in module.children() for m in (c if isinstance(c, nn.ModuleList) else [c]))
    blocks = [m for m in children if any(m.children())]
    if not blocks or blocks[0]._compiled_call_impl is not None:
        return bool(blocks)
    x = torch.randn(*shape, generator=generator("compile"))
    x = x.clamp(-1, 1).to(parameter.device, parameter.dtype, memory_format=torch.channels_last)

    # as the stages call it: code is compiled again where a mode of autograd is another
    mode = torch.inference_mode if part == "encoder" else torch.no_grad

    @mode()
    def call() -> Tensor:
        return module(x)

    options: PlainDict = {} if min_gain is None else {"min_gain": min_gain}
    name = f"the {part} of the codec"
    active = compile_if_faster(name, blocks, call, parameter.device, dtype=parameter.dtype, backend=backend, **options)
    if active:
        fix_rows(module, (shape[0],))
    return active
