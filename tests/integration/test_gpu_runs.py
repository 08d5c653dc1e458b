"""Whole runs on a CUDA device against the CPU, steps that do not wait, and memory that ends."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gpu import needs_real_gpu
from launching import torchrun
from models import tiny_dit
from safetensors.torch import load_file
from tiny_teachers import TinyNet, drawn, images_of, teacher_of
from toy_world import every_stage

from dq.cli.main import main
from dq.config.refinement import FADRM
from dq.config.students import StudentConfig
from dq.core import memory
from dq.diffusion.class_sampling import ClassModel, sample_latents
from dq.networks.teacher import Teacher
from dq.networks.training import TrainingSet, fit, normalizer
from dq.networks.zoo import make_net
from dq.refine import fadrm
from dq.refine.method import Batch

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


def configured(world: Path, out: Path) -> Path:
    """A run of every stage in float32."""
    file = every_stage(world, out)
    data: dict[str, Any] = yaml.safe_load(file.read_text())
    data |= {"output_dir": str(out / "run"), "cache_dir": str(out / "cache")}
    data["codec"]["dtype"] = data["generate"]["dtype"] = "float32"
    data["methods"]["refined"]["refine"][0]["dtype"] = "float32"
    data["evaluate"]["students"] = []
    file.write_text(yaml.safe_dump(data))
    return file


def tensors(run: Path, folder: str) -> dict[str, torch.Tensor]:
    """Tensors of a folder of a run by file and name."""
    files = sorted((run / folder).rglob("*.safetensors"))
    return {f"{p.relative_to(run)}:{k}": v for p in files for k, v in load_file(p).items()}


@pytest.mark.slow
def test_a_run_on_the_device_is_that_of_the_cpu(world: Path, tmp_path: Path) -> None:
    # a process of its own: the accelerator of this one cannot leave its device
    command = [sys.executable, "-m", "dq.cli", "run", "--cpu", "--quiet", "--config"]
    done = subprocess.run(
        [*command, str(configured(world, tmp_path / "cpu"))], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert main(["run", "--quiet", "--config", str(configured(world, tmp_path / "gpu"))]) == 0
    cpu, gpu = ({f: tensors(tmp_path / d / "run", f) for f in ("prototypes", "images")} for d in ("cpu", "gpu"))
    assert cpu["images"]
    for folder in cpu:
        assert cpu[folder].keys() == gpu[folder].keys()
    for name, points in cpu["prototypes"].items():
        if name.endswith(":centroids"):
            torch.testing.assert_close(gpu["prototypes"][name], points, rtol=1e-2, atol=1e-2)
    plain = [n for n, v in cpu["images"].items() if v.dtype == torch.uint8 and n.endswith(":images")]
    assert plain
    for name in plain:
        gap = (gpu["images"][name].int() - cpu["images"][name].int()).abs()
        assert float((gap <= 1).float().mean()) > 0.95, name


# --- steps that do not wait ---------------------------------------------------------------------------------------


def student_steps() -> None:
    labels = torch.arange(24) % 4
    x = (images_of(labels, side=16) * 255).to(torch.uint8).to("cuda")
    config = StudentConfig(net="convnet3w32", epochs=1, batch_size=8, augment="dsa", tests=1, dtype="bfloat16")
    fit(TrainingSet(x, labels.to("cuda"), 4, normalizer([0.5] * 3, [0.25] * 3)), config, seed=0)


def fadrm_steps() -> None:
    labels = torch.arange(4)
    config = FADRM(sizes=(16,), steps=(3,), lr=0.01, batch_size=4, jitter=2, dtype="bfloat16")
    fadrm.refine(Batch(images_of(labels), labels), config, [teacher_of(drawn(TinyNet()).to("cuda"))])


def sampling_steps() -> None:
    import diffusers

    model = ClassModel(tiny_dit().to("cuda"), diffusers.DDIMScheduler())
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    sample_latents(model, [0, 1], generators, guidance_scale=2.0, num_inference_steps=4)


@needs_real_gpu("synchronization warnings")
@pytest.mark.parametrize("steps", [student_steps, fadrm_steps, sampling_steps], ids=lambda f: f.__name__)
def test_a_loop_waits_as_often_for_few_steps_as_for_many(steps: Callable[[], None], recwarn: Any) -> None:
    """Copies before the loop and the read of its result wait; no more of them are allowed than six."""
    steps()
    recwarn.clear()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in recwarn if "synchroniz" in str(w.message)]) <= 6


# --- memory -------------------------------------------------------------------------------------------------------


@needs_real_gpu("the end of memory")
def test_a_batch_that_does_not_fit_goes_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_limits", {})
    monkeypatch.setattr(memory, "_fitted", {})
    net = make_net("resnet20", 10, 32, seed=0).eval().to("cuda")
    teacher = Teacher(net, (0.5,) * 3, (0.25,) * 3, 4096, "a teacher", "resnet20")
    images = torch.randint(0, 256, (4096, 3, 32, 32), dtype=torch.uint8)
    small = dataclasses.replace(teacher, batch_size=256).logits(images)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    teacher.logits(images)
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.5 * peak / torch.cuda.get_device_properties(0).total_memory)
    try:
        halved = teacher.logits(images)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert memory._limits
    torch.testing.assert_close(halved, small, rtol=1e-2, atol=1e-2)


@needs_real_gpu("memory")
def test_memory_does_not_grow_over_repeats() -> None:
    for steps in (student_steps, fadrm_steps):
        steps()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(5):
            steps()
        assert torch.cuda.memory_allocated() <= before + (1 << 20)


# --- processes ----------------------------------------------------------------------------------------------------


@needs_real_gpu("several processes")
@pytest.mark.multi_process
@pytest.mark.timeout(300)
@pytest.mark.parametrize("shared", [True, False], ids=["gloo on one card", "a card each"])
def test_two_processes_draw_what_one_draws(world: Path, tmp_path: Path, shared: bool) -> None:
    if not shared and torch.cuda.device_count() < 2:
        pytest.skip("needs a real GPU for each of two processes")
    one, two = configured(world, tmp_path / "one"), configured(world, tmp_path / "two")
    assert main(["run", "--config", str(one), "--quiet"]) == 0
    flags = ["--share_gpus"] if shared else []
    command = [*torchrun(2), "-m", "dq.cli", "run", "--config", str(two), "--quiet", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (tensors(tmp_path / d / "run", "images") for d in ("one", "two"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        if value.dtype == torch.uint8:
            assert int((value.int() - second[name].int()).abs().max()) <= 1, name
