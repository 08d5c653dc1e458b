"""Stored labels of views go to the Hub with their sets when asked for, over HTTP."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Hub, running
from sets import make
from tiny_teachers import MEAN, STD, TinyNet

from dq.config.students import RelabelConfig, StudentConfig
from dq.labels.files import read_labels, write_manifest, write_shard
from dq.labels.plan import make_plan
from dq.networks.teacher import Teacher

ASK = ("--set", "hub.view_labels=true")
WHERE = "ipc2-ddoq/view_labels/ipc2-ddoq-0"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running("dq.cli.main", "dq.distilled.hub") as server:
        yield server


def save(run: Path, images: torch.Tensor) -> None:
    dataclasses.replace(make(), images=images, provenance={}).save(run / "dataset", "ipc2-ddoq")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a set of six images and labels of their views in two epochs."""
    folder, images = tmp_path / "run", make().images
    save(folder, images)
    teacher = Teacher(TinyNet(3).eval().requires_grad_(False), MEAN, STD, 8, "tiny", "tiny")
    student = StudentConfig(
        net="convnet3", labels="soft", epochs=2, batch_size=6, augment="none", relabel=RelabelConfig()
    )
    plan = make_plan(images, [teacher], 3, student)
    labels = folder / "labels" / "ipc2-ddoq-0"
    write_manifest(labels, images, plan, [teacher], set="ddoq", ipc="2")
    for epochs in plan.shards():
        write_shard(labels, images, [teacher], plan, epochs)
    return folder


def push(hub: Hub, run: Path, name: str, *more: str) -> tuple[str, dict[str, bytes], str]:
    """What a push logs, the files of labels in the repository after it, and the card."""
    done = hub.cli(run, "push", str(run), "--repo_id", name, *more)
    assert done.returncode == 0, done.stderr
    files = hub.files(f"me/{name}")
    card = files["README.md"].decode()
    return done.stderr, {f: data for f, data in files.items() if "/view_labels/" in f}, card


def test_labels_of_views_stay_here_unless_asked_for(hub: Hub, run: Path) -> None:
    log, files, card = push(hub, run, "without")
    assert "labels of views (" in log
    assert "are not pushed; --set hub.view_labels=true adds them" in log
    assert not files
    assert "stores them) are not included" in card


def test_labels_of_views_are_read_from_the_repository(hub: Hub, run: Path, tmp_path: Path) -> None:
    log, files, card = push(hub, run, "with", *ASK)
    assert "go with the sets" in log
    assert set(files) == {f"{WHERE}/{f.name}" for f in (run / "labels" / "ipc2-ddoq-0").iterdir()}
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    here, there = (read_labels(f, make().images) for f in (run / "labels" / "ipc2-ddoq-0", tmp_path / WHERE))
    assert all(torch.equal(here(epoch).logits, there(epoch).logits) for epoch in (1, 2))
    assert "`ipc2-ddoq/view_labels`" in card
    # a push without them keeps those of the same images, and removes those of others
    assert push(hub, run, "with")[1:] == (files, card)
    save(run, 255 - make().images)
    log, files, card = push(hub, run, "with")
    assert not files
    assert "`ipc2-ddoq/view_labels`" not in card
    assert "labels of views" not in log


def test_missing_labels_of_views_are_an_error(hub: Hub, run: Path) -> None:
    next((run / "labels" / "ipc2-ddoq-0").glob("*.safetensors")).unlink()
    done = hub.cli(run, "push", str(run), "--repo_id", "none", *ASK)
    assert done.returncode == 2
    assert "no complete labels of views of these sets are stored" in done.stderr
    assert ("dataset", "me/none") not in hub.repos
