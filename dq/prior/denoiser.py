"""Train a small class-conditional DiT on cached latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq.codec import codec_digest, decode_latents, to_unit
from dq.config import PriorConfig, to_dict
from dq.dist import derive_seed, digest_of, generator, write_json
from dq.errors import InputError
from dq.latents import LatentCache
from dq.prior.training import Recipe, finish, finished, fit, share
from dq.report import image_grid
from dq.sampling import fresh_scheduler, guided

MAX_BYTES = 8 << 30


def train_denoiser(
    cache: LatentCache, codec: Any, prior: PriorConfig, *, class_names: Sequence[str], accelerator: Any
) -> Path:
    """Train a `DiTTransformer2DModel` to predict the noise in latents (Peebles & Xie 2023; no learned variance), and
    save a stock pipeline folder, `prior.output_dir`, that `DiTPipeline` opens.

    Returns:
        The folder; at once if this very training is done.

    Raises:
        InputError: if the folder holds another training, or the latents do not fit in 8 GiB or the patch size.
    """
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    cfg, folder = prior.denoiser, Path(prior.output_dir)
    channels, side, _ = cache.shape
    classes = len(class_names)
    identity = [cache.key, codec_digest(codec), prior.seed, to_dict(cfg), list(class_names)]
    recipe = Recipe(
        "denoiser", folder, digest_of(identity), cfg.steps, cfg.lr, cfg.warmup_steps, cfg.weight_decay, cfg.ema,
        cfg.save_every, cfg.dtype,
    )  # fmt: skip
    if finished(recipe):
        return folder
    if side % cfg.patch_size:
        raise InputError(f"prior.denoiser.patch_size={cfg.patch_size} does not divide the latents' side {side}")
    shards = [cache.load(c)[0] for c in range(classes)]
    labels = torch.cat([torch.full((len(z),), c) for c, z in enumerate(shards)])
    latents = torch.cat(shards)
    if latents.numel() * 2 > MAX_BYTES:
        raise InputError(f"{len(latents)} latents of {cache.shape} do not fit in memory; train on a part of the data")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(prior.seed, "denoiser init"))
        model: Any = DiTTransformer2DModel(
            num_attention_heads=cfg.num_attention_heads,
            attention_head_dim=cfg.attention_head_dim,
            in_channels=channels,
            out_channels=channels,
            num_layers=cfg.num_layers,
            sample_size=side,
            patch_size=cfg.patch_size,
            num_embeds_ada_norm=classes,
        )
        _initialise(model)
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False
    )

    def loss(net: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        g = generator(prior.seed, "denoiser", step)
        rows, part = share(torch.randint(len(latents), (cfg.batch_size,), generator=g), accelerator)
        noise = torch.randn(cfg.batch_size, channels, side, side, generator=g)[part]
        t = torch.randint(1000, (cfg.batch_size,), generator=g)[part]
        dropped = (torch.rand(cfg.batch_size, generator=g) < cfg.dropout)[part]
        # the null class is the row after the last class
        y = torch.where(dropped, torch.full_like(labels[rows], classes), labels[rows])
        noisy = scheduler.add_noise(latents[rows].float(), noise, t)
        device = accelerator.device
        out = net(noisy.to(device), timestep=t.to(device), class_labels=y.to(device)).sample
        value = F.mse_loss(out.float(), noise.to(device))
        return value, {}

    def sample(net: nn.Module, step: int) -> dict[str, float]:
        shown, columns = min(classes, 20), 8
        device = accelerator.device
        y = torch.arange(shown).repeat_interleave(columns).to(device)
        x = torch.randn(len(y), channels, side, side, generator=generator(prior.seed, "samples")).to(device)
        walk = fresh_scheduler(scheduler, 25, device)
        predict = guided(
            lambda a, t, c: net(a, timestep=t.expand(len(a)), class_labels=c).sample,
            y,
            torch.full_like(y, classes),
            2.0,
        )
        for t in walk.timesteps:
            x = walk.step(predict(x, t), t, x).prev_sample
        images = (to_unit(decode_latents(codec, x)) * 255).round().to(torch.uint8).cpu()
        path = folder / "samples" / f"denoiser-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid([list(row) for row in images.split(columns)], scale=max(1, 48 // images.shape[-1])).save(path)
        return {}

    codec.to(accelerator.device)
    accelerator.wait_for_everyone()
    model = fit(recipe, model, loss, accelerator, sample=sample)
    if accelerator.is_main_process:
        model.cpu().save_pretrained(folder / "transformer")
        scheduler.save_pretrained(folder / "scheduler")
        if not (folder / "vae" / "config.json").is_file():
            codec.cpu().float().save_pretrained(folder / "vae")
        index = {
            "_class_name": "DiTPipeline",
            "_diffusers_version": model.config.get("_diffusers_version"),
            "id2label": {str(i): name for i, name in enumerate(class_names)},
            "scheduler": ["diffusers", "DDIMScheduler"],
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "vae": ["diffusers", type(codec).__name__],
        }
        write_json(folder / "model_index.json", index)
        finish(recipe, {"settings": to_dict(cfg)})
    accelerator.wait_for_everyone()
    return folder


def _initialise(model: Any) -> None:
    """What diffusers' DiT leaves out of the reference implementation."""
    for module in model.modules():
        if type(module).__name__ == "LabelEmbedding":
            # Every block would drop labels by itself, from the global generator; the loss drops them instead.
            module.dropout_prob = 0.0
    # adaLN-zero: modulation and output start at zero, so that every block starts as the identity
    for name, p in model.named_parameters():
        if ".norm1.linear." in name or name.startswith(("proj_out_1.", "proj_out_2.")):
            nn.init.zeros_(p)
