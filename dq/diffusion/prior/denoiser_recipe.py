"""Recipe of a denoiser's training, from settings alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dq.config.dtypes import resolve_dtypes
from dq.config.prior import PriorConfig, TrainDenoiserConfig
from dq.config.reader import to_dict
from dq.core.errors import InputError
from dq.core.model_files import open_model
from dq.core.seeds import digest_of_tensors
from dq.diffusion.codec import Codec, codec_digest
from dq.diffusion.prior.recipe import Recipe, training_dtypes
from dq.diffusion.weaker_models import EARLY, HEAD

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiTTransformer2DModel

OUTPUT_LAYERS = ("proj_out_2",)  # of a DiT


def denoiser_recipe(
    latents: str, codec: Codec, prior: PriorConfig, class_names: Sequence[str], where: Accelerator | torch.device | str
) -> Recipe:
    """The training of a denoiser on latents of one key.

    Its `auto` is what `dtype: auto` stands for in the folder.

    Args:
        latents: key of their cache (`dq.diffusion.latents.latents_key`).
        codec: the one that makes them.
        prior: settings.
        class_names: of the source.
        where: device or processes to train on.

    Raises:
        InputError: if the checkpoint to start from is none.
    """
    folder = Path(prior.output_dir)
    auto = training_dtypes(folder, "denoiser", folder / "transformer", where)
    settings = resolve_dtypes(prior.denoiser, auto)
    ignored = {"save_every", "compile", *unused_options(settings)}
    identity = {k: v for k, v in to_dict(settings).items() if k not in ignored}
    if settings.init is not None:
        identity["init"] = digest_of_tensors(open_denoiser(settings.init).state_dict())
    early = (f"{EARLY}/training.json",) if settings.early else ()
    return Recipe(
        name="denoiser",
        folder=folder,
        product=folder / "transformer",
        identity={
            "latents": latents,
            "codec": codec_digest(codec),
            "classes": list(class_names),
            "seed": prior.seed,
            **identity,
        },
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        emas=settings.ema,
        save_every=settings.save_every,
        dtype=settings.dtype,
        early=early,
        parts=(
            *("model_index.json", "scheduler/scheduler_config.json", "vae/config.json"),
            *((f"{HEAD}/training.json",) if settings.intermediate_head else ()),
            *early,
        ),
        auto=auto,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        accumulate=settings.accumulate,
        compile=settings.compile,
        optimizer=settings.optimizer,
        output_layers=OUTPUT_LAYERS,
        extra_saves=(max(1, round(settings.early * settings.steps)),) if settings.early else (),
    )


def unused_options(settings: TrainDenoiserConfig) -> list[str]:
    """Options that are off, and no part of a training's identity.

    So folders of versions without these options stay valid.
    """
    options = {"flip": False, "contrastive": 0.0, "time_shift": 1.0, "optimizer": "adamw"}
    options |= {"intermediate_head": 0.0, "early": 0.0}
    return [name for name, off in options.items() if getattr(settings, name) == off]


def open_denoiser(path: str) -> DiTTransformer2DModel:
    """The DiT of a pipeline.

    Raises:
        InputError: if there is none.
    """
    from diffusers import DiTTransformer2DModel

    try:
        options = open_model(path).options
        return DiTTransformer2DModel.from_pretrained(path, subfolder="transformer", use_safetensors=True, **options)
    except (OSError, ValueError, InputError) as e:
        raise no_pipeline(path, e) from e


def no_pipeline(path: str, error: Exception) -> InputError:
    """The error for an invalid model to start from."""
    return InputError(
        f"prior.denoiser.init={path} is not a DiT pipeline with vae/, transformer/ and scheduler/ "
        f"({str(error).splitlines()[0][:150]})"
    )
