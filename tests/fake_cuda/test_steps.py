"""What one step of each loop costs on a device: launches, waits of the host, and copies.

A budget is the number that was measured when it was written; a change that lowers it may lower the budget. Counts are
of tiny networks, so that the part around the network, which is dq's own, is most of them. Every copy from pageable
memory makes the host wait as well; it is counted as a copy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_dit, tiny_kl, toy_splits
from refined import refined
from small_prior import CODEC, NAMES, encoded, prior_in
from tiny_teachers import TinyNet, drawn, images_of, teacher_of

from dq.config.protocols import student_config
from dq.config.refinement import FADRM, FRePo, Teddy
from dq.config.schema import CodecConfig
from dq.config.students import RelabelConfig, StudentConfig, ViewConfig
from dq.core.processes import make_accelerator
from dq.data.load import load_source
from dq.data.source import ImageSource
from dq.data.views import Views, draw_views
from dq.data.zca import fit_whitening, fit_zca
from dq.diffusion.class_sampling import ClassModel, sample_latents
from dq.diffusion.latents import encode_source, open_cache
from dq.diffusion.prior.train_codec import train_codec
from dq.diffusion.prior.train_denoiser import train_denoiser
from dq.labels.compute import label_epoch
from dq.labels.plan import make_plan
from dq.networks.features import extract_features, open_features
from dq.networks.teacher import IMAGENET, Teacher
from dq.networks.training import TrainingSet, accuracy, fit, normalizer
from dq.networks.zoo import make_net
from dq.refine import fadrm, frepo, teddy
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


# --- encode and features ------------------------------------------------------------------------------------------


def first_images(n: int) -> ImageSource:
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return load_source((images, torch.arange(n) % 2))


def assert_bytes_from_pinned_memory(log: DeviceLog) -> None:
    copies = [text for text in log.operations(TO_DEVICE) if "(8, 3, 8, 8)" in text]
    assert copies
    assert all("uint8 from pinned memory" in text for text in copies)


def test_a_batch_of_encoding(device_log: DeviceLog, tmp_path: Path) -> None:
    """Images come as bytes from pinned memory; the host waits for the test for NaN and for the latents."""
    codec, config = tiny_kl().requires_grad_(False).to(DEVICE), CodecConfig(path="x", resolution=8, batch_size=8)

    def work(steps: int) -> None:
        source = first_images(8 * steps)
        cache = open_cache(tmp_path / str(steps), source, codec, config, 0)
        device_log.clear()  # the digest of the codec reads its weights
        encode_source(source, codec, cache, config, seed=0)

    assert_within(device_log, work, 2, 6, Counts(launches=81, waits=2, to_device=1, to_host=1))
    assert_bytes_from_pinned_memory(device_log)


def test_a_batch_of_features(device_log: DeviceLog, tmp_path: Path) -> None:
    teacher = teacher_of(drawn(TinyNet()).to(DEVICE))

    def work(steps: int) -> None:
        source = first_images(8 * steps)
        cache = open_features(tmp_path / str(steps), source, 8, teacher.digest)
        extract_features(source, dataclasses.replace(teacher, batch_size=8), cache, 8)

    assert_within(device_log, work, 2, 6, Counts(launches=16, waits=1, to_device=1, to_host=1))
    assert_bytes_from_pinned_memory(device_log)


# --- students -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "budget"),
    [
        ({}, Counts(launches=44, waits=0, to_device=0, to_host=0)),
        ({"augment": "dsa"}, Counts(launches=56, waits=0, to_device=0, to_host=0)),
        ({"augment": "crop_flip", "dtype": "bfloat16"}, Counts(launches=87, waits=0, to_device=0, to_host=0)),
        (
            {"labels": "fixed", "optimizer": "adamw", "lr": 0.001, "ema": 0.9},
            Counts(launches=56, waits=0, to_device=0, to_host=0),
        ),
        ({"accumulate": 2, "optimizer": "adamw", "lr": 0.001}, Counts(launches=88, waits=0, to_device=0, to_host=0)),
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

    # an epoch of 8 batches has every kind of draw, each of which is copied once
    assert_within(device_log, work, 8, 10, budget)


@dataclasses.dataclass(frozen=True)
class RandomTargets:
    """Views of an epoch with random logits."""

    views: Views
    logits: torch.Tensor

    def check(self, images: int, student: StudentConfig) -> None:
        assert len(self.logits) == images


def test_a_step_of_the_fadrm_protocol(device_log: DeviceLog) -> None:
    """ResNet-18 on replayed labels of CutMix views, in two parts and bfloat16."""
    student = student_config({"protocol": "fadrm", "net": "resnet18"}, ipc="10", classes=10, image_size=32)
    config = dataclasses.replace(student, epochs=1, batch_size=4, accumulate=2, dtype="bfloat16", tests=1)
    assert config.views.mix == "cutmix"
    assert config.views.crop_scale
    images = torch.randint(0, 256, (8, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 4
    sizes = {"batch_size": config.batch_size, "accumulate": config.accumulate}

    def work(steps: int) -> None:
        n = 4 * steps

        def targets(epoch: int) -> RandomTargets:
            return RandomTargets(draw_views(config.views, n, 12, **sizes, seed=0, epoch=epoch), torch.randn(n, 4))

        x, y, pixels = images[:n].to(DEVICE), labels[:n].to(DEVICE), normalizer([0.5] * 3, [0.25] * 3)
        fit(TrainingSet(x, y, 4, pixels, soft_labels=targets), config, seed=0)

    assert_within(device_log, work, 1, 2, Counts(launches=429, waits=0, to_device=0, to_host=0))


def test_an_epoch_copies_its_draws_from_page_locked_memory(device_log: DeviceLog) -> None:
    """Only the labels of an epoch of replayed labels come from ordinary memory, for which the host waits."""
    views = ViewConfig(crop_scale=(0.1, 1.0), flip=0.5, mix="cutmix", jitter=0.4, shuffle=2)
    config = StudentConfig(net="convnet2w4", epochs=1, batch_size=4, augment="dsa", views=views, tests=1)
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8).to(DEVICE)
    data = TrainingSet(images, (torch.arange(12) % 4).to(DEVICE), 4, normalizer([0.5] * 3, [0.25] * 3))
    epoch = functools.partial(fit, data, seed=0)
    epoch(config)
    counts = []
    for epochs in (1, 2):
        device_log.clear()
        epoch(dataclasses.replace(config, epochs=epochs))
        counts.append(Counter({op: n for op, n in device_log.operations(TO_DEVICE).items() if "pageable" in op}))
    assert counts[0] == counts[1]


def test_a_test_on_images_of_the_host_waits_once(device_log: DeviceLog) -> None:
    images, labels = torch.randint(0, 256, (2500, 3, 8, 8), dtype=torch.uint8), torch.arange(2500) % 4
    net = make_net("convnet2w4", 4, 8, seed=0).to(DEVICE)
    pixels = normalizer([0.5] * 3, [0.25] * 3)
    pixels(images[:1].to(DEVICE))
    device_log.clear()
    accuracy(net, images, labels, pixels=pixels)
    counts = device_log.counts()
    assert (counts.waits, counts.to_host) == (1, 0)
    assert counts.to_device == 1 + 3  # labels, and batches of 1,000
    assert all("pinned" in op for op in device_log.operations(TO_DEVICE))


def test_a_trained_network_is_whole_on_the_device() -> None:
    """Batch norm counts on the host while it is trained."""
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8).to(DEVICE)
    data = TrainingSet(images, (torch.arange(12) % 4).to(DEVICE), 4, normalizer([0.5] * 3, [0.25] * 3))
    config = StudentConfig(net="convnet2w4-bn", epochs=2, batch_size=4, augment="none", tests=1)
    state = fit(data, config, seed=0).net.state_dict()
    assert {x.device.type for x in state.values()} == {"cuda"}
    assert {int(x) for name, x in state.items() if name.endswith("num_batches_tracked")} == {6}


def test_a_whitening_is_copied_once(device_log: DeviceLog) -> None:
    images = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for whiten in (fit_zca(images), fit_whitening(images)):
        x = images.to(DEVICE)
        expected = whiten(x)
        device_log.clear()
        torch.testing.assert_close(whiten(x).cpu(), expected.cpu(), rtol=0, atol=0)
        assert device_log.counts().to_device == 0


# --- labels of views -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("relabel", "budget"),
    [
        ({"statistics": "running"}, Counts(launches=61, waits=0, to_device=0, to_host=0)),
        ({"statistics": "batch"}, Counts(launches=61, waits=0, to_device=0, to_host=0)),
    ],
    ids=["running", "batch"],
)
def test_a_batch_of_labels(device_log: DeviceLog, relabel: dict[str, Any], budget: Counts) -> None:
    """Draws go to the device and logits come back once an epoch; parts go through the teacher together."""
    views = ViewConfig(crop_scale=(0.08, 1.0), flip=0.5, mix="cutmix")
    student = {"net": "convnet3w32", "labels": "soft", "epochs": 1, "batch_size": 4, "accumulate": 2, "views": views}
    config = StudentConfig(**student, relabel=RelabelConfig(**relabel), augment="none")
    teacher = teacher_of(drawn(TinyNet()).to(DEVICE))
    images = torch.randint(0, 256, (96, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def work(steps: int) -> None:
        x = images[: 4 * steps]
        plan = make_plan(x, [teacher], 4, config)
        device_log.clear()
        label_epoch(x.to(DEVICE), [teacher], plan, 0)

    assert_within(device_log, work, 4, 24, budget)


# --- refinement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "budget"),
    [
        ({"dtype": "float32"}, Counts(launches=91, waits=0, to_device=0, to_host=0)),
        ({"dtype": "bfloat16"}, Counts(launches=109, waits=0, to_device=0, to_host=0)),
        ({"dtype": "float16"}, Counts(launches=123, waits=0, to_device=0, to_host=0)),
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


@pytest.mark.parametrize("method", ["fadrm", "teddy"])
def test_a_step_of_refinement_by_a_resnet18(device_log: DeviceLog, method: str) -> None:
    """20 layers of batch norm, whose statistics a step matches at once."""
    labels = torch.arange(2)
    net = make_net("resnet18", 4, 16, seed=0).eval().requires_grad_(False).to(DEVICE)
    teacher = Teacher(net, *IMAGENET, 2, "random", "resnet18")
    images = images_of(labels, seed=5)

    def work(steps: int) -> None:
        settings: dict[str, Any] = {"lr": 0.01, "batch_size": 2, "jitter": 2, "dtype": "float32"}
        if method == "fadrm":
            fadrm.refine(Batch(images, labels), FADRM(sizes=(16,), steps=(steps,), **settings), [teacher])
        else:
            settings |= {"ensemble_labels": False, "proximity": 0.0}
            teddy.refine(Batch(images, labels), Teddy(steps=steps, **settings), [teacher])

    assert_within(device_log, work, 2, 4, Counts(launches=304, waits=0, to_device=0, to_host=0))


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
