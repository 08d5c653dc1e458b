"""A small problem for FRePo: images, settings, and a run of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import tiny_kl
from torch import Tensor

from dq.config.overrides import apply_settings
from dq.config.protocols import student_config
from dq.config.refinement import FRePo
from dq.config.schema import RunConfig
from dq.refine.method import RealImages

SMALL = FRePo(steps=8, lr=0.02, nets=("frepoconv3w32",), pool_size=2, max_online=3, real_batch=16)


def toy(n: int = 40, classes: int = 2, seed: int = 0) -> RealImages:
    """Images of 8 px: class c is a bright bar in column c, in noise."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    x = 0.4 + 0.1 * torch.randn(n, 3, 8, 8, generator=g)
    for c in range(classes):
        x[labels == c, :, :, 2 * c : 2 * c + 2] += 0.3
    return RealImages((x.clamp(0, 1) * 255).to(torch.uint8), labels)


def drawn(classes: int = 2, ipc: int = 1) -> tuple[Tensor, Tensor]:
    labels = torch.arange(classes).repeat_interleave(ipc)
    g = torch.Generator().manual_seed(1)
    return 0.5 + 0.1 * torch.rand(len(labels), 3, 8, 8, generator=g), labels


def short_student(spec: dict[str, Any], **more: Any) -> Any:
    return student_config({**spec, "epochs": 3, "warmup": 1}, **more)


def settings_of(out: Path, **stage: Any) -> RunConfig:
    small = {"steps": 4, "lr": 0.02, "nets": ["frepoconv3w32"], "pool_size": 2, "real_batch": 8}
    return apply_settings(
        RunConfig(output_dir=str(out / "run"), cache_dir=str(out / "cache")),
        {"codec.resolution": 8, "ipc": [2], "refine": [{"stage": "frepo", **small, **stage}]},
    )


def distill(config: RunConfig, source: Any, accelerator: Any) -> Any:
    from dq.run.distill import DistillPipeline

    pipe = DistillPipeline(vae=tiny_kl())
    return pipe.distill(source, ipc=2, config=config, output_dir=config.output_dir, accelerator=accelerator)
