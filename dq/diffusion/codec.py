"""Autoencoders of latent diffusion models behind one interface.

Images are in [-1, 1], latents in the space that the denoiser sees.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from dq.core.devices import default_device, resolve_dtype
from dq.core.errors import InputError, RunError
from dq.core.memory import run_with_batch_backoff
from dq.core.model_files import ModelFiles, open_model
from dq.core.plain import PlainMapping
from dq.core.seeds import digest_of, digest_of_tensors
from dq.core.text import short
from dq.diffusion.loading import DTYPES as DTYPES
from dq.diffusion.loading import codec_folder, dtype_of, loading

# AutoencoderKL | AutoencoderTiny | AutoencoderDC; Any, so that this module loads without diffusers
Codec = Any
SUPPORTED = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")


def load_codec(
    path: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    dtype: object = "float32",
    device: torch.device | str | None = "cpu",
    files: ModelFiles | None = None,
    **weights: object,
) -> Codec:
    """Load the autoencoder of a model folder or Hub repository.

    A pipeline repository may be given as it is: its `vae/` is taken.

    Args:
        path: folder or repository.
        subfolder: of the autoencoder in it; None: found by its files.
        revision: of a repository.
        dtype: by name or torch's; "auto" is what the device is fast in.
        device: where it goes; None: where `weights` says.
        files: those of `path`, if they have been looked up.
        **weights: further arguments of diffusers' from_pretrained, such as `variant`.

    Raises:
        InputError: if there is no such model, or its class is not supported.
    """
    import diffusers

    files = files or open_model(path, revision=revision)
    subfolder = subfolder or codec_folder(files)
    config = files.json(f"{subfolder}/config.json" if subfolder else "config.json")
    if config is None:
        where = f"{path}/{subfolder}" if subfolder else path
        raise InputError(f"{where} has no config.json; give an autoencoder, or a pipeline that has one under vae/")
    name = config.get("_class_name")
    if name not in SUPPORTED:
        raise InputError(f"{path} is a {name}, not one of the autoencoders {', '.join(SUPPORTED)}")
    # dtype at loading, not .to() afterwards: some modules stay in float32 on purpose.
    if dtype == "auto":
        dtype = resolve_dtype(dtype, device or default_device(), "inference")
    options = {**weights, **files.options, "dtype": dtype_of(dtype), "use_safetensors": True}
    try:
        with loading():
            codec = getattr(diffusers, name).from_pretrained(str(path), subfolder=subfolder, **options)
    except (OSError, ValueError, SafetensorError) as e:
        raise InputError(
            f"the autoencoder {path} cannot be loaded ({' '.join(str(e).split())[:150]}); get it again"
        ) from e
    codec = codec.eval().requires_grad_(False)
    return codec if device is None else codec.to(device, memory_format=torch.channels_last)


def codec_digest(codec: Codec) -> str:
    """Digest of the class, config and weights of a codec."""
    config = {k: v for k, v in codec.config.items() if not k.startswith("_")}
    return digest_of([type(codec).__name__, config, digest_of_tensors(codec.state_dict())])


def downscale(codec: Codec) -> int:
    """Pixels per latent cell along one side."""
    if hasattr(codec, "spatial_compression_ratio"):
        return int(codec.spatial_compression_ratio)
    return downscale_of(codec.config)


def downscale_of(config: PlainMapping) -> int:
    """Pixels per latent cell along one side, by an autoencoder's configuration."""
    return 2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)


def latent_shape(codec: Codec, resolution: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of square images of `resolution` px."""
    factor = downscale(codec)
    if resolution % factor:
        raise InputError(f"codec.resolution={resolution} is not a multiple of the codec's downscaling factor {factor}")
    return int(codec.config.latent_channels), resolution // factor, resolution // factor


def encode_latents(
    codec: Codec,
    images: Tensor,
    *,
    posterior: Literal["mean", "sample"] = "mean",
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Encode images in [-1, 1] to latents in the denoiser's space.

    Images (n, 3, H, W) become latents (n, C, h, w) float32. For `AutoencoderKL` these are (z - shift) * scaling;
    `AutoencoderTiny` needs no scaling; `AutoencoderDC` has a scaling factor. Where the config has channel statistics
    (`latents_mean` and `latents_std`), (z - mean) / std takes the place of z - shift, for every class.

    `posterior` "sample" draws from the KL posterior with one CPU generator per image; the two other codecs are
    deterministic and ignore it.

    Raises:
        RunError: if the result is not finite (half precision overflows in some autoencoders).
    """
    parameter = next(codec.parameters())
    x = images.to(parameter.device, parameter.dtype, memory_format=torch.channels_last)
    encoded: Any = codec.encode(x)
    if hasattr(encoded, "latent_dist"):  # AutoencoderKL
        z = encoded.latent_dist.mode().float()
        if posterior == "sample":
            if generators is None or len(generators) != len(images):
                raise InputError(f"posterior='sample' needs one generator per image, {len(images)} in this batch")
            noise = torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators])
            z = z + encoded.latent_dist.std.float() * noise.to(z.device)
    else:  # AutoencoderTiny: latents; AutoencoderDC: latent
        z = (encoded.latents if hasattr(encoded, "latents") else encoded.latent).float()
    shift, scale = _affine(codec, z)
    z = (z - shift) * scale
    if not torch.isfinite(z).all():
        raise RunError(
            f"the codec gave NaN or infinite latents in {str(parameter.dtype).removeprefix('torch.')}; "
            "use --set codec.dtype=bfloat16 or float32"
        )
    return z


