"""Train a small `AutoencoderKL` on the images of a source."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq.codec import to_signed
from dq.config import CodecConfig, PriorConfig, SourceConfig, to_dict
from dq.data import ImageSource, read_images
from dq.dist import derive_seed, digest_of, generator
from dq.errors import InputError
from dq.prior.training import Recipe, finish, finished, fit, share
from dq.report import image_grid

MAX_BYTES = 8 << 30


def train_codec(
    source: ImageSource,
    source_config: SourceConfig,
    codec_config: CodecConfig,
    prior: PriorConfig,
    *,
    accelerator: Any,
) -> Path:
    """Train an autoencoder on the train split and save it as a stock folder, `<prior.output_dir>/vae`.

    Loss: mean absolute error + kl_weight * KL(posterior || N(0, 1)), per pixel. The scaling factor of the saved
    config is 1 / (standard deviation of the train latents), so that a denoiser sees unit variance; stock pipelines
    apply it by themselves. All images are held in memory as bytes.

    Returns:
        The folder; at once if this very training is done.

    Raises:
        InputError: if the folder holds another training, or the images do not fit in 8 GiB.
    """
    from diffusers import AutoencoderKL

    cfg, size = prior.codec, codec_config.resolution
    folder = Path(prior.output_dir)
    identity = [source.fingerprint, size, source_config.preprocess, prior.seed, to_dict(cfg)]
    recipe = Recipe(
        "codec", folder, digest_of(identity), cfg.steps, cfg.lr, 50, 0.0, cfg.ema, cfg.save_every, cfg.dtype
    )
    if finished(recipe):
        return folder / "vae"
    if len(source.train) * size * size * 3 > MAX_BYTES:
        raise InputError(
            f"{len(source.train)} images at {size} px do not fit in memory; train the codec on a part of them"
        )
    images = _all_images(source, source.train_name, source_config, size)
    held_out = images[:256]
    if source.test_name is not None:
        held_out = _all_images(source, source.test_name, source_config, size, limit=256)
    depth = len(cfg.block_out_channels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(prior.seed, "codec init"))
        model: Any = AutoencoderKL(
            block_out_channels=cfg.block_out_channels,
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            latent_channels=cfg.latent_channels,
            layers_per_block=cfg.layers_per_block,
            norm_num_groups=math.gcd(*cfg.block_out_channels, 32),
            sample_size=size,
            mid_block_add_attention=False,
        )

    def loss(net: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        g = generator(prior.seed, "codec", step)
        rows, part = share(torch.randint(len(images), (cfg.batch_size,), generator=g), accelerator)
        noise = torch.randn(cfg.batch_size, cfg.latent_channels, size >> (depth - 1), size >> (depth - 1), generator=g)
        x = to_signed(images[rows]).to(accelerator.device)
        out, posterior = _reconstruct(net, x, noise[part].to(x.device))
        reconstruction = F.l1_loss(out.float(), x)
        kl = posterior.kl().mean() / x[0].numel()
        total = reconstruction + cfg.kl_weight * kl
        return total, {"l1": float(reconstruction.detach()), "kl": float(kl.detach())}

    def sample(net: nn.Module, step: int) -> dict[str, float]:
        x = to_signed(held_out).to(accelerator.device)
        back = torch.cat([net(b).sample for b in x.split(64)]).float().clamp(-1, 1)
        psnr = -10 * ((back - x) / 2).square().mean((1, 2, 3)).clamp(min=1e-10).log10()
        shown = ((back[:12] * 0.5 + 0.5) * 255).round().to(torch.uint8).cpu()
        path = folder / "samples" / f"codec-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid([list(held_out[:12]), list(shown)], scale=max(1, 64 // size)).save(path)
        return {"psnr": float(psnr.mean())}

    accelerator.wait_for_everyone()
    model = fit(recipe, model, loss, accelerator, sample=sample)
    if accelerator.is_main_process:
        std = _latent_std(model, images)
        model.register_to_config(scaling_factor=1 / std)
        model.cpu().save_pretrained(folder / "vae")
        numbers = sample(model.to(accelerator.device), cfg.steps)
        finish(recipe, {"settings": to_dict(cfg), "latent_std": std, **numbers})
    accelerator.wait_for_everyone()
    return folder / "vae"


def _reconstruct(net: nn.Module, x: Tensor, noise: Tensor) -> tuple[Tensor, Any]:
    """Encode, sample with the given noise, decode, through `forward` so that wrapped models synchronise."""
    model: Any = getattr(net, "module", net)
    posterior = model.encode(x).latent_dist
    return model.decode(posterior.mean + posterior.std * noise).sample, posterior


def _all_images(source: ImageSource, split: str, config: SourceConfig, size: int, limit: int | None = None) -> Tensor:
    part = source.splits[split]
    rows = range(min(limit or len(part), len(part)))
    return read_images(part, rows, size, config.preprocess, on_bad=config.on_bad_image)[0]


@torch.no_grad()
def _latent_std(model: Any, images: Tensor) -> float:
    """Standard deviation of posterior means over at most 2,048 train images and all channels."""
    device = next(model.parameters()).device
    z = [model.encode(to_signed(b).to(device)).latent_dist.mode().float().cpu() for b in images[:2048].split(64)]
    return float(torch.cat(z).std())
