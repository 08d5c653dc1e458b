"""A world of millimeters on disk: images by class, a codec, a DiT and teachers, and a run that uses all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from models import tiny_dit, tiny_kl, toy_splits
from PIL import Image
from torch import Tensor

NAMES = ("red", "green", "blue")  # as folders they come in the order blue, green, red


def make_world(root: Path) -> Path:
    """Write `images/`, `vae/`, `dit/`, `teacher.safetensors` and `bn.safetensors` (with batch norm)."""
    from diffusers import DDIMScheduler
    from safetensors.torch import save_file

    from dq.run.distill import DistillPipeline

    splits = toy_splits()
    for split, (images, labels) in splits.items():
        for i, (x, c) in enumerate(zip(images, labels.tolist(), strict=True)):
            folder = root / "images" / split / NAMES[c]
            folder.mkdir(parents=True, exist_ok=True)
            array = (x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(array).save(folder / f"{i:03d}.png")
    tiny_kl().save_pretrained(root / "vae")
    pipe = DistillPipeline(vae=tiny_kl(), transformer=tiny_dit(), scheduler=DDIMScheduler(clip_sample=False))
    pipe.save_pretrained(root / "dit")
    for name, net in (("teacher", "convnet3"), ("bn", "convnet3-bn")):
        save_file(_taught(net, *splits["train"]), root / f"{name}.safetensors")
    return root


def _taught(name: str, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    from dq.networks.zoo import make_net

    net = make_net(name, 3, 8, seed=0)
    y = torch.tensor([2, 1, 0])[y]
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net((x - 0.5) / 0.5), y).backward()
        optimizer.step()
    return net.state_dict()


def every_stage(world: Path, out: Path) -> Path:
    """A configuration whose run, started in `out`, goes through every kind of unit of work in seconds."""
    teacher = {"path": str(world / "bn.safetensors"), "net": "convnet3-bn", "mean": [0.5] * 3, "std": [0.5] * 3}
    student: dict[str, Any] = {"net": "convnet3w32", "epochs": {"default": 3}, "batch_size": 8, "tests": 1}
    fadrm = {"stage": "fadrm", "sizes": [8, 8, 8], "steps": [2, 2, 2], "lr": 0.05, "batch_size": 3, "jitter": 1}
    soft = {"labels": "soft", "augment": "none", "relabel": {"views": "stored"}}
    data = {
        "output_dir": "run",
        "cache_dir": "cache",
        "source": {"path": str(world / "images")},
        "codec": {"path": str(world / "vae"), "resolution": 8, "batch_size": 4},
        "generate": {"mode": "dit", "model": str(world / "dit"), "num_inference_steps": 4, "batch_size": 4},
        "ipc": [4],
        "methods": {
            "ddoq": {"weights": "sqrt"},
            "joint": {"representative": "medoid", "override": {"cluster.space": "joint"}},
            "real": {"representative": "real", "weights": "mass"},
            "refined": {"refine": [fadrm]},
        },
        "teachers": [teacher],
        "evaluate": {
            "seeds": 1,
            "baselines": ["random", "nearest", "full"],
            "students": [student, {**student, **soft}],
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    file = out / "config.yaml"
    file.write_text(yaml.safe_dump(data))
    return file
