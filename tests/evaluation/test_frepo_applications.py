"""The applications of FRePo in `pipelines/`: parts of classes, unions, members and others, attacks, resuming."""

from __future__ import annotations

import argparse
import csv
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dq.core.errors import InputError
from dq.core.files import read_tensors
from dq.data.load import load_source
from dq.data.zca import Whitening, fit_whitening
from dq.refine import record
from dq.refine.method import Batch, RealImages, Resources, Session

PIPELINES = Path(__file__).parents[2] / "pipelines"
QUICK = ["--data=sklearn:digits", "--image_size=8", "--net=frepoconv3w32", "--lr=0.05", "--real_batch=32"]
QUICK += ["--student_lr=1e-3", "--student_batch=50", "--steps=3", "--ipc=1"]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(PIPELINES))
    return importlib.import_module


@pytest.fixture
def calls(pipeline: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What FRePo and the trainings of networks are given, while both run as they are."""
    frepo_sets = pipeline("frepo_sets")
    refine, train = frepo_sets.refine, frepo_sets.train
    records = SimpleNamespace(real=[], start=[], sets=[])

    def spied_refine(batch: Batch, config: Any, resources: Resources, session: Session) -> Any:
        records.real.append(resources.real)
        records.start.append(batch.images)
        return refine(batch, config, resources, session)

    def spied_train(data: Any, *args: Any) -> Any:
        records.sets.append(data)
        return train(data, *args)

    monkeypatch.setattr(frepo_sets, "refine", spied_refine)
    monkeypatch.setattr(frepo_sets, "train", spied_train)
    return records


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()[1:]))


def among(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Whether each image is one of others."""
    return (images[:, None] == others[None]).flatten(2).all(2).any(1)


def digits() -> RealImages:
    source = load_source("sklearn:digits")
    images = torch.stack([torch.as_tensor(source.train.read(i)) for i in range(len(source.train))])
    return RealImages(images.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(source.train.labels))


def test_parts_hold_every_class_once_in_an_order_of_their_seed(pipeline: Callable[[str], ModuleType]) -> None:
    class_parts = pipeline("continual_learning").class_parts
    parts = class_parts(10, 4, 0)
    assert [len(p) for p in parts] == [3, 3, 2, 2]
    assert sorted(torch.cat(parts).tolist()) == list(range(10))
    assert all(torch.equal(a, b) for a, b in zip(parts, class_parts(10, 4, 0), strict=True))
    assert not torch.equal(torch.cat(parts), torch.cat(class_parts(10, 4, 1)))
    with pytest.raises(InputError, match="10 classes make 1 to 10 parts, not 11; change --parts"):
        class_parts(10, 11, 0)


def test_parts_are_distilled_apart_and_networks_learn_their_union(
    pipeline: Callable[[str], ModuleType], calls: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    continual = pipeline("continual_learning")
    settings = ["--parts=2", "--student_steps=4", "--larger=3", "--test_per_class=4", "--seeds=2"]
    command = [*QUICK, *settings, f"--output_dir={tmp_path}/sets", "--csv", str(tmp_path / "a.csv")]
    continual.main(command)
    first, second = (set(p.tolist()) for p in continual.class_parts(10, 2, 0))
    assert [set(r.labels.tolist()) for r in calls.real] == [first, second]  # real images of its own classes alone
    assert len(calls.sets) == 2 * 2 * 3
    assert all(targets.shape == (len(images), 10) for images, targets in calls.sets)  # all classes from the start on
    (early, early_labels), (union, union_labels) = calls.sets[0], calls.sets[6]
    assert set(early_labels.argmax(1).tolist()) == first
    torch.testing.assert_close(union[:5], early)
    torch.testing.assert_close(union_labels[:5], early_labels)
    assert set(union_labels[5:].argmax(1).tolist()) == second
    assert not torch.allclose(early, calls.start[0], atol=0.01)
    # random real images, another subset for every seed, and more of them
    subsets = [calls.sets[i] for i in (1, 4)]
    assert [len(x) for x, _ in subsets] == [5, 5]
    assert all(bool(among(x, calls.real[0].images).all()) for x, _ in subsets)
    assert not torch.equal(subsets[0][0], subsets[1][0])
    assert [len(calls.sets[i][0]) for i in (2, 8)] == [15, 30]
    rows = read(tmp_path / "a.csv")
    assert [(r["part"], r["classes"], r["set"], r["images"]) for r in rows[::3]] == [
        ("1", "5", "frepo", "5"),
        ("1", "5", "frepo", "5"),
        ("2", "10", "frepo", "10"),
        ("2", "10", "frepo", "10"),
    ]
    # of 4 test images of each class that was seen
    assert all(abs(round(n) - n) < 1e-3 for r in rows if (n := float(r["accuracy"]) * 4 * int(r["classes"])) >= 0)
    assert "10 classes, random, 3 per class: " in capsys.readouterr().out
    head = (tmp_path / "a.csv").read_text().partition("\n")[0]
    assert head.startswith("# python pipelines/continual_learning.py --data=sklearn:digits --image_size=8 ")
    assert " --output_dir=sets --csv a.csv  (" in head  # no places of this machine
    # a second time nothing is learned, and the file stays; after a kill what was lost is made again alike
    whole = (tmp_path / "a.csv").read_text()
    calls.sets.clear()
    continual.main(command)
    assert not calls.sets
    (tmp_path / "a.csv").write_text("".join(whole.splitlines(keepends=True)[:-2]))
    continual.main(command)
    assert len(calls.sets) == 2
    assert len(calls.real) == 2
    assert (tmp_path / "a.csv").read_text() == whole
    with pytest.raises(InputError, match=r"a\.csv .*another command.*--csv"):
        continual.main([*command, "--order_seed", "1"])


def test_networks_learn_the_optimized_set_and_not_its_start(
    pipeline: Callable[[str], ModuleType], calls: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    membership = pipeline("membership_inference")
    settings = ["--chunk=20", "--student_steps=4", "--augment=none", "--seeds=1"]
    command = [*QUICK, *settings, f"--output_dir={tmp_path}/sets", f"--csv={tmp_path}/a.csv"]
    membership.main(command)
    (members,) = calls.real
    assert torch.bincount(members.labels).tolist() == [20] * 10
    (path,) = (tmp_path / "sets").iterdir()
    stored, _ = read_tensors(path)
    optimized, drawn, everything = calls.sets[:3]
    assert torch.equal(optimized[0], stored["images"])
    assert torch.equal(optimized[1], stored["labels"])
    assert float((optimized[0] - calls.start[0]).abs().mean()) > 0.005
    assert torch.equal(drawn[0].float() / 255, calls.start[0])  # the random members of seed 0 are where it started
    assert torch.equal(everything[0], members.images)
    rows = read(tmp_path / "a.csv")
    sizes = {(r["set"], r["images"], r["steps"]) for r in rows}
    assert sizes == {("frepo", "10", "4"), ("random", "10", "4"), ("all members", "200", "4")}
    assert len({r["attack"] for r in rows}) == 6
    assert "frepo, 4 steps, threshold on the loss: AUC 0." in capsys.readouterr().out
    calls.sets.clear()
    membership.main(command)
    assert not calls.sets


def test_a_killed_distillation_goes_on_bit_for_bit(
    pipeline: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frepo_sets = pipeline("frepo_sets")
    monkeypatch.setattr(record, "SAVE_SECONDS", 0.0)
    real = frepo_sets.take(digits(), slice(0, 60))
    start, whitening = frepo_sets.random_images(real, 1, 0), fit_whitening(real.images)
    args = argparse.Namespace(steps=4, lr=0.05, net="frepoconv3w32", real_batch=32, device="cpu")
    args.output_dir = tmp_path / "whole"
    whole = frepo_sets.distill(start, real, whitening, 10, args)
    args.output_dir = tmp_path / "killed"
    write, steps = frepo_sets.write_tensors, []

    def write_and_stop(path: Path, tensors: Any, meta: Any = None) -> None:
        write(path, tensors, meta)
        steps.append(meta and meta["steps"])
        if steps == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(frepo_sets, "write_tensors", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        frepo_sets.distill(start, real, whitening, 10, args)
    again = frepo_sets.distill(start, real, whitening, 10, args)
    assert steps == [1, 2, 3, None]  # two states, the third step's, and the set
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    assert [p.name for p in (tmp_path / "killed").iterdir()] == [p.name for p in (tmp_path / "whole").iterdir()]


def test_members_and_others_are_disjoint_and_balanced(pipeline: Callable[[str], ModuleType]) -> None:
    chunks = pipeline("membership_inference").chunks
    labels = np.arange(40) % 4
    members, others = chunks(labels, 5)
    assert sorted([*members, *others]) == list(range(40))
    assert np.bincount(labels[members]).tolist() == np.bincount(labels[others]).tolist() == [5, 5, 5, 5]
    with pytest.raises(InputError, match=r"need 12 .*class 0 has 10; lower"):
        chunks(labels, 6)


def test_attackers_are_not_tested_on_what_they_saw(pipeline: Callable[[str], ModuleType]) -> None:
    attacks = pipeline("membership_attacks")
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(2, 600, 4)).astype(np.float32)
    forest = attacks.ATTACKERS["random forest"](0).fit(noise.reshape(-1, 4), np.repeat([1, 0], 600))
    assert forest.score(noise.reshape(-1, 4), np.repeat([1, 0], 600)) > 0.8  # it memorizes noise
    for name, (auc, accuracy) in attacks.attack(*noise, seed=0).items():
        assert 0.42 < auc < 0.58, name
        assert 0.42 < accuracy < 0.58, name
    noise[0] -= 5  # a lower loss, and all else that tells members apart
    for name, (auc, accuracy) in attacks.attack(*noise, seed=0).items():
        assert auc > 0.99, name
        assert accuracy > 0.97, name
    assert attacks.loss_auc(*noise) > 0.99


def test_attacks_recognize_images_that_a_network_memorized(pipeline: Callable[[str], ModuleType]) -> None:
    frepo_sets, attacks = pipeline("frepo_sets"), pipeline("membership_attacks")
    real = digits()
    whitening: Whitening = fit_whitening(real.images)
    g = torch.Generator().manual_seed(0)
    # classes that do not depend on images have to be memorized
    shuffled = RealImages(real.images, real.labels[torch.randperm(len(real.labels), generator=g)])
    members, others = (frepo_sets.take(shuffled, slice(i, i + 80)) for i in (0, 80))
    args = argparse.Namespace(device="cpu", net="frepoconv3w32", student_batch=80, student_lr=3e-3, augment="none")

    def auc(steps: int) -> float:
        net = frepo_sets.train(frepo_sets.with_targets(members, 10), whitening, steps, 0, args)
        return attacks.loss_auc(*(attacks.outputs(net, r, whitening) for r in (members, others)))

    assert 0.4 < auc(1) < 0.6
    assert auc(120) > 0.9


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x"])
def test_counts_are_positive_whole_numbers(
    pipeline: Callable[[str], ModuleType], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        pipeline("continual_learning").main(["--data", "x", "--csv", "x", "--output_dir", "x", f"--seeds={value}"])
    assert f"--seeds: needs a whole number of at least 1, not '{value}'" in capsys.readouterr().err
