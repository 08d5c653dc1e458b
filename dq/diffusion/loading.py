"""Arguments and files of diffusers models: what is read or refused."""

from __future__ import annotations

import ast
import contextlib
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

import torch

from dq.core.errors import InputError
from dq.core.model_files import ModelFiles
from dq.core.plain import PlainDict, PlainMapping
from dq.core.progress import library_bars
from dq.core.text import nearest_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# arguments of from_pretrained that say where files come from ...
FILES = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
# ... and how weights are read, for a pipeline and for a model alone
WEIGHTS = (
    *("variant", "device_map", "max_memory", "offload_folder", "offload_state_dict", "low_cpu_mem_usage"),
    *("disable_mmap", "quantization_config"),
)
# what a stock pipeline cannot work without
PARTS = {
    "DiTPipeline": ("transformer", "vae", "scheduler"),
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "StableDiffusionImg2ImgPipeline": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
}
# keys of a codec's config that its class ignores: latent statistics, which `dq.diffusion.codec` uses, and what
# AutoencoderTiny writes by itself
HARMLESS = {"latents_mean", "latents_std"}
OF_TINY = {"block_out_channels"}
IGNORED = re.compile(r"The config attributes (\{.*?\}) were passed to (Autoencoder\w+), but are not expected")

M = TypeVar("M", bound=torch.nn.Module)


def dtype_of(value: object) -> torch.dtype:
    """A floating dtype of torch, given by name or itself.

    None is float32, as in diffusers.

    Raises:
        InputError: for anything else.
    """
    if value is None:
        return torch.float32
    dtype = DTYPES.get(value) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(
            f"dtype is one of {', '.join(DTYPES)}, a floating torch.dtype, or a mapping of these by component, not "
            f"{value!r}"
        )
    return dtype


def cast(model: M, dtype: torch.dtype, device: torch.device | None = None) -> M:
    """Cast a model of diffusers, in place.

    Its own `to` warns of modules that should stay in float32 even where a model names none.
    """
    torch.nn.Module.to(model, device, dtype)
    return model


def take_dtype(options: PlainDict) -> torch.dtype | dict[str, torch.dtype]:
    """Remove `dtype` (or the older `torch_dtype`) from arguments of from_pretrained.

    Returns:
        A dtype, or dtypes by component and for the "default".

    Raises:
        InputError: for other values, or if both are given and differ.
    """
    old, new = options.pop("torch_dtype", None), options.pop("dtype", None)
    if old is not None and new is not None and old != new:
        raise InputError(f"dtype={new!r} and torch_dtype={old!r} are two names of one setting; give dtype alone")
    value = old if new is None else new
    if isinstance(value, Mapping):
        return {name: dtype_of(v) for name, v in value.items()}
    return dtype_of(value)


def check_options(options: PlainMapping, components: Collection[str]) -> None:
    """Refuse arguments of from_pretrained that are unknown or unsafe.

    Raises:
        InputError: for an unknown argument, `use_safetensors=False`, or code of a repository.
    """
    if options.get("use_safetensors") is False:
        raise InputError("use_safetensors=False would unpickle weights, which can run code; leave it out")
    if options.get("trust_remote_code") or options.get("custom_pipeline") is not None:
        raise InputError("trust_remote_code and custom_pipeline would run code of a repository; leave them out")
    accepted = [*FILES, *WEIGHTS, *components, "subfolder", "use_safetensors", "trust_remote_code", "custom_pipeline"]
    for name in options:
        if name not in accepted:
            close = nearest_name(name, accepted, cutoff=0.6)
            hint = f"did you mean {close!r}?" if close else f"it takes dtype, {', '.join(accepted)}"
            raise InputError(f"from_pretrained has no argument {name!r}; {hint}")


def check_components(index: object, path: str, components: PlainMapping) -> None:
    """Refuse a pipeline without a part, or with its own modules.

    This happens before anything is imported: diffusers imports any library that a component names. `index` is the
    content of `model_index.json`, and `components` are those that the caller gives in place of the model's.
    """
    from diffusers import pipelines

    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise InputError(f"model_index.json of {path} names no pipeline of diffusers; give a stock pipeline")
    for name, value in index.items():
        if name[:1] == "_" or not isinstance(value, list) or not value or not isinstance(value[0], str):
            continue
        if value[0] not in ("diffusers", "transformers") and not hasattr(pipelines, value[0]):
            raise InputError(
                f"component {name!r} of {path} comes from {value[0]!r}, and only diffusers and transformers are "
                "loaded, no code of a repository; give a stock pipeline"
            )
    for part in PARTS.get(index["_class_name"], ()):
        if part not in components and (index.get(part) or [None])[0] is None:
            raise InputError(
                f"{path} is a {index['_class_name']} without a {part}; get the model again, or give {part}="
            )


def codec_folder(files: ModelFiles) -> str | None:
    """Subfolder of a model's autoencoder: "vae" for a pipeline, else None."""
    return None if files.file("config.json") is not None or files.file("vae/config.json") is None else "vae"


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Hide messages of diffusers about latent statistics within the block.

    This package uses these statistics; see also `library_bars`.
    """
    logger = logging.getLogger("diffusers.configuration_utils")
    logger.addFilter(_is_news)
    try:
        with library_bars():
            yield
    finally:
        logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """False for the message that latent statistics alone are ignored."""
    match = IGNORED.search(record.getMessage())
    if match is None:
        return True
    try:
        keys = set(ast.literal_eval(match[1]))
    except (ValueError, SyntaxError):
        return True
    return not keys <= HARMLESS | (OF_TINY if match[2] == "AutoencoderTiny" else set())
