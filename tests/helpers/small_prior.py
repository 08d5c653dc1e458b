"""Settings and steps that the tests of the trainers share."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dq.config.prior import PriorConfig, TrainCodecConfig, TrainDenoiserConfig
from dq.config.schema import CodecConfig, SourceConfig
from dq.core.files import read_json
from dq.data.source import ImageSource
from dq.diffusion.codec import Codec
from dq.diffusion.latents import LatentCache, encode_source, open_cache
from dq.diffusion.prior import train_denoiser as denoiser_module
from dq.diffusion.prior import training

SOURCE = SourceConfig(image_size=8)
CODEC = CodecConfig(resolution=8)
NAMES = ("red", "green", "blue")
SMALL = PriorConfig(
    codec=TrainCodecConfig(
        latent_channels=2, block_out_channels=(8, 16), steps=120, batch_size=16, lr=5e-3, ema=0.9, save_every=45
    ),
    denoiser=TrainDenoiserConfig(
        num_layers=1, num_attention_heads=2, attention_head_dim=16, steps=240, batch_size=32, lr=5e-3,
        schedule="cosine", warmup_steps=10, ema=(0.5, 0.95, 0.98), save_every=100,
    ),
)  # fmt: skip


def prior_in(folder: Path, codec: dict | None = None, denoiser: dict | None = None, **changes) -> PriorConfig:
    return dataclasses.replace(
        SMALL,
        output_dir=str(folder),
        codec=dataclasses.replace(SMALL.codec, **(codec or {})),
        denoiser=dataclasses.replace(SMALL.denoiser, **(denoiser or {})),
        **changes,
    )


def encoded(source: ImageSource, folder: Path, codec: Codec, *, flip: bool = False) -> LatentCache:
    cache = open_cache(folder, source, codec, CODEC, 0, flip=flip)
    encode_source(source, codec, cache, CODEC, seed=0, main=False)
    return cache


def metrics(folder: Path, stage: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "stage"} for line in lines if line["stage"] == stage]


def every_image(source: ImageSource, split: str = "train") -> tuple[Tensor, Tensor]:
    """Images (n, 3, H, W) uint8 and labels (n,)."""
    part = source.splits[split]
    return torch.stack([torch.from_numpy(part.read(i)) for i in range(len(part))]), torch.from_numpy(part.labels)


class Saying(nn.Module):
    """In place of a denoiser: says one thing, and remembers what it was asked."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        self.x, self.timestep, self.class_labels = x, timestep, class_labels
        return SimpleNamespace(sample=self.output)


def captured(monkeypatch, *args, **kwargs) -> SimpleNamespace:
    """What `train_denoiser` hands to the loop, without training."""

    class Enough(Exception):
        pass

    def take(recipe, objective, batch, **rest):
        raise Enough(SimpleNamespace(recipe=recipe, objective=objective, batch=batch, **rest))

    with monkeypatch.context() as m:
        m.setattr(denoiser_module, "fit", take)
        with pytest.raises(Enough) as e:
            denoiser_module.train_denoiser(*args, **kwargs)
    return e.value.args[0]


@contextlib.contextmanager
def interrupted_at_save(monkeypatch, number: int):
    """Ctrl-C while the training is about to log its save of this number: later steps are lost."""
    written = []

    def append(path, record):
        written.append(record)
        if len(written) == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(training, "append_jsonl", append)
        with pytest.raises(KeyboardInterrupt):
            yield


def assert_nearly_same_model(a: Path, b: Path, lr: float) -> None:
    """Within 1 % of the longest way that Adam can go, except for biases of keys: softmax takes away what they add to
    all scores alike, so that their gradient is nothing but rounding, which Adam scales up."""
    first, theirs = (load_file(p / "diffusion_pytorch_model.safetensors") for p in (a, b))
    assert first.keys() == theirs.keys()
    for name in first:
        if not name.endswith("to_k.bias"):
            torch.testing.assert_close(
                first[name], theirs[name], rtol=0, atol=0.01 * lr, msg=lambda m, n=name: f"{n}: {m}"
            )


def assert_same_model(a: Path, b: Path) -> None:
    first, theirs = (load_file(p / "diffusion_pytorch_model.safetensors") for p in (a, b))
    assert first.keys() == theirs.keys()
    for name in first:
        assert torch.equal(first[name], theirs[name]), name
    assert read_json(a / "config.json") == read_json(b / "config.json")
