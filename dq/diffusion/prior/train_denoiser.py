"""Train or fine-tune a class-conditional DiT on cached latents."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dq.config.dtypes import resolve_dtypes
from dq.config.prior import PriorConfig
from dq.core.errors import InputError, RunError
from dq.core.files import atomic_path, write_json
from dq.core.model_files import open_model
from dq.core.plain import PlainDict
from dq.core.seeds import generator
from dq.data.grid import image_grid
from dq.diffusion.codec import DTYPES, Codec, codec_digest, decode_latents, load_codec, normalized, to_unit
from dq.diffusion.latents import LatentCache
from dq.diffusion.loading import cast
from dq.diffusion.prior.denoiser_data import (
    DenoiserData,
    channel_statistics,
    held_out_batch,
    load_data,
    training_batch,
)
from dq.diffusion.prior.denoiser_loss import DenoiserLoss, new_scheduler, time_shift
from dq.diffusion.prior.denoiser_recipe import denoiser_recipe, no_pipeline, open_denoiser
from dq.diffusion.prior.recipe import Recipe, finished, publish
from dq.diffusion.prior.training import fit, seeded
from dq.diffusion.sampling import choose_start, denoise, dit_prediction, guided, null_class
from dq.diffusion.time_grid import fresh_scheduler
from dq.diffusion.weaker_models import new_head, save_early, save_head

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiTTransformer2DModel

SHOWN_CLASSES, SHOWN_COLUMNS, SHOWN_STEPS, SHOWN_GUIDANCE = 20, 8, 20, 2.0
# layers, heads, width of a head. S to XL are those of Peebles & Xie (2023, table 1).
SIZES: dict[str, tuple[int, int, int]] = {
    "3M": (4, 3, 64), "8M": (6, 4, 64), "18M": (6, 6, 64),
    "S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72),
}  # fmt: skip


def train_denoiser(
    cache: LatentCache,
    codec: Codec,
    prior: PriorConfig,
    *,
    class_names: Sequence[str],
    accelerator: Accelerator,
    flipped: LatentCache | None = None,
) -> Path:
    """Train a `DiTTransformer2DModel` on cached latents, saved as `DiTPipeline`.

    The latents are normalized to mean 0 and deviation 1 in every channel, and the codec saved beside the denoiser is
    one that gives such latents (`normalized`); fine-tuning keeps the codec that the checkpoint was trained with. The
    class is the null class for a share `dropout` of the rows. All latents are held in memory as float16. Giving the
    same command again continues. The held-out loss is that of unflipped images at unshifted noise levels without the
    contrastive term, so that it compares trainings of different options.

    `codec` made the latents, and is saved beside the denoiser unless one exists. `flipped` holds latents of the
    mirrored images, for `prior.denoiser.flip`.

    Returns:
        The folder `prior.output_dir`; at once if this very training is done.

    Raises:
        InputError: if the latents exceed 8 GiB, or classes or patches do not fit them, or the checkpoint to start from
            is one for another codec, other classes or another size of latents, or mirrored images are not given where
            `flip` needs them.
        RunError: if the folder holds another training or another codec, or the loss is not finite.
    """
    folder = Path(prior.output_dir)
    recipe = denoiser_recipe(cache.key, codec, prior, class_names, accelerator)
    settings = resolve_dtypes(prior.denoiser, recipe.auto or {})
    if finished(recipe):
        return folder
    classes = len(class_names)
    if classes != len(cache.class_names):
        raise InputError(
            f"there are {classes} class names but latents of {len(cache.class_names)} classes; give one each"
        )
    if settings.flip and flipped is None:
        raise InputError("prior.denoiser.flip=true needs the latents of the mirrored images; give them as `flipped`")
    data = load_data(cache, flipped if settings.flip else None, held_out=settings.held_out, seed=prior.seed)
    # a checkpoint was trained on the latents of its codec, whatever their scale in these data
    is_normalized = settings.normalize == "channel" and settings.init is None
    mean, std = channel_statistics(data.latents) if is_normalized else (data.mean, data.std)
    saved_codec = _codec_to_save(folder / "vae", codec, mean, std)
    if saved_codec is not codec:  # else its latents are normal already
        data = dataclasses.replace(data, mean=mean, std=std)
    model = new_denoiser(prior, cache.shape, classes, codec=saved_codec)
    shift = time_shift(settings.time_shift, cache.shape)
    scheduler = new_scheduler(settings.objective, shift)
    head = new_head(model) if settings.intermediate_head else None
    options: PlainDict = {"contrastive": settings.contrastive, "head_weight": settings.intermediate_head}
    objective = DenoiserLoss(model, settings.objective, settings.weighting, head=head, **options)
    dtype = DTYPES[settings.save_dtype]

    def batch(step: int) -> dict[str, Tensor]:
        return training_batch(data, settings, step, seed=prior.seed, shift=shift)

    def score() -> float:
        return _held_out_loss(objective, held_out_batch(data, prior.seed), settings.batch_size, accelerator.device)

    def on_save(step: int) -> dict[str, float]:
        if step in recipe.extra_saves:
            save_early(model, folder, dtype, recipe.digest)
        saved_codec.to(accelerator.device)
        file = folder / "samples" / f"denoiser-{step:06d}.png"
        _save_samples(file, model, saved_codec, scheduler, classes=classes, seed=prior.seed)
        return {}

    fitted = fit(
        recipe,
        objective,
        batch,
        accelerator=accelerator,
        on_save=on_save,
        save=model.save_pretrained,
        score=score if len(data.held_out_rows) else None,
    )
    if accelerator.is_main_process:
        _write_stock_parts(recipe, saved_codec, scheduler, class_names)
        if head is not None:
            save_head(head, folder, dtype, recipe.digest)
        # last, because the denoiser's folder is what marks the training as done
        saved = cast(copy.deepcopy(model), dtype)
        publish(recipe, saved.save_pretrained, _numbers(model, data), fitted, accelerator)
    accelerator.wait_for_everyone()
    return folder


def _numbers(model: nn.Module, data: DenoiserData) -> PlainDict:
    """Sizes and latent statistics for the record of a training."""
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_images": len(data.train_rows),
        "held_out_images": len(data.held_out_rows),
        "channel_mean": data.mean.tolist(),
        "channel_std": data.std.tolist(),
    }


def _held_out_loss(objective: nn.Module, batch: dict[str, Tensor], size: int, device: torch.device) -> float:
    """Unweighted loss per latent, computed in parts of `size` rows."""
    parts = zip(*(v.split(size) for v in batch.values()), strict=True)
    named = ({k: v.to(device) for k, v in zip(batch, part, strict=True)} for part in parts)
    return sum(float(objective(**part)["error"].sum()) for part in named) / len(batch["latents"])


def _save_samples(file: Path, model: Any, codec: Codec, scheduler: object, *, classes: int, seed: int) -> None:
    """Write a grid of samples, one row per class.

    The noise is the same at every step.
    """
    channels, side = int(model.config.in_channels), int(model.config.sample_size)
    y = torch.arange(min(classes, SHOWN_CLASSES)).repeat_interleave(SHOWN_COLUMNS)
    noise = torch.randn(len(y), channels, side, side, generator=generator(seed, "denoiser", "samples"))
    images = (to_unit(decode_latents(codec, _sample(model, scheduler, y, noise))) * 255).round().to(torch.uint8)
    rows = [list(row) for row in images.cpu().split(SHOWN_COLUMNS)]
    with atomic_path(file) as temporary:
        image_grid(rows, scale=max(1, 48 // images.shape[-1])).save(temporary, "png")


def _write_stock_parts(recipe: Recipe, codec: Codec, scheduler: Any, class_names: Sequence[str]) -> None:
    """Write codec, scheduler and index of a stock `DiTPipeline`."""
    import diffusers

    folder = recipe.folder
    if not (folder / "vae").exists():
        complete = recipe.scratch / "vae"
        copy.deepcopy(codec).float().save_pretrained(complete)
        os.replace(complete, folder / "vae")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "id2label": {str(i): name for i, name in enumerate(class_names)},
        "scheduler": ["diffusers", type(scheduler).__name__],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", type(codec).__name__],
    }
    write_json(folder / "model_index.json", index, checksum=False)


def new_denoiser(
    prior: PriorConfig, shape: tuple[int, int, int], classes: int, *, codec: Codec | None = None
) -> DiTTransformer2DModel:
    """The initial DiT for latents of `shape` (C, h, w).

    `codec` makes the latents; a checkpoint to start from must come with the same.
    """
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import LabelEmbedding

    settings = prior.denoiser
    if settings.init is not None:
        model = _load_denoiser(prior, shape, classes, codec)
    else:
        layers, heads, width = settings.num_layers, settings.num_attention_heads, settings.attention_head_dim
        if settings.size is not None:
            layers, heads, width = SIZES[settings.size]
        check_denoiser(prior, shape, classes, codec)
        with seeded(prior.seed, "denoiser", "init"):
            model = DiTTransformer2DModel(
                num_attention_heads=heads,
                attention_head_dim=width,
                in_channels=shape[0],
                out_channels=shape[0],
                num_layers=layers,
                dropout=0.0,
                sample_size=shape[1],
                patch_size=settings.patch_size,
                num_embeds_ada_norm=classes,
            )
        # adaLN-zero, which diffusers leaves out: every block starts as the identity, and the output at zero
        blocks = [block.norm1.linear for block in model.transformer_blocks]
        for linear in [*blocks, model.proj_out_1, model.proj_out_2]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            # Each block would drop labels by itself, with draws from the global generator; the batch has them dropped.
            module.dropout_prob = 0.0
    return model


def check_denoiser(prior: PriorConfig, shape: tuple[int, int, int], classes: int, codec: Codec | None = None) -> None:
    """Check that a denoiser fits latents of `shape` (C, h, w).

    Raises:
        InputError: for a patch that does not divide the latents, or a checkpoint that does not fit.
    """
    if prior.denoiser.init is not None:
        _load_denoiser(prior, shape, classes, codec)
    elif shape[1] % prior.denoiser.patch_size:
        raise InputError(
            f"prior.denoiser.patch_size={prior.denoiser.patch_size} does not divide the latents' side {shape[1]}"
        )


def _load_denoiser(
    prior: PriorConfig, shape: tuple[int, int, int], classes: int, codec: Codec | None
) -> DiTTransformer2DModel:
    """The DiT of `prior.denoiser.init`, with new label tables if requested.

    Raises:
        InputError: if it is none, or was trained for another codec, objective, number of classes or size of latents.
    """
    from diffusers import DDIMScheduler
    from diffusers.models.embeddings import LabelEmbedding

    settings, path = prior.denoiser, str(prior.denoiser.init)
    try:
        files = open_model(path)
        # of whatever class
        steps = DDIMScheduler.load_config(path, subfolder="scheduler", **files.options)
        # compared in the precision in which the caller holds it
        dtype = "float32" if codec is None else str(next(codec.parameters()).dtype).removeprefix("torch.")
        checkpoint_codec = load_codec(path, subfolder="vae", dtype=dtype, files=files)
    except (OSError, ValueError, InputError) as e:
        raise no_pipeline(path, e) from e
    model = open_denoiser(path)
    flow = "FlowMatch" in steps["_class_name"] or bool(steps.get("use_flow_sigmas"))
    c = model.config
    if (c.in_channels, c.sample_size) != shape[:2]:
        raise InputError(
            f"{path} takes latents of {c.in_channels}x{c.sample_size}x{c.sample_size} but the data's are "
            f"{'x'.join(map(str, shape))}; change codec.resolution, or choose another prior.denoiser.init"
        )
    if codec is not None and codec_digest(checkpoint_codec) != codec_digest(codec):
        raise InputError(f"{path} was trained with another codec than the one of these latents; set codec.path={path}")
    if flow != (settings.objective == "flow"):
        raise InputError(
            f"{path} was trained for {'flow matching' if flow else 'noise prediction'}; "
            f"set prior.denoiser.objective={'flow' if flow else 'noise'}"
        )
    if settings.new_classes:
        tables = [m for m in model.modules() if isinstance(m, LabelEmbedding)]
        with seeded(prior.seed, "denoiser", "classes"):
            for table in tables:
                old = table.embedding_table
                table.embedding_table = nn.Embedding(classes + 1, old.embedding_dim)
                with torch.no_grad():
                    # all classes start as the null class did
                    table.embedding_table.weight.copy_(old.weight[-1].expand(classes + 1, -1))
                table.num_classes = classes
        model.register_to_config(num_embeds_ada_norm=classes)
    elif c.num_embeds_ada_norm != classes:
        raise InputError(
            f"{path} knows {c.num_embeds_ada_norm} classes but the data has {classes}; "
            "set prior.denoiser.new_classes=true to learn them again"
        )
    return model.train()


def _codec_to_save(path: Path, codec: Codec, mean: Tensor, std: Tensor) -> Codec:
    """The codec to save beside the denoiser, normalized if needed.

    It is the given one if its latents are normal already, to within the error of estimating that.

    Raises:
        RunError: if there is another one.
    """
    normal = bool((mean.abs() < 0.05).all() and ((std - 1).abs() < 0.05).all())
    to_save = codec if normal else normalized(codec, mean, std)
    if path.exists():
        # compared in the precision in which the caller holds it
        dtype = str(next(to_save.parameters()).dtype).removeprefix("torch.")
        existing = codec_digest(load_codec(path, dtype=dtype))
        if existing == codec_digest(codec) and not normal:
            raise RunError(
                f"the codec in {path} gives latents that are not normalized by channel; set "
                "prior.denoiser.normalize=none, or choose another prior.output_dir"
            )
        if existing != codec_digest(to_save):
            raise RunError(
                f"{path} is not the codec that made these latents; "
                f"set codec.path={path}, or choose another prior.output_dir"
            )
    return to_save


def _sample(model: Any, scheduler: object, labels: Tensor, noise: Tensor) -> Tensor:
    """Denoise latents (n, C, h, w) of classes (n,) with guidance."""
    device = next(model.parameters()).device
    sampler = fresh_scheduler(scheduler, SHOWN_STEPS)
    y = labels.to(device)
    start = choose_start(sampler, SHOWN_STEPS, strength=1.0)
    noised = guided(dit_prediction(model), y, null_class(model, y), SHOWN_GUIDANCE)
    return denoise(noised, sampler, torch.zeros_like(noise).to(device), start, [], noise=noise.to(device))
