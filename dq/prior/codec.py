"""Train a small `AutoencoderKL` on the images of a source."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dq.codec import to_signed
from dq.config import CodecConfig, PriorConfig, SourceConfig, to_dict
from dq.data import ImageSource, Split, read_images
from dq.dist import atomic_path, generator
from dq.errors import InputError
from dq.prior.training import MAX_BYTES, Recipe, finished, fit, publish, seeded
from dq.report import image_grid

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import AutoencoderKL

HELD_OUT = 256  # images at most, for the PSNR
SHOWN = 12


def train_codec(
    source: ImageSource,
    source_config: SourceConfig,
    codec_config: CodecConfig,
    prior: PriorConfig,
    *,
    accelerator: Accelerator,
) -> Path:
    """Train an autoencoder on the train split and save it as a stock folder, `<prior.output_dir>/vae`.

    Per image, loss = mean (x - x')^2 + kl_weight * KL(posterior || N(0, 1)) / number of latent values. The scaling
    factor of the saved config is 1 / (standard deviation of the train latents), so that a denoiser sees unit
    variance. All train images are held in memory as bytes. Giving the same command again continues.

    Returns:
        The folder; at once if this very training is done.

    Raises:
        InputError: if the images exceed 8 GiB, or a setting does not fit the resolution.
        RunError: if the folder holds another training, or the loss is not finite.
    """
    settings, size, folder = prior.codec, codec_config.resolution, Path(prior.output_dir)
    recipe = Recipe(
        name="codec",
        folder=folder,
        product=folder / "vae",
        identity={
            "data": source.fingerprint,
            "resolution": size,
            "preprocess": source_config.preprocess,
            "on_bad_image": source_config.on_bad_image,
            "seed": prior.seed,
            **{k: v for k, v in to_dict(settings).items() if k != "save_every"},
        },
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        ema=settings.ema,
        save_every=settings.save_every,
        dtype=settings.dtype,
    )
    if finished(recipe):
        return recipe.product
    factor = 2 ** (len(settings.block_out_channels) - 1)
    if size % factor:
        raise InputError(
            f"codec.resolution={size} is not a multiple of {factor}, the downscaling factor of "
            f"{len(settings.block_out_channels)} levels in prior.codec.block_out_channels"
        )
    images, held_out = _images(source, source_config, size, prior.seed)
    model = new_codec(prior, size)
    objective = CodecLoss(model, settings.kl_weight)
    latent = (settings.batch_size, settings.latent_channels, size // factor, size // factor)

    def batch(step: int) -> dict[str, Tensor]:
        g = generator(prior.seed, "codec", step)
        rows = torch.randint(len(images), (settings.batch_size,), generator=g)
        return {"images": images[rows], "noise": torch.randn(latent, generator=g)}

    def on_save(step: int) -> dict[str, float]:
        back = reconstruct(model, held_out)
        path = folder / "samples" / f"codec-{step:06d}.png"
        shown = ((back[:SHOWN] * 0.5 + 0.5) * 255).round().to(torch.uint8)
        with atomic_path(path) as temporary:
            image_grid([list(held_out[:SHOWN]), list(shown)], scale=max(1, 64 // size)).save(temporary, "png")
        return {"psnr": psnr(back, to_signed(held_out))}

    fit(recipe, objective, batch, accelerator=accelerator, on_save=on_save)
    if accelerator.is_main_process:
        std = _latent_std(model, images)
        model.register_to_config(scaling_factor=1 / std)
        numbers = {"latent_std": std, "psnr": psnr(reconstruct(model, held_out), to_signed(held_out))}
        publish(recipe, model.save_pretrained, numbers)
    accelerator.wait_for_everyone()
    return recipe.product


class CodecLoss(nn.Module):
    """Reconstruction error and KL divergence per image."""

    def __init__(self, model: AutoencoderKL, kl_weight: float):
        super().__init__()
        self.model = model
        self.kl_weight = kl_weight

    def forward(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Terms (b,) for images (b, 3, H, W) uint8 and posterior noise (b, C, h, w)."""
        x = to_signed(images)
        posterior = self.model.encode(x).latent_dist
        out = self.model.decode(posterior.mean + posterior.std * noise).sample
        # What PSNR measures; absolute error came out the same on digits (37.5 and 37.6 dB, 300 steps, one seed).
        reconstruction = (out.float() - x).square().mean((1, 2, 3))
        kl = posterior.kl().float() / noise[0].numel()
        return {"loss": reconstruction + self.kl_weight * kl, "reconstruction": reconstruction, "kl": kl}


@torch.no_grad()
def reconstruct(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (n, 3, H, W) uint8 through the posterior mean and back, in [-1, 1], on the CPU."""
    device = next(model.parameters()).device
    parts = [model.decode(model.encode(to_signed(b).to(device)).latent_dist.mode()).sample for b in images.split(64)]
    return torch.cat(parts).float().clamp(-1, 1).cpu()


def psnr(x: Tensor, y: Tensor) -> float:
    """Mean over images (n, C, H, W) in [-1, 1] of -10 log10(mean ((x - y) / 2)^2), in dB."""
    return float((-10 * ((x - y) / 2).square().mean((1, 2, 3)).clamp(min=1e-10).log10()).mean())


def new_codec(prior: PriorConfig, size: int) -> AutoencoderKL:
    """The untrained autoencoder of these settings and this seed."""
    from diffusers import AutoencoderKL

    channels = prior.codec.block_out_channels
    with seeded(prior.seed, "codec", "init"):
        return AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            latent_channels=prior.codec.latent_channels,
            layers_per_block=prior.codec.layers_per_block,
            # several channels in each group, or the norm would take away what a channel says on average
            norm_num_groups=max(1, math.gcd(*channels) // 8),
            sample_size=size,
        )


def _images(source: ImageSource, config: SourceConfig, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images to train on and images held out, (n, 3, size, size) uint8: of the test split, else of train."""
    n = len(source.train)
    if n * 3 * size * size > MAX_BYTES:
        raise InputError(
            f"{n} train images of {size} px take {n * 3 * size * size / 2**30:.0f} GiB and training holds at most "
            f"{MAX_BYTES >> 30} GiB in memory; lower codec.resolution, or train on a part of {source.origin}"
        )

    def read(split: Split, rows: np.ndarray) -> Tensor:
        return read_images(split, rows, size, config.preprocess, on_bad=config.on_bad_image)[0]

    other = source.splits[source.test_name] if source.test_name is not None else source.train
    order = torch.randperm(len(other), generator=generator(seed, "held out")).numpy()
    if other is not source.train:
        images, held_out = read(source.train, np.arange(n)), read(other, order[:HELD_OUT])
    else:
        k = min(HELD_OUT, max(1, n // 10))
        images, held_out = read(source.train, np.sort(order[k:])), read(source.train, order[:k])
    if not len(images) or not len(held_out):
        raise InputError(
            f"{source.origin} has too few readable images to train on some and test on others; add images"
        )
    return images, held_out


@torch.no_grad()
def _latent_std(model: Any, images: Tensor) -> float:
    """Standard deviation of the posterior means of all images, over all their values."""
    device = next(model.parameters()).device
    count, total, squares = 0, 0.0, 0.0
    for b in images.split(64):
        z = model.encode(to_signed(b).to(device)).latent_dist.mode().double()
        count, total, squares = count + z.numel(), total + float(z.sum()), squares + float(z.square().sum())
    return math.sqrt(squares / count - (total / count) ** 2)
