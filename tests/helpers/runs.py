"""Configurations of runs of seconds, their start in a process, and what they leave."""

from __future__ import annotations

from pathlib import Path

import yaml
from forking import Forked

from dq.cli.main import main
from dq.config.reader import from_dict
from dq.config.schema import RunConfig

STUDENTS = [
    {"net": "convnet3", "epochs": {"default": 2}, "tests": 2, "select": "test"},
    {
        "net": "resnet20",
        "labels": "fixed",
        "epochs": {"default": 1},
        "optimizer": "adamw",
        "lr": 1e-3,
        "tests": 1,
    },
]


def config(world: Path, out: Path, **changes) -> Path:
    """A complete configuration file for a run of seconds."""
    data = {
        "output_dir": str(out / "run"),
        "cache_dir": str(out / "cache"),
        "source": {"path": str(world / "images")},
        "codec": {"path": str(world / "vae"), "resolution": 8, "batch_size": 4, "dtype": "float32"},
        "ipc": [1, 3],
        "methods": {
            "ddoq": {"representative": "centroid", "weights": "sqrt"},
            "d4m": {"representative": "centroid", "weights": "uniform", "override": {"cluster.engine": "minibatch"}},
            "real": {"representative": "real", "weights": "mass"},
        },
        "evaluate": {
            "seeds": 2,
            "students": [
                {"net": "convnet3", "epochs": {"default": 2}, "dtype": "float32", "tests": 2},
            ],
        },
    }
    for key, value in changes.items():
        node = data
        *path, last = key.split("__")
        for p in path:
            node = node.setdefault(p, {})
        node[last] = value
    from_dict(RunConfig, data)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "config.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def results(out: Path) -> dict[str, bytes]:
    """Everything in a run folder that must not depend on kills, processes or time."""
    run = out / "run"
    files = [*run.glob("prototypes/*/*.safetensors"), *run.glob("images/*/*.safetensors")]
    files += [*run.glob("labels/*.safetensors"), *run.glob("dataset/*/*.parquet"), *out.glob("cache/*/*.safetensors")]
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


def full(world: Path, out: Path, teacher: Path | None = None, **more) -> Path:
    return config(
        world,
        out,
        generate__mode="dit",
        generate__model=str(world / "dit"),
        generate__num_inference_steps=4,
        generate__batch_size=5,
        generate__dtype="float32",
        teachers=[
            {
                "net": "convnet3",
                "path": str(teacher or world / "teacher.safetensors"),
                "mean": [0.5] * 3,
                "std": [0.5] * 3,
            }
        ],
        **{"evaluate__students": STUDENTS, **more},
    )


def launch(file: Path, verb: str = "run", *more: str, processes: int = 1) -> Forked:
    """A verb in processes of its own. Starts of the interpreter and of launchers are tested in `test_launch.py`."""
    return Forked(lambda: main([verb, "--config", str(file), "--cpu", *more]), processes)
