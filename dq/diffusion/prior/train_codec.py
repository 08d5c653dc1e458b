"""Train or fine-tune an autoencoder on the images of a source."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq.config.dtypes import resolve_dtypes
from dq.config.prior import PriorConfig
from dq.config.reader import to_dict
from dq.config.schema import CodecConfig
from dq.core.errors import InputError
from dq.core.files import atomic_path
from dq.core.plain import PlainDict
from dq.core.progress import progress
from dq.core.seeds import generator
from dq.data.grid import image_grid
from dq.data.images import read_images
from dq.data.source import ImageSource, Split
from dq.diffusion.codec import (
    DTYPES,
    Codec,
    codec_digest,
    decode_latents,
    downscale,
    encode_latents,
    load_codec,
    normalized,
    to_signed,
)
from dq.diffusion.loading import cast
from dq.diffusion.prior.recipe import Recipe, finished, publish, training_dtypes
from dq.diffusion.prior.training import MAX_BYTES, fit, seeded
from dq.networks.teacher import Teacher
from dq.networks.teacher_check import naming
from dq.networks.teacher_loading import load_teacher

if TYPE_CHECKING:
    from accelerate import Accelerator

HELD_OUT = 256  # images at most, for PSNR and SSIM
SHOWN = 12
STATISTICS = 2048  # images at most, for the mean and deviation of every channel


def train_codec(
    source: ImageSource,
    codec_config: CodecConfig,
    prior: PriorConfig,
    *,
    accelerator: Accelerator,
) -> Path:
    """Train an autoencoder and save it as `<prior.output_dir>/vae`.

    Per image, loss = mean (x - x')^2 + perceptual_weight * `perceptual_distance` of the classifier's features +
    kl_weight * KL(posterior || N(0, 1)) / number of latent values. The saved codec's latents have mean 0 and deviation
    1 in every channel over 2,048 train images (see `normalized`), as a denoiser requires. All train images are held in
    memory as bytes. Giving the same command again continues.

    Returns:
        The folder; at once if this very training is done.

    Raises:
        InputError: if the images exceed 8 GiB, or a setting does not fit the resolution.
        RunError: if the folder holds another training, or the loss is not finite.
    """
    auto = training_dtypes(Path(prior.output_dir), "codec", Path(prior.output_dir) / "vae", accelerator)
    prior = dataclasses.replace(prior, codec=resolve_dtypes(prior.codec, auto))
    settings, size, folder = prior.codec, codec_config.resolution, Path(prior.output_dir)
    recipe, model, classifier = prepare_codec(source, codec_config, prior, accelerator.device)
    recipe = dataclasses.replace(recipe, auto=auto)
    if finished(recipe):
        return recipe.product
    began = time.perf_counter()
    images, held_out = _images(source, size, prior.seed, at_most=None if settings.steps else STATISTICS)
    objective = CodecLoss(model, settings.kl_weight, classifier, settings.perceptual_weight)
    side = size // downscale(model)
    latent = (settings.batch_size, int(model.config.latent_channels), side, side)

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
        return similarity(back, to_signed(held_out))

    fitted = fit(recipe, objective, batch, accelerator=accelerator, on_save=on_save, save=model.save_pretrained)
    if accelerator.is_main_process:
        rows = torch.randperm(len(images), generator=generator(prior.seed, "statistics"))[:STATISTICS]
        mean, std = latent_statistics(model, images[rows], bar=True)
        numbers: PlainDict = similarity(reconstruct(model, held_out), to_signed(held_out))
        numbers["settings"] = _recorded(recipe, model, settings.init is not None)
        if not settings.steps:  # nothing was trained: the time is that of the statistics
            numbers["seconds"] = round(time.perf_counter() - began, 1)
        numbers |= {"held_out_images": len(held_out), "channel_mean": mean.tolist(), "channel_std": std.tolist()}
        saved = cast(normalized(model, mean, std), DTYPES[settings.save_dtype])
        publish(recipe, saved.save_pretrained, numbers, fitted, accelerator)
    accelerator.wait_for_everyone()
    return recipe.product


def prepare_codec(
    source: ImageSource, codec_config: CodecConfig, prior: PriorConfig, device: torch.device | str = "cpu"
) -> tuple[Recipe, Codec, Teacher | None]:
    """Recipe, initial autoencoder and perceptual classifier of a training.

    Raises:
        InputError: if the images exceed 8 GiB, or a setting does not fit the resolution or the classes.
    """
    folder, size = Path(prior.output_dir), codec_config.resolution
    settings = resolve_dtypes(prior.codec, training_dtypes(folder, "codec", folder / "vae", device))
    classifier = None
    if settings.perceptual is not None:
        # the data's own size, which is what the classifier was trained on
        with naming("prior.codec.perceptual"):
            classifier = load_teacher(settings.perceptual, len(source.class_names), size, device)
    model = new_codec(prior, size)
    if size % downscale(model):
        raise InputError(
            f"codec.resolution={size} is not a multiple of {downscale(model)}, the codec's downscaling factor"
        )
    n = len(source.train) if settings.steps else min(STATISTICS, len(source.train))
    if n * 3 * size * size > MAX_BYTES:
        raise InputError(
            f"{n} train images of {size} px take {n * 3 * size * size / 2**30:.0f} GiB and training holds at most "
            f"{MAX_BYTES >> 30} GiB in memory; lower codec.resolution, or train on a part of {source.origin}"
        )
    recipe = Recipe(
        name="codec",
        folder=folder,
        product=folder / "vae",
        identity={
            "data": source.fingerprint,
            "resolution": size,
            "preprocess": source.preprocess,
            "on_bad_image": "raise",  # decides whether there is a result, never which
            "seed": prior.seed,
            **{k: v for k, v in to_dict(settings).items() if k not in ("save_every", "perceptual")},
            "perceptual": classifier.digest if classifier else None,
            "init": codec_digest(model) if settings.init else None,
        },
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        emas=(settings.ema,),
        save_every=settings.save_every,
        dtype=settings.dtype,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
    )
    return recipe, model, classifier


def _recorded(recipe: Recipe, model: Codec, fine_tuned: bool) -> PlainDict:
    """Settings for the record of a trained codec.

    The architecture is that of the model itself, and what the model to start from decides is left out.
    """
    decided = ("architecture", "latent_channels", "block_out_channels", "layers_per_block", "attention")
    settings = {k: v for k, v in recipe.identity.items() if not (fine_tuned and k in decided)}
    return settings | {"architecture": type(model).__name__, "latent_channels": int(model.config.latent_channels)}


class CodecLoss(nn.Module):
    """Reconstruction error, perceptual distance and KL divergence, each per image."""

    def __init__(
        self, model: Codec, kl_weight: float, classifier: Teacher | None = None, perceptual_weight: float = 1.0
    ):
        super().__init__()
        self.model = model
        self.kl_weight = kl_weight
        self.perceptual_weight = perceptual_weight
        self.classifier = classifier

    def forward(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Loss terms (b,) of a batch.

        For images (b, 3, H, W) uint8 and posterior noise (b, C, h, w).
        """
        x = to_signed(images).contiguous(memory_format=torch.channels_last)
        terms = {}
        encoded: Any = self.model.encode(x)
        if hasattr(encoded, "latent_dist"):
            posterior = encoded.latent_dist
            z = posterior.mean + posterior.std * noise
            terms["kl"] = posterior.kl().float() / noise[0].numel()
        else:  # no posterior; AutoencoderTiny: latents, AutoencoderDC: latent
            z = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        out = self.model.decode(z).sample.float()
        # What PSNR measures; absolute error came out the same on digits (37.5 and 37.6 dB, 300 steps, one seed).
        terms["reconstruction"] = (out - x).square().mean((1, 2, 3))
        loss = terms["reconstruction"] + self.kl_weight * terms.get("kl", 0.0)
        if self.classifier is not None:
            terms["perceptual"] = perceptual_distance(self.classifier, out * 0.5 + 0.5, x * 0.5 + 0.5)
            loss = loss + self.perceptual_weight * terms["perceptual"]
        return {"loss": loss, **terms}


def perceptual_distance(classifier: Teacher, x: Tensor, y: Tensor) -> Tensor:
    """Perceptual distance (b,) in the features of a classifier.

    Of images x and y (b, 3, H, W) in [0, 1]; gradients flow into x. As LPIPS without its learned weights (Zhang et al.
    2018, equation 1): mean over stages of the network of the mean over positions of |f(x) / |f(x)| - f(y) / |f(y)||^2,
    with vectors of channels; the stages are the network's direct parts that give maps.
    """
    with torch.no_grad():
        targets = stage_features(classifier, y)
    total = x.new_zeros(len(x))
    for a, b in zip(stage_features(classifier, x), targets, strict=True):
        total = total + (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean((1, 2))
    return total / len(targets)


def stage_features(classifier: Teacher, x: Tensor) -> list[Tensor]:
    """Feature maps (b, C, h, w) of a classifier's direct parts.

    For images (b, 3, H, W) in [0, 1].
    """
    net: nn.Module = classifier.net
    while len(parts := list(net.children())) == 1:  # a wrapper around the network proper
        net = parts[0]
    features: list[Tensor] = []

    def store(module: nn.Module, args: object, out: object) -> None:
        if isinstance(out, Tensor) and out.ndim == 4:
            features.append(out)

    hooks = [part.register_forward_hook(store) for part in parts]
    try:
        classifier.differentiable(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not features:
        raise InputError(
            f"the classifier {classifier.name} has no part that gives maps (b, C, h, w); "
            "choose a convolutional network for prior.codec.perceptual"
        )
    return features


@torch.no_grad()
def reconstruct(model: Codec, images: Tensor) -> Tensor:
    """Encode and decode images (n, 3, H, W) uint8, to [-1, 1].

    By the posterior mean; the result is on the CPU.
    """
    return torch.cat([decode_latents(model, encode_latents(model, to_signed(b))).cpu() for b in images.split(64)])


def similarity(x: Tensor, y: Tensor) -> dict[str, float]:
    """Mean PSNR in dB and SSIM of images in [-1, 1]."""
    return {"psnr": psnr(x, y), "ssim": ssim(x, y)}


def psnr(x: Tensor, y: Tensor) -> float:
    """Mean PSNR in dB of images in [-1, 1].

    -10 log10(mean ((x - y) / 2)^2) of every image (C, H, W) of n.
    """
    return float((-10 * ((x - y) / 2).square().mean((1, 2, 3)).clamp(min=1e-10).log10()).mean())


def ssim(x: Tensor, y: Tensor) -> float:
    """Structural similarity (Wang et al. 2004, equation 13).

    Of images (n, C, H, W) in [-1, 1]: mean over images, channels and all positions of an 11 x 11 Gaussian window of
    deviation 1.5, or of the largest odd window that fits a smaller image.
    """
    channels, h, w = x.shape[1:]
    side = min(11, (min(h, w) - 1) // 2 * 2 + 1)
    g = torch.exp(-((torch.arange(side) - side // 2).float() ** 2) / (2 * 1.5**2))
    window = (g[:, None] * g / g.sum() ** 2).expand(channels, 1, side, side).to(x)

    def mean(v: Tensor) -> Tensor:
        return F.conv2d(v, window, groups=channels)

    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # of a range of 2
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    value = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(value.mean())


def new_codec(prior: PriorConfig, size: int) -> Codec:
    """The autoencoder that these settings and this seed start from."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    settings = prior.codec
    if settings.init is not None:
        return load_codec(settings.init).train().requires_grad_(True)
    channels = settings.block_out_channels
    with seeded(prior.seed, "codec", "init"):
        if settings.architecture == "tiny":
            if len(set(channels)) > 1:
                raise InputError(
                    f"prior.codec.block_out_channels={list(channels)} differ by level, which AutoencoderTiny cannot "
                    "have; give the same number for each, or take architecture=kl"
                )
            blocks = (settings.layers_per_block,) * len(channels)
            return AutoencoderTiny(
                encoder_block_out_channels=channels,
                decoder_block_out_channels=channels[::-1],
                num_encoder_blocks=blocks,
                num_decoder_blocks=blocks,
                latent_channels=settings.latent_channels,
            )
        return AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            latent_channels=settings.latent_channels,
            layers_per_block=settings.layers_per_block,
            # several channels in each group, or the norm would take away what a channel says on average
            norm_num_groups=max(1, math.gcd(*channels) // 8),
            mid_block_add_attention=settings.attention,
            sample_size=size,
        )


def _images(source: ImageSource, size: int, seed: int, at_most: int | None = None) -> tuple[Tensor, Tensor]:
    """Images to train on and images held out, uint8.

    They are (n, 3, size, size); the latter are of the test split, else of train. At most `at_most` images to train on
    are drawn at random; None: all.
    """
    n = len(source.train)

    def read(split: Split, rows: np.ndarray) -> Tensor:
        return read_images(split, rows, size, source.preprocess, on_bad=source.on_bad_image)[0]

    other = source.splits[source.test_name] if source.test_name is not None else source.train
    order = torch.randperm(len(other), generator=generator(seed, "held out")).numpy()
    k = HELD_OUT if other is not source.train else min(HELD_OUT, max(1, n // 10))
    rows = np.arange(n) if other is not source.train else np.sort(order[k:])
    if at_most is not None and len(rows) > at_most:
        chosen = torch.randperm(len(rows), generator=generator(seed, "statistics"))[:at_most].numpy()
        rows = rows[np.sort(chosen)]
    images, held_out = read(source.train, rows), read(other, order[:k])
    if not len(images) or not len(held_out):
        raise InputError(
            f"{source.origin} has too few readable images to train on some and test on others; add images"
        )
    return images, held_out


@torch.no_grad()
def latent_statistics(model: Codec, images: Tensor, *, bar: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) float32 of latents by channel.

    Of images (n, 3, H, W) uint8; `bar` shows progress.
    """
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for b in progress(images.split(64), desc="statistics of latents", unit="batch", main=bar):
        z = encode_latents(model, to_signed(b)).double().cpu()
        count += z.numel() // z.shape[1]
        total, squares = total + z.sum((0, 2, 3)), squares + z.square().sum((0, 2, 3))
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()