def decode_latents(codec: Codec, latents: Tensor) -> Tensor:
    """Decode latents of the denoiser's space to images in [-1, 1].

    Latents (n, C, h, w) become images (n, 3, H, W) float32, clipped.
    """
    parameter = next(codec.parameters())
    z = latents.to(parameter.device).float()
    shift, scale = _affine(codec, z)
    z = z / scale + shift
    images = codec.decode(z.to(parameter.dtype, memory_format=torch.channels_last)).sample.float()
    if not torch.isfinite(images).all():
        raise RunError(
            f"the codec decoded to NaN or infinite pixels in {str(parameter.dtype).removeprefix('torch.')}; "
            "use --set codec.dtype=float32 and another --output_dir"
        )
    return images.clamp(-1, 1)


def decode_images(
    codec: Codec, latents: Tensor, size: int | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Decode latents of the denoiser's space to images on the CPU, in pieces where memory is short.

    Latents (n, C, h, w) become images (n, 3, S, S) in [0, 1], or uint8, rounded on the device; `size` as in `to_unit`.
    """

    def decode(s: slice) -> Tensor:
        x = to_unit(decode_latents(codec, latents[s]), size)
        return (to_bytes(x) if dtype == torch.uint8 else x).cpu()

    return run_with_batch_backoff("decode", len(latents), decode, like=(size, *latents.shape[1:]))


def _affine(codec: Codec, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Shift and scale from the codec's latents to the denoiser's.

    (z - shift) * scale lies in the denoiser's space.
    """
    config = codec.config
    # AutoencoderTiny's factor is 1 by design; its scale_latents() only maps to [0, 1] for display
    tiny = type(codec).__name__ == "AutoencoderTiny"
    factor = config.get("scaling_factor")
    scale = 1.0 if tiny or factor is None else float(factor)
    if not (math.isfinite(scale) and scale != 0):
        raise InputError(f"the codec's scaling_factor is {factor}; correct it in its config.json")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        if not all(math.isfinite(v) and v > 0 for v in std):
            raise InputError(f"the codec's latents_std is {short(std)}, and must be positive; correct its config.json")
        view = (1, -1, 1, 1)
        return torch.tensor(mean, device=z.device).view(view), scale / torch.tensor(std, device=z.device).view(view)
    return 0.0 if tiny else float(config.get("shift_factor") or 0.0), scale


def normalized(codec: Codec, mean: Tensor, std: Tensor) -> Codec:
    """A codec whose latents are (z - mean) / std, in float32.

    `mean` and `std` are (C,). In an `AutoencoderKL` with 1x1 convolutions around its latents the statistics go into
    their weights, so that stock pipelines, which have only a scaling factor, decode correctly. Elsewhere they go into
    the config as `latents_mean` and `latents_std`, which `encode_latents` and `decode_latents` use.

    Raises:
        RunError: if a channel does not vary.
    """
    if not (std > 0).all():
        dead = (~(std > 0)).nonzero()[:, 0].tolist()
        raise RunError(
            f"the latents do not vary in channel(s) {dead}, so that they cannot be normalized; train a codec with "
            "fewer latent_channels or a smaller kl_weight, or set prior.denoiser.normalize=none"
        )
    new = copy.deepcopy(codec).float().cpu()
    m, s = mean.double().cpu(), std.double().cpu()
    before, after = getattr(new, "quant_conv", None), getattr(new, "post_quant_conv", None)
    shift, scale = (torch.as_tensor(v, dtype=torch.float64).flatten() for v in _affine(new, m))
    # of the codec's own latents: z_new = a * z_own + b
    a = scale / s
    b = -(shift * scale + m) / s
    if before is None or after is None:
        new.register_to_config(latents_mean=(-b / a).tolist(), latents_std=(1 / a).tolist(), scaling_factor=1.0)
        return new
    channels = len(m)
    with torch.no_grad():
        weight, bias = before.weight.double(), before.bias.double()
        weight[:channels] *= a.view(-1, 1, 1, 1)
        bias[:channels] = a * bias[:channels] + b
        bias[channels:] += 2 * a.abs().log()  # log variances
        before.weight.copy_(weight), before.bias.copy_(bias)
        weight, bias = after.weight.double(), after.bias.double()
        after.bias.copy_(bias - weight[:, :, 0, 0] @ (b / a))
        after.weight.copy_(weight / a.view(1, -1, 1, 1))
    new.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None)
    return new


def to_signed(images: Tensor) -> Tensor:
    """8-bit images to float32 in [-1, 1]."""
    return images.div(127.5).sub_(1.0)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, rounded."""
    return (images * 255).round().to(torch.uint8)


def to_unit(images: Tensor, size: int | None = None) -> Tensor:
    """Images in [-1, 1] to [0, 1], resized to `size` px.

    Bicubic, with a kernel widened when shrinking.
    """
    x = images.float() * 0.5 + 0.5
    if size is not None and x.shape[-1] != size:
        x = torch.nn.functional.interpolate(x, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return x.clamp(0, 1)
