"""`LatentGenerator`: a diffusers pipeline that turns latent points or classes into images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DConditionModel,
)
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from dq.config.schema import CodecConfig, GenerateConfig
from dq.core.devices import default_device, resolve_dtype
from dq.core.errors import InputError
from dq.core.files import read_json, write_json
from dq.core.model_files import open_model
from dq.core.numbers import whole_number
from dq.core.progress import progress
from dq.core.seeds import digest_of, digest_of_tensors
from dq.diffusion.class_names import class_indices, class_number
from dq.diffusion.class_sampling import ClassModel, noise_of_images, sample_in_pieces
from dq.diffusion.codec import codec_digest, decode_images, downscale, latent_shape, load_codec
from dq.diffusion.guidance import by_prototypes, in_chunks
from dq.diffusion.loading import FILES, WEIGHTS, check_components, check_options, loading, take_dtype
from dq.diffusion.prompts import prompt_conditions
from dq.diffusion.sampling import (
    Predict,
    Start,
    check_start,
    choose_scheduler,
    choose_start,
    denoise,
    guided,
    invert,
    is_random,
    limited,
    null_class,
)
from dq.diffusion.time_grid import fresh_scheduler
from dq.diffusion.weaker_models import ClassPredict, WeakerModels

IMAGES_AT_ONCE = 32
REQUIRED = {
    "dit": ("transformer", "scheduler"),
    "img2img": ("unet", "text_encoder", "tokenizer", "scheduler"),
}
STOCK_CLASS = {"dit": "DiTPipeline", "img2img": "StableDiffusionImg2ImgPipeline"}


class LatentGenerator(DiffusionPipeline):
    """Images of latent points and of classes by a diffusion model.

    What it saves loads in stock diffusers: an autoencoder alone (mode `decode`), a class-conditional DiT (`dit`), or
    Stable Diffusion (`img2img`). Open it by `from_pretrained` of this class; `DiffusionPipeline.from_pretrained` would
    look the class up in diffusers.
    """

    _optional_components = ["transformer", "unet", "text_encoder", "tokenizer", "scheduler"]  # noqa: RUF012
    model_cpu_offload_seq = "text_encoder->unet->transformer->vae"

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC,
        transformer: DiTTransformer2DModel | None = None,
        unet: UNet2DConditionModel | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        scheduler: SchedulerMixin | None = None,
        id2label: dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            transformer=transformer,
            unet=unet,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
        # JSON turns integer keys into text; keep them text always
        self.weaker = WeakerModels(None)
        self.register_to_config(id2label={str(k): v for k, v in id2label.items()} if id2label else None)

    # --- loading and saving ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> Self:
        """Open a stock pipeline folder or repository, or an autoencoder alone.

        Args:
            path: local folder or Hub id.
            **kwargs: as for diffusers: `dtype` (one, or a mapping by component), `revision`, `variant`, `device_map`,
                components such as `vae=` or `scheduler=`, ...; `subfolder` is that of an autoencoder in a repository.
                Others are refused. Weights are read from safetensors alone, and no code of the repository is run.

        Raises:
            InputError: if there is no such model, it is damaged or incomplete, or it needs other weights or code.
        """
        names, optional = cls._get_signature_keys(cls)
        dtype = take_dtype(kwargs)
        check_options(kwargs, {*names, *optional})
        where = {k: kwargs.pop(k) for k in FILES if k in kwargs}
        looked_up = {k: where[k] for k in ("revision", "token", "cache_dir") if k in where}
        files = open_model(path, local_files_only=bool(where.get("local_files_only")), **looked_up)
        weights = {k: kwargs[k] for k in WEIGHTS if k in kwargs}
        components = {k: v for k, v in kwargs.items() if k in (*names, *optional)}
        subfolder = kwargs.get("subfolder")
        index = None if subfolder else files.json("model_index.json")
        fetched = {**where, **files.options}
        if index is None:
            vae = components.pop("vae", None)
            if vae is None:
                vae_dtype = dtype.get("vae", dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
                device = None if weights.get("device_map") is not None else "cpu"
                options = {**where, **weights, "dtype": vae_dtype, "device": device, "files": files}
                vae = load_codec(path, subfolder=subfolder, **options)
            return cls(vae=vae, **components)
        check_components(index, str(path), components)
        try:
            with loading():
                pipe = super().from_pretrained(
                    str(path), **{**fetched, **weights, **components, "dtype": dtype, "use_safetensors": True}
                )
            pipe.weaker = WeakerModels(files)
            return pipe
        except (AttributeError, OSError, ValueError, NotImplementedError, SafetensorError) as e:
            reason = " ".join(str(e).split())[:200]
            raise InputError(
                f"the pipeline {path} cannot be loaded ({reason}); give one whose weights are safetensors"
            ) from e

    @classmethod
    def from_settings(cls, codec: CodecConfig, generate: GenerateConfig) -> Self:
        """The generator and codec of some settings.

        For `generate.mode=decode` it is the codec alone. `dtype: auto` is that of the device of `default_device`; a
        run resolves it beforehand.

        Raises:
            InputError: if no codec is named, or one of the models cannot be loaded.
        """
        if not codec.path:
            raise InputError("no codec is named; set codec.path to an autoencoder, e.g. one made by `dq train-codec`")
        codec_dtype, dtype = (resolve_dtype(c.dtype, default_device(), "inference") for c in (codec, generate))
        vae = load_codec(codec.path, subfolder=codec.subfolder, revision=codec.revision, dtype=codec_dtype)
        if generate.model is None:
            return cls(vae=vae)
        return cls.from_pretrained(generate.model, vae=vae, revision=generate.revision, dtype=dtype)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as a stock folder, which `DiTPipeline` or Stable Diffusion opens.

        An autoencoder without other components is saved as it is, since diffusers has no pipeline of it alone:
        `AutoModel` and `AutoencoderKL` open the folder. `variant`, such as "fp16", and `max_shard_size` are those of
        diffusers.

        Raises:
            InputError: if weights were to be pickled, or the path is a file.
        """
        if not safe_serialization:
            raise InputError("safe_serialization=False would pickle weights, which dq does not read; leave it out")
        if kwargs:
            raise InputError(f"save_pretrained has no argument {next(iter(kwargs))!r}")
        if Path(save_directory).is_file():
            raise InputError(f"{save_directory} is a file; give the path of a folder")
        parts = [name for name, part in self.components.items() if part is not None]
        if parts == ["vae"] and not self.config.id2label:
            shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            self.vae.save_pretrained(save_directory, variant=variant, **shards)
            return
        super().save_pretrained(str(save_directory), True, variant, max_shard_size)
        index = Path(save_directory) / "model_index.json"
        stock = STOCK_CLASS.get(self.default_mode)
        if stock:
            # a class name that diffusers knows, without the empty components that its constructor does not
            config = {k: v for k, v in read_json(index).items() if v not in (None, [None, None])}
            config["_class_name"] = stock
            if stock == STOCK_CLASS["img2img"]:
                config |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
                config["requires_safety_checker"] = False
            write_json(index, config, checksum=False)

    @property
    def default_mode(self) -> Literal["decode", "dit", "img2img"]:
        return "dit" if self.transformer is not None else "img2img" if self.unet is not None else "decode"

    def digest(self, mode: str) -> str:
        """Digest of the weights and settings that decide what `mode` draws."""
        parts: list[object] = [mode, codec_digest(self.vae)]
        models = {"decode": [], "dit": [self.transformer], "img2img": [self.unet, self.text_encoder]}[mode]
        parts += [digest_of_tensors(m.state_dict()) for m in models if m is not None]
        if mode != "decode":
            settings = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
            parts += [type(self.scheduler).__name__, settings]
        return digest_of(parts)

    # --- prototypes -> images -------------------------------------------------------------------------------------

    def check_inputs(self, config: GenerateConfig, resolution: int, class_names: Sequence[str]) -> list[int]:
        """Check the components; return the generator's class index per class.

        Raises:
            InputError: for a missing component, a codec or a scheduler that does not fit the denoiser, an invalid
                start, or a class it lacks.
        """
        required: tuple[str, ...] = {"decode": (), **REQUIRED}[config.mode]
        for part in required:
            if getattr(self, part) is None:
                raise InputError(f"generate.mode={config.mode} needs a {part}, which this model does not have")
        self.start(config)
        channels, side, _ = latent_shape(self.vae, resolution)
        model = {"decode": None, "dit": self.transformer, "img2img": self.unet}[config.mode]
        if model is not None and model.config.in_channels != channels:
            raise InputError(
                f"the codec has {channels} latent channels but the denoiser takes {model.config.in_channels}; "
                "use the codec that the denoiser was trained with"
            )
        if config.mode == "dit":
            if self.transformer.config.sample_size != side:
                raise InputError(
                    f"codec.resolution={resolution} gives {side}x{side} latents but the DiT takes "
                    f"{self.transformer.config.sample_size}x{self.transformer.config.sample_size}"
                )
            self.prediction(config.internal_guidance, config.autoguidance)
            return self.condition_ids(class_names, config.class_map)
        return list(range(len(class_names)))

    def condition_ids(self, class_names: Sequence[str], class_map: dict[str, str] | None = None) -> list[int]:
        """The DiT's class index per class of the source; see `class_indices`."""
        total = int(self.transformer.config.num_embeds_ada_norm)
        return class_indices(class_names, self.config.id2label or {}, total, class_map)

    def start(self, config: GenerateConfig) -> Start | None:
        """Where the denoising begins under `config`; None for `decode`.

        Its SNR and strength do not depend on `noise`, `rescale` and the guidance.

        Raises:
            InputError: for a scheduler that does not fit what the model predicts, or an invalid start.
        """
        return None if config.mode == "decode" else self._trajectory(config)[1]

    def _trajectory(self, config: GenerateConfig) -> tuple[Any, Start]:
        """A scheduler with its time grid, and the start of the trajectory."""
        chosen = choose_scheduler(self.scheduler, config.scheduler)
        if config.noise == "inversion" and is_random(chosen):
            raise InputError(
                f"generate.noise=inversion is deterministic but {type(chosen).__name__} draws noise at every step; "
                "set generate.scheduler=DDIMScheduler, or another without noise, or generate.noise=random"
            )
        scheduler = fresh_scheduler(chosen, config.num_inference_steps)
        start = choose_start(scheduler, config.num_inference_steps, snr=config.snr, strength=config.strength)
        check_start(scheduler, start)
        return scheduler, start

    def __call__(
        self,
        class_labels: Sequence[int | str] | np.ndarray | Tensor | int | str,
        guidance_scale: float = 4.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
        *,
        image_size: int | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images of classes from noise, exactly as `DiTPipeline` does.

        Args:
            class_labels: class of each image, by the DiT's own index or its name in `config.id2label`; one or several.
            guidance_scale: weight of classifier-free guidance; 1 or less is none.
            generator: source of the noise of all images, or one for each image, which then depends on nothing else of
                the batch. None: fresh noise.
            num_inference_steps: steps of the scheduler.
            output_type: "pil" images, "np" (B, H, W, 3) or "pt" (B, 3, H, W) float32 in [0, 1].
            return_dict: False gives the tuple `(images,)`.
            image_size: side in px of the result; None keeps the codec's.

        Raises:
            InputError: if the model has no transformer or no scheduler, or lacks a class.

        Example:
            pipe(class_labels=[0, 1, 2], generator=torch.manual_seed(0)).images[0].save("airplane.png")
        """
        if self.transformer is None:
            raise InputError(
                "generating by class needs a transformer, which this model does not have; open the folder of a "
                "DiT, or distill a data set with `distill`"
            )
        if self.scheduler is None:
            raise InputError("generating needs a scheduler, which this model does not have; give scheduler=")
        if output_type not in ("pil", "np", "pt"):
            raise InputError(f"output_type must be 'pil', 'np' or 'pt', not {output_type!r}")
        steps = whole_number(num_inference_steps, "num_inference_steps")
        if not isinstance(guidance_scale, (int, float, np.number)) or not math.isfinite(guidance_scale):
            raise InputError(f"guidance_scale is a finite number, not {guidance_scale!r}")
        size = None if image_size is None else whole_number(image_size, "image_size")
        labels = self._class_numbers(class_labels)
        channels, side = int(self.transformer.config.in_channels), int(self.transformer.config.sample_size)
        noise, generators = noise_of_images(generator, (len(labels), channels, side, side))
        options = {"guidance_scale": float(guidance_scale), "num_inference_steps": steps}
        images: Any = self._draw_classes(labels, noise, generators, size, **options)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images) if len(images) else []
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def _draw_classes(
        self,
        labels: list[int],
        noise: Tensor,
        generators: list[torch.Generator],
        image_size: int | None,
        **options: Any,
    ) -> Tensor:
        """Images (B, 3, H, W) of classes from their noise."""
        model, parts = ClassModel(self.transformer, self.scheduler), []
        starts = range(0, len(labels), IMAGES_AT_ONCE)
        for first in progress(starts, desc="generate", unit="batch", main=len(starts) > 1):
            rows = slice(first, first + IMAGES_AT_ONCE)
            z = sample_in_pieces(model, labels[rows], generators[rows], noise=noise[rows], **options)
            parts.append(decode_images(self.vae, z, image_size))
        side = image_size or noise.shape[-1] * downscale(self.vae)
        return torch.cat(parts) if parts else torch.zeros(0, 3, side, side)

    def _class_numbers(self, class_labels: Sequence[int | str] | np.ndarray | Tensor | int | str) -> list[int]:
        """The DiT's indices of classes given by index or name."""
        plain = class_labels.tolist() if isinstance(class_labels, (np.ndarray, np.generic, Tensor)) else class_labels
        return [self._class_index(c) for c in (plain if isinstance(plain, (list, tuple, range)) else [plain])]

    def _class_index(self, label: object) -> int:
        """The DiT's index of a class by its index or name."""
        total = int(self.transformer.config.num_embeds_ada_norm)
        if isinstance(label, str):
            return self.condition_ids([label])[0] if self.config.id2label else self._class_index(class_number(label))
        index = class_number(label)
        if not 0 <= index < total:
            raise InputError(f"this model has no class {label}; its classes are 0 to {total - 1}")
        return index

    def synthesize(
        self,
        latents: Tensor,
        labels: Sequence[int],
        generators: Sequence[torch.Generator],
        config: GenerateConfig,
        *,
        class_names: Sequence[str],
        condition_ids: Sequence[int] | None = None,
        image_size: int | None = None,
        masses: Tensor | None = None,
        image_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw images from latent points: noise, denoise, decode.

        The model runs in its own precision, the trajectory between its calls in float32.

        Args:
            latents: (B, C, h, w) float32 in the denoiser's space.
            labels: class of each point; points of different classes share a batch.
            generators: one CPU generator per image; an image depends on nothing else in the batch, unless
                `config.together`: then this is a class, of `batch_size` images at a time. Not advanced with
                `noise="inversion"`.
            config: start, noise and guidance; see `dq.diffusion.sampling` and `dq.diffusion.guidance`.
            class_names: names of the classes, for prompts.
            condition_ids: the generator's index per class, from `check_inputs`.
            image_size: side in px of the result; None keeps the codec's.
            masses: (B,) of the images, where the prototypes of the class guide them as a measure; None: uniform.
            image_dtype: uint8 rounds the images to bytes before they leave the device.

        Returns:
            (B, 3, H, W) on the CPU: float32 in [0, 1], or uint8.
        """
        if config.together and len(set(labels)) > 1:
            raise InputError("guidance of a class needs images of one class; call once for each class")
        z = latents.to(self._execution_device)
        if config.mode != "decode":
            if config.mode == "dit":
                predict = self.prediction(config.internal_guidance, config.autoguidance)
                cond = self._classes(labels, condition_ids, z.device)
                null = null_class(self.transformer, cond)
            else:
                names = [class_names[c] for c in labels]
                predict, cond, null = prompt_conditions(self.unet, self.tokenizer, self.text_encoder, names, config)
            predict = in_chunks(predict, config.batch_size) if config.together else predict
            both, plain = guided(predict, cond, null, config.guidance_scale), guided(predict, cond, null, 1.0)
            z = self._denoise(z, both, plain, generators, config, masses)
        with torch.no_grad():
            parts = z.split(config.batch_size if config.together else max(1, len(z)))
            return torch.cat([decode_images(self.vae, part, image_size, dtype=image_dtype) for part in parts])

    def _denoise(
        self,
        points: Tensor,
        guided_prediction: Predict,
        plain: Predict,
        generators: Sequence[torch.Generator],
        config: GenerateConfig,
        masses: Tensor | None,
    ) -> Tensor:
        """Noise latent points (B, C, h, w) and denoise them with guidance."""
        scheduler, start = self._trajectory(config)
        steps = limited(guided_prediction, plain, scheduler, config.guidance_interval)
        steps = by_prototypes(steps, scheduler, start, points, config, masses)
        clean, noise = invert(plain, scheduler, points, start) if config.noise == "inversion" else (points, None)
        scales = {"guidance_scale": config.guidance_scale, **config.guidance}
        return denoise(steps, scheduler, clean, start, generators, noise=noise, guidance=scales)

    def prediction(self, internal_guidance: float = 1.0, autoguidance: float = 1.0) -> ClassPredict:
        """The DiT as a function of (x, t, class); see `WeakerModels.prediction`."""
        return self.weaker.prediction(self.transformer, internal_guidance, autoguidance)

    def _classes(self, labels: Sequence[int], condition_ids: Sequence[int] | None, device: torch.device) -> Tensor:
        """The DiT's classes (B,)."""
        ids = condition_ids or range(int(self.transformer.config.num_embeds_ada_norm))
        return torch.tensor([ids[c] for c in labels], device=device)

    def _native_resolution(self) -> int | None:
        model = self.transformer or self.unet
        return int(model.config.sample_size) * downscale(self.vae) if model is not None else None
