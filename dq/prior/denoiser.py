"""Train a small class-conditional DiT on cached latents."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dq.codec import codec_digest, decode_latents, load_codec, to_unit
from dq.config import PriorConfig, to_dict
from dq.dist import atomic_path, generator, write_json
from dq.errors import InputError, RunError
from dq.latents import LatentCache
from dq.prior.training import MAX_BYTES, Recipe, finished, fit, publish, seeded
from dq.report import image_grid
from dq.sampling import fresh_scheduler, guided

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    from dq.codec import Codec

TIMESTEPS = 1000
SHOWN_CLASSES, SHOWN_COLUMNS, SHOWN_STEPS, SHOWN_GUIDANCE = 20, 8, 20, 2.0


def train_denoiser(
    cache: LatentCache,
    codec: Codec,
    prior: PriorConfig,
    *,
    class_names: Sequence[str],
    accelerator: Accelerator,
) -> Path:
    """Train a `DiTTransformer2DModel` on cached latents; `prior.output_dir` becomes a folder of a stock `DiTPipeline`.

    loss = mean (noise - model(sqrt(a_t) z + sqrt(1 - a_t) noise, t, y))^2 with the linear betas of DiT (Peebles & Xie
    2023) and without learned variances; y is the null class for a share `dropout` of the rows. All latents are held
    in memory as float16. Giving the same command again continues.

    Args:
        codec: the one that made the latents; saved beside the denoiser unless it is there already.

    Returns:
        The folder; at once if this very training is done.

    Raises:
        InputError: if the latents exceed 8 GiB, or classes or patches do not fit them.
        RunError: if the folder holds another training or another codec, or the loss is not finite.
    """
    import diffusers

    settings, folder = prior.denoiser, Path(prior.output_dir)
    recipe = Recipe(
        name="denoiser",
        folder=folder,
        product=folder / "transformer",
        identity={
            "latents": cache.key,
            "codec": codec_digest(codec),
            "classes": list(class_names),
            "seed": prior.seed,
            **{k: v for k, v in to_dict(settings).items() if k != "save_every"},
        },
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        ema=settings.ema,
        save_every=settings.save_every,
        dtype=settings.dtype,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
    )
    if finished(recipe):
        return folder
    _check_codec(folder / "vae", codec)
    classes, (channels, side, _) = len(class_names), cache.shape
    if classes != len(cache.class_names):
        raise InputError(
            f"there are {classes} class names but latents of {len(cache.class_names)} classes; give one each"
        )
    if side % settings.patch_size:
        raise InputError(f"prior.denoiser.patch_size={settings.patch_size} does not divide the latents' side {side}")
    latents, labels = _latents(cache)
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=TIMESTEPS, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False
    )
    model = new_denoiser(prior, cache.shape, classes)
    objective = DenoiserLoss(model, scheduler)

    def batch(step: int) -> dict[str, Tensor]:
        g = generator(prior.seed, "denoiser", step)
        b = settings.batch_size
        rows = torch.randint(len(latents), (b,), generator=g)
        dropped = torch.rand(b, generator=g) < settings.dropout
        return {
            "latents": latents[rows],
            "noise": torch.randn(b, channels, side, side, generator=g),
            "t": torch.randint(TIMESTEPS, (b,), generator=g),
            # the null class is the row after the last class
            "labels": torch.where(dropped, classes, labels[rows]),
        }

    def on_save(step: int) -> dict[str, float]:
        y = torch.arange(min(classes, SHOWN_CLASSES)).repeat_interleave(SHOWN_COLUMNS)
        noise = torch.randn(len(y), channels, side, side, generator=generator(prior.seed, "denoiser", "samples"))
        images = (to_unit(decode_latents(codec, _sample(model, scheduler, y, noise))) * 255).round().to(torch.uint8)
        rows = [list(row) for row in images.cpu().split(SHOWN_COLUMNS)]
        with atomic_path(folder / "samples" / f"denoiser-{step:06d}.png") as temporary:
            image_grid(rows, scale=max(1, 48 // images.shape[-1])).save(temporary, "png")
        return {}

    fit(recipe, objective, batch, accelerator=accelerator, on_save=on_save)
    if accelerator.is_main_process:
        if not (folder / "vae").exists():
            copy.deepcopy(codec).float().save_pretrained(folder / "vae")
        scheduler.save_pretrained(folder / "scheduler")
        index = {
            "_class_name": "DiTPipeline",
            "_diffusers_version": diffusers.__version__,
            "id2label": {str(i): name for i, name in enumerate(class_names)},
            "scheduler": ["diffusers", "DDIMScheduler"],
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "vae": ["diffusers", type(codec).__name__],
        }
        write_json(folder / "model_index.json", index)
        # last, because the denoiser's folder is what marks the training as done
        publish(recipe, model.save_pretrained, {})
    accelerator.wait_for_everyone()
    return folder


class DenoiserLoss(nn.Module):
    """Squared error of the predicted noise per latent."""

    def __init__(self, model: DiTTransformer2DModel, scheduler: DDIMScheduler):
        super().__init__()
        self.model = model
        self.scheduler = scheduler

    def forward(self, latents: Tensor, noise: Tensor, t: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Terms (b,) for latents and noise (b, C, h, w), timesteps (b,) and class ids (b,)."""
        noisy = self.scheduler.add_noise(latents.float(), noise, t)
        out = self.model(noisy, timestep=t, class_labels=labels).sample
        return {"loss": (out.float() - noise).square().mean((1, 2, 3))}


