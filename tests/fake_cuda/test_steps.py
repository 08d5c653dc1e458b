"""What one step of each loop costs on a device: launches, waits of the host, and copies.

A budget is the number that was measured when it was written; a change that lowers it may lower the budget. Counts are
of tiny networks, so that the part around the network, which is dq's own, is most of them. Every copy from pageable
memory makes the host wait as well; it is counted as a copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_dit, tiny_kl, toy_splits
from refined import refined
from small_prior import CODEC, NAMES, encoded, prior_in
from tiny_teachers import TinyNet, drawn, images_of, teacher_of

from dq.config.refinement import FADRM, FRePo
from dq.config.students import StudentConfig
from dq.core.processes import make_accelerator
from dq.data.load import load_source
from dq.diffusion.class_sampling import ClassModel, sample_latents
from dq.diffusion.prior.train_codec import train_codec
from dq.diffusion.prior.train_denoiser import train_denoiser
from dq.networks.training import TrainingSet, fit, normalizer
from dq.refine import fadrm, frepo
from dq.refine.method import Batch, RealImages
from fake_cuda.device_log import LAUNCH, TO_DEVICE, TO_HOST, WAIT, Counts, DeviceLog

DEVICE = torch.device("cuda")


def assert_within(log: DeviceLog, work: Callable[[int], Any], few: int, many: int, budget: Counts) -> None:
    """Compare what each further step of `work(steps)` costs with a budget."""
    totals = []
    for steps in (few, many):
        log.clear()
        work(steps)
        totals.append(log.counts())
    more, n = totals[1] - totals[0], many - few
    step = Counts(*(-(-getattr(more, f.name) // n) for f in dataclasses.fields(Counts)))  # a broken step counts
    over = [f.name for f in dataclasses.fields(Counts) if getattr(step, f.name) > getattr(budget, f.name)]
    kinds = {"launches": LAUNCH, "waits": WAIT, "to_device": TO_DEVICE, "to_host": TO_HOST}
    lines = [f"  {n:5d} {text}" for name in over for text, n in log.operations(kinds[name]).most_common(12)]
    assert not over, "\n".join([f"a step costs {step}, over {budget} in {', '.join(over)}; {many} steps do:", *lines])


# --- students -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "budget"),
    [
        ({}, Counts(launches=54, waits=0, to_device=0, to_host=0)),
        ({"augment": "dsa"}, Counts(launches=61, waits=0, to_device=1, to_host=0)),
        ({"augment": "crop_flip", "dtype": "bfloat16"}, Counts(launches=97, waits=0, to_device=2, to_host=0)),
        (
            {"labels": "fixed", "optimizer": "adamw", "lr": 0.001, "ema": 0.9},
            Counts(launches=71, waits=0, to_device=0, to_host=0),
        ),
        ({"accumulate": 2, "optimizer": "adamw", "lr": 0.001}, Counts(launches=118, waits=0, to_device=0, to_host=0)),
    ],
    ids=["hard", "dsa", "bfloat16", "fixed", "accumulate"],
)
def test_a_step_of_a_student(device_log: DeviceLog, changes: dict[str, Any], budget: Counts) -> None:
    base = {"net": "convnet3w32", "epochs": 1, "batch_size": 4, "augment": "none", "schedule": "constant", "tests": 1}
    config = StudentConfig(**{**base, "dtype": "float32", **changes})
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 4

    def work(steps: int) -> None:
        n = 4 * steps
        soft = torch.eye(4)[labels[:n]] if config.labels == "fixed" else None
        pixels = normalizer([0.5] * 3, [0.25] * 3)
        x, y = images[:n].to(DEVICE), labels[:n].to(DEVICE)
        fit(TrainingSet(x, y, 4, pixels, soft_labels=soft), config, seed=0)

    assert_within(device_log, work, 2, 6, budget)


# --- refinement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "budget"),
    [
        ({"dtype": "float32"}, Counts(launches=176, waits=0, to_device=1, to_host=0)),
        ({"dtype": "bfloat16"}, Counts(launches=194, waits=0, to_device=1, to_host=0)),
        ({"dtype": "float16"}, Counts(launches=204, waits=2, to_device=1, to_host=0)),
    ],
    ids=["float32", "bfloat16", "float16"],
)
def test_a_step_of_fadrm(device_log: DeviceLog, changes: dict[str, Any], budget: Counts) -> None:
    labels = torch.arange(4)
    teacher = teacher_of(drawn(TinyNet()).to(DEVICE))
    images = images_of(labels, seed=5)

    def work(steps: int) -> None:
        settings = {"sizes": (16,), "lr": 0.01, "batch_size": 4, "jitter": 2, **changes}
        fadrm.refine(Batch(images, labels), FADRM(steps=(steps,), **settings), [teacher])

    assert_within(device_log, work, 2, 6, budget)


# --- prior --------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # samples are drawn at its end
@pytest.mark.parametrize(
    ("dtype", "budget"),
    [
        ("float32", Counts(launches=210, waits=0, to_device=4, to_host=0)),
        ("bfloat16", Counts(launches=303, waits=0, to_device=4, to_host=0)),
    ],
)
def test_a_step_of_the_denoiser(device_log: DeviceLog, dtype: str, budget: Counts, tmp_path: Path) -> None:
    source = load_source(toy_splits(), class_names=list(NAMES))
    codec = tiny_kl().to(DEVICE)
    cache = encoded(source, tmp_path / "cache", codec)
    accelerator = make_accelerator()

    def work(steps: int) -> None:
        changes = {"steps": steps, "save_every": 100, "batch_size": 8, "ema": (0.9,), "dtype": dtype}
        prior = prior_in(tmp_path / f"prior{steps}", denoiser=changes)
        train_denoiser(cache, codec, prior, class_names=NAMES, accelerator=accelerator)

    assert_within(device_log, work, 2, 6, budget)


@pytest.mark.slow  # images are decoded at its end
@pytest.mark.parametrize(
    ("dtype", "budget"),
    [
        ("float32", Counts(launches=371, waits=0, to_device=2, to_host=0)),
        ("bfloat16", Counts(launches=662, waits=0, to_device=2, to_host=0)),
    ],
)
def test_a_step_of_the_codec(device_log: DeviceLog, dtype: str, budget: Counts, tmp_path: Path) -> None:
    source = load_source(toy_splits(), class_names=list(NAMES))
    accelerator = make_accelerator()

    def work(steps: int) -> None:
        changes = {"steps": steps, "save_every": 100, "batch_size": 8, "dtype": dtype}
        train_codec(source, CODEC, prior_in(tmp_path / f"prior{steps}", codec=changes), accelerator=accelerator)

    assert_within(device_log, work, 2, 6, budget)


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("DDIMScheduler", Counts(launches=131, waits=0, to_device=0, to_host=0)),
        ("DPMSolverMultistepScheduler", Counts(launches=134, waits=0, to_device=0, to_host=0)),
        ("EulerDiscreteScheduler", Counts(launches=128, waits=0, to_device=0, to_host=0)),
    ],
)
def test_a_step_of_sampling(device_log: DeviceLog, name: str, budget: Counts) -> None:
    import diffusers

    model = tiny_dit().to(DEVICE)
    scheduler = getattr(diffusers, name)()

    def work(steps: int) -> None:
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        with torch.no_grad():
            sample_latents(
                ClassModel(model, scheduler), [0, 1], generators, guidance_scale=2.0, num_inference_steps=steps
            )

    assert_within(device_log, work, 4, 12, budget)


# --- FRePo --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "budget"),
    [
        ({}, Counts(launches=222, waits=1, to_device=1, to_host=0)),
        ({"chunk": 2, "whiten": False}, Counts(launches=361, waits=1, to_device=1, to_host=0)),
    ],
)
def test_a_step_of_frepo(changes: dict[str, Any], budget: Counts, device_log: DeviceLog) -> None:
    """A step waits once: whether features are finite and their kernel was factored."""
    images, labels = toy_splits()["train"]
    real = RealImages((images * 255).to(torch.uint8), labels)
    settings: dict[str, Any] = {"nets": ("frepoconv3w32",), "pool_size": 1, "max_online": 1000, "real_batch": 8}
    start, classes = images[:6], torch.arange(6) % 3

    def work(steps: int) -> None:
        config = FRePo(steps=steps, lr=0.01, **{**settings, **changes})
        refined(frepo.refine, start, classes, config, real, classes=3, device=DEVICE)

    assert_within(device_log, work, 5, 9, budget)
