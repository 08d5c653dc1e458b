"""Students and labels on a CUDA device: every protocol, resumed as uninterrupted, stored labels as computed ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_teachers import TinyNet, drawn, images_of, teacher_of
from torch import Tensor

from dq.config.protocols import list_protocols, student_config
from dq.config.students import RelabelConfig, StudentConfig, ViewConfig
from dq.labels.compute import label_epoch, online_labels
from dq.labels.files import read_labels, write_manifest, write_shard
from dq.labels.plan import make_plan
from dq.networks.training import Checkpoint, Fitted, TrainingSet, fit, normalizer

pytestmark = pytest.mark.gpu
PIXELS = normalizer([0.5] * 3, [0.25] * 3)
VIEWS = ViewConfig(crop_scale=(0.08, 1.0), flip=0.5, mix="cutmix")
SOFT = StudentConfig(
    net="convnet3w32", epochs=3, batch_size=6, accumulate=2, augment="none", labels="soft", optimizer="adamw",
    lr=0.001, views=VIEWS, relabel=RelabelConfig(statistics="batch"), schedule="constant", tests=1, dtype="float32",
)  # fmt: skip
LABELS = torch.arange(18) % 4
IMAGES = (images_of(LABELS, side=16) * 255).to(torch.uint8)


def data(soft: Any = None) -> TrainingSet:
    return TrainingSet(IMAGES.to("cuda"), LABELS.to("cuda"), 4, PIXELS, soft_labels=soft)


def weights(fitted: Fitted) -> dict[str, Tensor]:
    return {k: v.cpu() for k, v in fitted.net.state_dict().items()}


def test_stored_labels_are_those_computed_in_training(tmp_path: Path) -> None:
    teacher = teacher_of(drawn(TinyNet()).to("cuda"))
    plan = make_plan(IMAGES, [teacher], 4, SOFT)
    write_manifest(tmp_path, IMAGES, plan, [teacher])
    for epochs in plan.shards():
        write_shard(tmp_path, IMAGES.to("cuda"), [teacher], plan, epochs)
    stored, online = read_labels(tmp_path, IMAGES), online_labels(IMAGES.to("cuda"), [teacher], plan)
    for epoch in (1, 3):
        torch.testing.assert_close(stored(epoch).logits.cpu(), online(epoch).logits.cpu(), rtol=0, atol=0)
    first, second = (weights(fit(data(source), SOFT, seed=0)) for source in (stored, online))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5)


def test_labels_with_statistics_of_parts_are_those_of_the_cpu() -> None:
    logits = []
    for device in ("cpu", "cuda"):
        teacher = teacher_of(drawn(TinyNet()).to(device))
        logits.append(label_epoch(IMAGES.to(device), [teacher], make_plan(IMAGES, [teacher], 4, SOFT), 1)[1])
    torch.testing.assert_close(logits[1], logits[0], rtol=2e-2, atol=2e-2)  # convolutions in TF32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_student_is_the_uninterrupted_one(tmp_path: Path, dtype: Any) -> None:
    config = dataclasses.replace(SOFT, labels="hard", views=ViewConfig(flip=0.5), augment="dsa", dtype=dtype, ema=0.9)
    whole = weights(fit(data(), config, seed=3))
    checkpoint = Checkpoint(tmp_path / "student.safetensors", every_s=0.0)

    def stop(epoch: int, loss: float) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(data(), config, seed=3, checkpoint=checkpoint, on_epoch=stop)
    resumed = weights(fit(data(), config, seed=3, checkpoint=checkpoint))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-3, atol=1e-4)


def first_loss(config: StudentConfig, device: str) -> float:
    """Mean loss of the first epoch."""
    images, labels = IMAGES.to(device), LABELS.to(device)
    soft: Any = None
    if config.labels == "soft":
        teacher = teacher_of(drawn(TinyNet()).to(device))
        soft = online_labels(images, [teacher], make_plan(IMAGES, [teacher], 4, config))
    elif config.labels == "fixed":
        soft = torch.eye(4)[LABELS]
    losses: list[float] = []
    fit(
        TrainingSet(images, labels, 4, PIXELS, soft_labels=soft),
        config,
        seed=0,
        on_epoch=lambda epoch, loss: losses.append(loss),
    )
    return losses[0]


@pytest.mark.parametrize("protocol", list(list_protocols()))
def test_every_protocol_begins_as_on_the_cpu(protocol: str) -> None:
    spec = {"protocol": protocol, "net": "convnet3w32", "epochs": 1, "batch_size": 6, "tests": 1, "dtype": "float32"}
    config = dataclasses.replace(student_config(spec, ipc="10", classes=4, image_size=16), whiten=False, warmup=0)
    assert first_loss(config, "cuda") == pytest.approx(first_loss(config, "cpu"), rel=2e-2)
