"""Runs with stages of refinement, and teachers with batch norm for them."""

from __future__ import annotations

from pathlib import Path

import torch
from runs import config

SHORT = {"stage": "fadrm", "sizes": [8, 8, 8], "steps": [3, 3, 3], "lr": 0.05, "batch_size": 3, "jitter": 1}
TEDDY = {"stage": "teddy", "steps": 4, "batch_size": 9, "min_classes": 2}


def bn_teacher(images: torch.Tensor, labels: torch.Tensor, folder: Path, name: str, seed: int) -> dict:
    """A teacher with batch norm that tells the toy classes apart."""
    from safetensors.torch import save_file

    from dq.networks.zoo import make_net

    net = make_net("convnet3-bn", 3, 8, seed=seed)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net((images - 0.5) / 0.5), labels).backward()
        optimizer.step()
    save_file(net.state_dict(), folder / f"{name}.safetensors")
    path = str(folder / f"{name}.safetensors")
    return {"net": "convnet3-bn", "path": path, "mean": [0.5] * 3, "std": [0.5] * 3}


def refining(world: Path, out: Path, teachers: list[dict], refine: list[dict], **more) -> Path:
    return config(
        world,
        out,
        ipc=[3],
        methods={"ddoq": {"representative": "centroid", "weights": "sqrt"}},
        teachers=teachers[:1],
        refine=refine,
        evaluate__students=[],
        **more,
    )
