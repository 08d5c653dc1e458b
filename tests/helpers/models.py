"""Models of a few parameters and images of a few pixels, made in code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # not imported, so that tests without a diffusion model run where diffusers is missing
    from diffusers import AutoencoderDC

    from dq.run.distill import DistillPipeline


def tiny_kl(latent_channels: int = 4, seed: int = 0, **config):
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=latent_channels,
            norm_num_groups=4,
            layers_per_block=1,
            **config,
        ).eval()


def tiny_dit(
    classes: int = 3, in_channels: int = 4, out_channels: int | None = None, sample_size: int = 4, seed: int = 0
):
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=in_channels,
            out_channels=out_channels or in_channels,
            num_layers=2,
            sample_size=sample_size,
            patch_size=2,
            num_embeds_ada_norm=classes,
        ).eval()
        # the output layer of a fresh DiT need not depend on class or time; make it so
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        return model


def toy_splits():
    """Three classes of 8 px images that differ in color, 9 + 8 + 7 train and 4 test images each."""
    g = torch.Generator().manual_seed(0)

    def make(counts: list[int]):
        images, labels = [], []
        for c, n in enumerate(counts):
            base = torch.zeros(3, 1, 1)
            base[c] = 0.7
            images.append((base + 0.3 * torch.rand(n, 3, 8, 8, generator=g)).clamp(0, 1))
            labels += [c] * n
        return torch.cat(images), torch.tensor(labels)

    return {"train": make([9, 8, 7]), "test": make([4, 4, 4])}


def tiny_dc() -> AutoencoderDC:
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    return AutoencoderDC(
        latent_channels=4,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.5,
    ).eval()


def sd_pipe(folder: Path) -> DistillPipeline:
    """A Stable Diffusion pipeline of tiny parts, whose tokenizer files lie in `folder`."""
    import json

    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from dq.run.distill import DistillPipeline

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=4,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()
    words = (
        ["<|startoftext|>", "<|endoftext|>"]
        + [chr(c) for c in range(97, 123)]
        + [f"{chr(c)}</w>" for c in range(97, 123)]
    )
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).eval()
    pipe = DistillPipeline(
        vae=tiny_kl(),
        unet=unet,
        text_encoder=text,
        tokenizer=tokenizer,
        # stock Stable Diffusion insists on this offset and would change any other on loading
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
