"""Every verb of the command line that computes, on the fake device: nothing of it mixes host and device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_world import every_stage

from dq.cli.main import main
from fake_cuda.device_log import DeviceLog

pytestmark = pytest.mark.slow

# in the order of the tests, since each uses what those before it left
VERBS = (
    *("train-codec", "train-denoiser", "prior-report", "train-teachers", "train-pool", "train-experts"),
    *("encode", "cluster", "generate", "refine", "label", "evaluate", "report"),
)
WHOLE_RUNS = ("run in half precision", "dry run")


def matching(out: Path) -> dict[str, Any]:
    """A stage that matches the trajectories of `train-experts`."""
    short = {"steps": 2, "student_steps": 2, "expert_epochs": 1, "start_epochs": [0, 1, 1], "start": "real"}
    return {"stage": "trajectory", "experts": str(out / "experts"), "alpha": 0.25, "min_accuracy": 0.0, **short}


def settings(world: Path, out: Path) -> Path:
    """Settings of all verbs, in seconds: every stage of a run, Teddy, a second engine, and trainings of few steps."""
    file = every_stage(world, out)
    data: dict[str, Any] = yaml.safe_load(file.read_text())
    data |= {name: str(out / data[name]) for name in ("output_dir", "cache_dir")}
    data["methods"] |= {
        "d4m": {"weights": "uniform", "override": {"cluster.engine": "minibatch"}},
        "teddy": {"refine": [{"stage": "teddy", "steps": 3, "batch_size": 9, "min_classes": 2}]},
        "trajectory": {"refine": [matching(out)]},
        "tesla": {"refine": [{**matching(out), "unroll": "tesla", "select": "loss", "checks": 1, "check_epochs": 1}]},
        "gradient": {"refine": [{"stage": "gradient", "net": "convnet2w4", "networks": 1, "passes": 2}]},
        "distribution": {"refine": [{"stage": "distribution", "net": "convnet2w4", "steps": 2}]},
    }
    data["train_teachers"] = {"output_dir": str(out / "teachers"), "nets": ["convnet3-bn"], "epochs": 3}
    data["train_pool"] = {"output_dir": str(out / "pool"), "net": "convnet3-bn", "epochs": [1, 2]}
    data["train_pool"]["window"] = [0.0, 9.0]  # whatever their accuracy
    data["train_experts"] = {"output_dir": str(out / "experts"), "net": "convnet2w4", "epochs": 2, "number": 2}
    data["train_experts"] |= {"lr": 0.1, "side_by_side": 2}
    steps = {"steps": 4, "batch_size": 8, "save_every": 2}
    data["prior"] = {
        "output_dir": str(out / "prior"),
        "codec": {"latent_channels": 2, "block_out_channels": [8, 16], **steps},
        "denoiser": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, **steps},
    }
    data["prior_report"] = {"per_class": 4, "guidance": [1.0, 2.0], "num_inference_steps": 3}
    data["prior_report"] |= {"shown": 2, "neighbors": 2}
    file.write_text(yaml.safe_dump(data))
    return file


def commands(file: Path, out: Path) -> dict[str, list[str]]:
    """Command lines by name."""

    def line(verb: str, *changes: str) -> list[str]:
        return [verb, "--config", str(file), "--quiet", *(x for c in changes for x in ("--set", c))]

    lines = {verb: line(verb) for verb in VERBS}
    own_codec = f"codec.path={out / 'prior' / 'vae'}"
    lines["train-denoiser"] = line("train-denoiser", own_codec)
    folder = f"output_dir={out / 'prior-report'}"
    lines["prior-report"] = line("prior-report", own_codec, f"generate.model={out / 'prior'}", folder)
    half = (
        "codec.dtype=float16",
        "generate.dtype=bfloat16",
        "refine=[]",
        "ipc=[2]",
        "methods={ddoq: {}, r: {refine: "
        "[{stage: fadrm, sizes: [8, 8], steps: [2, 2], batch_size: 3, jitter: 1, lr: 0.05, dtype: float16}]}}",
    )
    half += ("evaluate.students=[{net: convnet3w32, epochs: {default: 1}, batch_size: 4, dtype: bfloat16}]",)
    lines["run in half precision"] = line("run", f"output_dir={out / 'half'}", f"cache_dir={out / 'c'}", *half)
    lines["dry run"] = [*line("run", f"output_dir={out / 'dry'}"), "--dry-run"]
    return lines


@pytest.fixture(scope="module")
def lines(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    out = tmp_path_factory.mktemp("verbs")
    return commands(settings(world, out), out)


@pytest.mark.parametrize("name", [*VERBS, *WHOLE_RUNS])
def test_a_verb_keeps_host_and_device_apart(lines: dict[str, list[str]], device_log: DeviceLog, name: str) -> None:
    assert main(lines[name]) == 0
    if name != "report":
        assert device_log.counts().launches > 10, "it did not work on the device"
