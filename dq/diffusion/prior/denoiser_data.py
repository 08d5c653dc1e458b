"""Latents and batches of a training of a denoiser."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from dq.config.prior import TrainDenoiserConfig
from dq.core.errors import InputError
from dq.core.seeds import generator
from dq.diffusion.latents import LatentCache
from dq.diffusion.prior.denoiser_loss import shift_time
from dq.diffusion.prior.training import MAX_BYTES


@dataclass(frozen=True)
class DenoiserData:
    """Latents in memory, their normalization, and the rows to train on."""

    latents: Tensor  # (n, C, h, w) float16
    labels: Tensor  # (n,) int64
    mirrored: Tensor | None  # (n, C, h, w) float16, of the images mirrored left to right
    classes: int
    train_rows: Tensor  # (m,) int64, ascending
    held_out_rows: Tensor  # (n - m,) int64, ascending
    mean: Tensor  # (C,), subtracted from the latents
    std: Tensor  # (C,), by which they are divided then


def load_data(cache: LatentCache, flipped: LatentCache | None, *, held_out: int, seed: int) -> DenoiserData:
    """Read all latents and hold out at most `held_out`, and a tenth.

    Raises:
        InputError: if they exceed 8 GiB, or those of the mirrored images are of other images.
    """
    order = tuple(range(len(cache.class_names)))
    caches = [dataclasses.replace(c, order=order) for c in (cache, flipped) if c is not None]
    shards: list[list[Tensor]] = [[] for _ in caches]
    size = 0
    for c in range(len(cache.class_names)):
        values, rows = zip(*(each.load(c) for each in caches), strict=True)
        if not torch.equal(rows[0], rows[-1]):
            raise InputError(f"{caches[-1].folder} holds other images than {cache.folder}; delete it to encode again")
        for shard, value in zip(shards, values, strict=True):
            shard.append(value)
            size += value.nbytes
        if size > MAX_BYTES:
            raise InputError(
                f"the latents in {cache.folder} exceed the {MAX_BYTES >> 30} GiB that training holds in memory; "
                "lower codec.resolution, or train on a part of the data"
            )
    counts = torch.tensor([len(z) for z in shards[0]])
    held_out_rows, train_rows = split_rows(int(counts.sum()), held_out, seed)
    return DenoiserData(
        latents=torch.cat(shards[0]),
        labels=torch.repeat_interleave(torch.arange(len(counts)), counts),
        mirrored=torch.cat(shards[1]) if flipped is not None else None,
        classes=len(cache.class_names),
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        mean=torch.zeros(cache.shape[0]),
        std=torch.ones(cache.shape[0]),
    )


def split_rows(n: int, at_most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to hold out and to train on, ascending, of n latents."""
    order = torch.randperm(n, generator=generator(seed, "denoiser", "held out"))
    k = min(at_most, n // 10)
    return order[:k].sort().values, order[k:].sort().values


def channel_statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of latents (n, C, h, w)."""
    count = latents.shape[0] * latents.shape[2] * latents.shape[3]
    mean = sum(z.double().sum((0, 2, 3)) for z in latents.split(4096)) / count
    square = sum((z.double() - mean.view(-1, 1, 1)).square().sum((0, 2, 3)) for z in latents.split(4096)) / count
    return mean.float(), square.sqrt().float()


def training_batch(
    data: DenoiserData, settings: TrainDenoiserConfig, step: int, *, seed: int, shift: float
) -> dict[str, Tensor]:
    """Arguments of `DenoiserLoss` for a step, drawn from (seed, step) alone.

    A share `settings.dropout` of the rows has the null class. `shift` is that of `shift_time`.
    """
    g = generator(seed, "denoiser", step)
    b = settings.batch_size
    rows = data.train_rows[torch.randint(len(data.train_rows), (b,), generator=g)]
    null = torch.rand(b, generator=g) < settings.dropout
    if settings.weighting == "logit_normal":
        levels = torch.randn(b, generator=g).sigmoid()
    else:
        levels = torch.rand(b, generator=g)
    z = data.latents[rows]
    if data.mirrored is not None:  # separate draws, so that all others are those of a training without
        mirror = torch.rand(b, generator=generator(seed, "denoiser flip", step)) < 0.5
        z = torch.where(mirror.view(-1, 1, 1, 1), data.mirrored[rows], z)
    # the null class is the row after the last class
    classes = torch.where(null, data.classes, data.labels[rows])
    batch = {**_noised(data, z, g), "level": shift_time(levels, shift), "labels": classes}
    if settings.contrastive:  # of the whole batch, so that its parts and processes change nothing
        batch["other"] = (batch["noise"] - batch["latents"]).roll(1, 0)
    return batch


def held_out_batch(data: DenoiserData, seed: int) -> dict[str, Tensor]:
    """Arguments of `DenoiserLoss` for all held-out rows.

    Noise levels are evenly spread.
    """
    rows = data.held_out_rows
    levels = (torch.arange(len(rows)) + 0.5) / len(rows)
    noised = _noised(data, data.latents[rows], generator(seed, "denoiser held out"))
    return {**noised, "level": levels, "labels": data.labels[rows]}


def _noised(data: DenoiserData, z: Tensor, g: torch.Generator) -> dict[str, Tensor]:
    """Normalized latents and noise, (b, C, h, w) both."""
    z = (z.float() - data.mean.view(-1, 1, 1)) / data.std.view(-1, 1, 1)
    return {"latents": z, "noise": torch.randn(z.shape, generator=g)}