def new_denoiser(prior: PriorConfig, shape: tuple[int, int, int], classes: int) -> DiTTransformer2DModel:
    """The untrained DiT of these settings and this seed, for latents of `shape` (C, h, w)."""
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import LabelEmbedding

    with seeded(prior.seed, "denoiser", "init"):
        model = DiTTransformer2DModel(
            num_attention_heads=prior.denoiser.num_attention_heads,
            attention_head_dim=prior.denoiser.attention_head_dim,
            in_channels=shape[0],
            out_channels=shape[0],
            num_layers=prior.denoiser.num_layers,
            dropout=0.0,
            sample_size=shape[1],
            patch_size=prior.denoiser.patch_size,
            num_embeds_ada_norm=classes,
        )
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            # Each block would drop labels by itself, with draws from the global generator; the batch has them dropped.
            module.dropout_prob = 0.0
    # adaLN-zero, which diffusers leaves out: every block starts as the identity, and the output at zero
    for linear in [*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1, model.proj_out_2]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


def _latents(cache: LatentCache) -> tuple[Tensor, Tensor]:
    """All latents (n, C, h, w) float16 and their labels (n,) int64."""
    shards: list[Tensor] = []
    size = 0
    for c in range(len(cache.class_names)):
        shards.append(cache.load(c)[0])
        size += shards[-1].nbytes
        if size > MAX_BYTES:
            raise InputError(
                f"the latents in {cache.folder} exceed the {MAX_BYTES >> 30} GiB that training holds in memory; "
                "lower codec.resolution, or train on a part of the data"
            )
    counts = torch.tensor([len(z) for z in shards])
    return torch.cat(shards), torch.repeat_interleave(torch.arange(len(shards)), counts)


def _check_codec(path: Path, codec: Codec) -> None:
    if not path.exists():
        return
    # compared in the precision in which the caller holds it
    dtype = str(next(codec.parameters()).dtype).removeprefix("torch.")
    if codec_digest(load_codec(path, dtype=dtype)) != codec_digest(codec):
        raise RunError(
            f"{path} is not the codec that made these latents; "
            f"set codec.path={path}, or choose another prior.output_dir"
        )


def _sample(model: Any, scheduler: DDIMScheduler, labels: Tensor, noise: Tensor) -> Tensor:
    """Latents (n, C, h, w) of classes (n,), walked from noise by guided DDIM."""
    device = next(model.parameters()).device
    y, x = labels.to(device), noise.to(device)
    walk = fresh_scheduler(scheduler, SHOWN_STEPS, device)

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, timestep=t.expand(len(x)), class_labels=y).sample

    both = guided(predict, y, torch.full_like(y, model.config.num_embeds_ada_norm), SHOWN_GUIDANCE)
    for t in walk.timesteps:
        x = walk.step(both(x, t), t, x).prev_sample
    return x
