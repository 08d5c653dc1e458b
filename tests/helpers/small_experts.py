"""Expert trajectories of networks of a few parameters on images of 8 px."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dq.config.overrides import apply_settings
from dq.config.schema import RunConfig
from dq.networks.train_experts import train_experts

NET = "convnet2w4"


def experts_in(folder: Path, source: Any, accelerator: Any, **more: Any) -> Path:
    """Train experts by `dq train-experts`, with `more` of its settings, and return their folder."""
    t = {"net": NET, "epochs": 6, "batch_size": 8, "lr": 0.2, "optimizer": "sgd", "whiten": True, "number": 2}
    t |= {"augment": "none", "output_dir": str(folder / "experts"), **more}
    values = {f"train_experts.{k}": v for k, v in t.items()} | {"source.image_size": 8, "cache_dir": str(folder / "c")}
    config = apply_settings(RunConfig(), {**values, "evaluate.validation_images": 6})
    return train_experts(config, source, accelerator=accelerator)
