"""Groups of real images in runs: partitions, statistics, anchors, resuming, dividing, reuse, and what is refused."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from forking import Forked
from refining import SHORT, refining
from runs import launch
from torch import Tensor

from dq.cli.main import main
from dq.cluster.prototypes import Prototypes
from dq.config.reader import from_dict
from dq.config.teachers import TeacherConfig
from dq.core.files import read_json, read_tensors
from dq.core.seeds import generator
from dq.data.images import read_images
from dq.data.load import load_source
from dq.data.source import ImageSource
from dq.networks.patches import crop_boxes
from dq.networks.teacher_loading import load_teacher
from dq.run.stages import refine_groups

STILL = {"crop_scale": [], "flip": 0.0, "jitter": 0}
BOTH = {**SHORT, **STILL, "compose": "rank", "groups": "gps", "statistics": "group", "anchors": "group"}
STATISTICS = {**BOTH, "anchors": "init"}


def run(file: Path, verb: str = "run", *more: str) -> int:
    return main([verb, "--config", str(file), "--cpu", *more])


def refined(out: Path) -> Path:
    (folder,) = [p.parent for p in out.glob("run/images/*/summary.json")]
    return folder


def results(out: Path) -> dict[str, bytes]:
    """Everything that must not depend on kills or processes."""
    files = [*out.glob("run/images/**/*.safetensors"), *out.glob("run/images/*/manifest.json")]
    files += [*out.glob("cache/gps-*/*"), *out.glob("cache/group-statistics-*/*.safetensors")]
    return {str(f.relative_to(out)): f.read_bytes() for f in files if f.name != ".lock"}


def batches(out: Path) -> list[dict[str, Tensor]]:
    return [read_tensors(f)[0] for f in sorted(refined(out).glob("batch-*.safetensors"))]


@pytest.fixture(scope="module")
def encoded(world, teachers, tmp_path_factory) -> Path:
    """A run that has been drawn, with prototypes."""
    out = tmp_path_factory.mktemp("encoded")
    draw(refining(world, out, teachers, []))
    return out


@pytest.fixture(scope="module")
def grouped(world, teachers, encoded, tmp_path_factory) -> Path:
    """A run with groups by GPS, their statistics and anchors from them."""
    return refine(world, teachers, encoded, tmp_path_factory.mktemp("grouped"), BOTH)


def draw(file: Path) -> Path:
    assert run(file, "encode") == run(file, "cluster") == run(file, "generate") == 0
    return file


def refine(world: Path, teachers: list[dict], encoded: Path, out: Path, stage: dict, code: int = 0) -> Path:
    """Refine a copy of what has been drawn."""
    shutil.copytree(encoded, out, dirs_exist_ok=True)
    assert run(refining(world, out, teachers, [stage]), "refine") == code
    return out


class Seen:
    """The real images of the world, and what the batch norm layers of a teacher see of them."""

    def __init__(self, world: Path, teacher: dict) -> None:
        self.source: ImageSource = load_source(str(world / "images"))
        self.labels = torch.from_numpy(np.asarray(self.source.train.labels))
        self.images = read_images(self.source.train, range(len(self.labels)), 8, self.source.preprocess)[0]
        self.teacher = load_teacher(from_dict(TeacherConfig, teacher), 3, 8)
        self.norms = [m for m in self.teacher.net.modules() if isinstance(m, torch.nn.BatchNorm2d)]

    def inputs(self, rows: Tensor | list[int]) -> list[Tensor]:
        """Inputs (n, C, h, w) float64 of each layer."""
        seen: list[Tensor] = []
        hooks = [m.register_forward_pre_hook(lambda m, args: seen.append(args[0].double())) for m in self.norms]
        self.teacher(self.images[rows].float() / 255)
        for hook in hooks:
            hook.remove()
        return seen

    def statistics(self, rows: Tensor | list[int]) -> tuple[Tensor, Tensor]:
        """Mean and variance of every channel in one pass over images."""
        x = [v.transpose(0, 1).flatten(1) for v in self.inputs(rows)]
        return torch.cat([v.mean(1) for v in x]), torch.cat([v.var(1, correction=0) for v in x])

    def gps(self) -> Tensor:
        terms = []
        for norm, x in zip(self.norms, self.inputs(list(range(len(self.labels)))), strict=True):
            shift = (x.mean((2, 3)) - norm.running_mean).norm(dim=1)
            ratio = (x.var((2, 3), correction=0) + 1e-6) / (norm.running_var + 1e-6)
            terms.append((shift + ratio.log().norm(dim=1)) / x.shape[1] ** 0.5)
        return torch.stack(terms).mean(0)

    def gps_groups(self, number: int) -> list[list[Tensor]]:
        """Rows by class and group."""
        scores = self.gps()
        members = []
        for c in range(3):
            rows = (self.labels == c).nonzero()[:, 0]
            rows = rows[scores[rows].argsort()]
            members.append([rows[len(rows) * j // number : len(rows) * (j + 1) // number] for j in range(number)])
        return members


@pytest.fixture(scope="module")
def seen(world, teachers) -> Seen:
    return Seen(world, teachers[0])


def test_a_batch_is_matched_to_the_statistics_of_one_pass_over_its_groups(grouped, seen):
    statistics = read_tensors(refined(grouped) / "group_statistics.safetensors")[0]
    for rank in range(3):
        mean, var = seen.statistics(torch.cat([groups[rank] for groups in seen.gps_groups(3)]))
        torch.testing.assert_close(statistics["mean-0"][rank].double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics["var-0"][rank].double(), var, rtol=1e-4, atol=1e-5)
    facts = read_json(refined(grouped) / "manifest.json")["groups"]
    assert (facts["by"], facts["groups"], facts["images"]) == ("gps", 9, [2, 3])
    assert (grouped / "cache" / facts["statistics"][0] / "class-00002.safetensors").is_file()


def test_anchors_are_crops_of_images_of_their_group(grouped, seen):
    groups = seen.gps_groups(3)
    for c in range(3):
        anchors = read_tensors(refined(grouped) / "group" / f"class-{c:05d}.safetensors")[0]["images"]
        assert anchors.shape == (3, 3, 8, 8)
        for rank in range(3):
            assert any(_is_crop(anchors[rank], seen.images[row], int(row)) for row in groups[c][rank])
        others = torch.cat([groups[c][r] for r in (1, 2)])
        assert not any(_is_crop(anchors[0], seen.images[row], int(row)) for row in others)


def _is_crop(anchor: Tensor, image: Tensor, row: int) -> bool:
    for top, left, side in crop_boxes(8, 5, generator(0, "patch crops", row)):
        square = image.float()[None, :, top : top + side, left : left + side]
        resized = torch.nn.functional.interpolate(square, (8, 8), mode="bilinear", antialias=True)[0]
        if torch.equal(resized.round().clamp(0, 255).to(torch.uint8), anchor):
            return True
    return False


def test_the_loss_of_a_batch_is_its_distance_to_its_own_groups(world, teachers, encoded, seen, tmp_path):
    out = refine(world, teachers, encoded, tmp_path, {**STATISTICS, "lr": 0.0, "r_bn": 1.0, "first_bn_weight": 1.0})
    groups = seen.gps_groups(3)
    drawn = out / "run" / "images" / read_json(refined(out) / "summary.json")["from"]
    images = torch.stack([read_tensors(drawn / f"class-{c:05d}.safetensors")[0]["images"] for c in range(3)])
    for rank, batch in enumerate(batches(out)):
        seen_by = [v.transpose(0, 1).flatten(1) for v in _inputs(seen, images[:, rank])]
        means, variances = [v.mean(1) for v in seen_by], [v.var(1, correction=0) for v in seen_by]
        sizes = [len(m) for m in means]

        def distance(r: int, m=means, v=variances, n=sizes) -> float:
            mean, var = seen.statistics(torch.cat([g[r] for g in groups]))
            return sum(float((a - b).norm()) for a, b in zip([*mean.split(n), *var.split(n)], [*m, *v], strict=True))

        assert batch["trace"][0, 1].item() == pytest.approx(distance(rank), rel=1e-3)
        assert batch["trace"][0, 1].item() != pytest.approx(distance((rank + 1) % 3), rel=1e-2)


def _inputs(seen: Seen, images: Tensor) -> list[Tensor]:
    kept, seen.images = seen.images, images
    try:
        return seen.inputs(list(range(len(images))))
    finally:
        seen.images = kept


def test_swapped_groups_give_other_images(world, teachers, encoded, grouped, tmp_path, monkeypatch):
    one = refine(world, teachers, encoded, tmp_path / "one", STATISTICS)
    cut = refine_groups.groups_by_score
    monkeypatch.setattr(refine_groups, "groups_by_score", lambda rows, scores, n: cut(rows, -scores, n))
    other = refine(world, teachers, encoded, tmp_path / "other", STATISTICS)
    for rank, (a, b) in enumerate(zip(batches(one), batches(other), strict=True)):
        same = torch.equal(a["images"], b["images"])
        assert not same, rank
    # another run takes the statistics that are there
    assert {p.name for p in one.glob("cache/*")} == {p.name for p in grouped.glob("cache/*")}


def test_groups_may_be_the_cells_of_the_prototypes(world, teachers, encoded, seen, tmp_path):
    cells = {**BOTH, "groups": "cells"}
    out = refine(world, teachers, encoded, tmp_path, cells)
    (points,) = out.glob("run/prototypes/*")
    members: list[list[Tensor]] = []
    for c in range(3):
        t = read_tensors(points / f"class-{c:05d}.safetensors")[0]
        members.append([t["rows"][t["cells"] == k] for k in range(3)])
        assert [len(rows) for rows in members[c]] == t["counts"].tolist()
        assert torch.cat(members[c]).sort().values.tolist() == (seen.labels == c).nonzero()[:, 0].tolist()
        assert all(int(row) in members[c][k] for k, row in enumerate(t["medoid_rows"]))
    statistics = read_tensors(refined(out) / "group_statistics.safetensors")[0]
    for rank in range(3):
        mean, var = seen.statistics(torch.cat([of_class[rank] for of_class in members]))
        torch.testing.assert_close(statistics["mean-0"][rank].double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics["var-0"][rank].double(), var, rtol=1e-4, atol=1e-5)
    assert not list(out.glob("cache/gps-*"))  # which nothing reads


def test_anchors_of_groups_alone_need_no_statistics(world, teachers, encoded, grouped, tmp_path):
    alone = {**BOTH, "statistics": "running", "compose": "index"}
    out = refine(world, teachers, encoded, tmp_path, alone)
    assert not (refined(out) / "group_statistics.safetensors").exists()
    for c in range(3):
        name = f"class-{c:05d}.safetensors"
        assert (refined(out) / "group" / name).read_bytes() == (refined(grouped) / "group" / name).read_bytes()
    assert not torch.equal(batches(out)[0]["images"], batches(grouped)[0]["images"])


@pytest.mark.slow
def test_several_teachers_and_teddy_have_statistics_of_their_own(world, teachers, encoded, tmp_path):
    plus = {**BOTH, "teachers": teachers}
    out = refine(world, teachers, encoded, tmp_path / "plus", plus)
    statistics = read_tensors(refined(out) / "group_statistics.safetensors")[0]
    assert len(list(out.glob("cache/gps-*"))) == len(list(out.glob("cache/group-statistics-*"))) == 2
    second = Seen(world, teachers[1])
    assert statistics["mean-1"].shape == (3, len(second.statistics([0])[0]))
    total = sum(len(f) for f in statistics["mean-1"])
    assert total == statistics["mean-0"].numel()
    assert not torch.equal(statistics["mean-0"], statistics["mean-1"])
    shared = {"compose": "rank", "batch_size": 3, "steps": 3, "min_classes": 2}
    teddy = {"stage": "teddy", "groups": "cells", "statistics": "group", **shared}
    one = refine(world, teachers, encoded, tmp_path / "teddy", teddy)
    other = refine(world, teachers, encoded, tmp_path / "running", {"stage": "teddy", **shared})
    assert not torch.equal(batches(one)[0]["images"], batches(other)[0]["images"])


def test_off_means_the_same_bits_and_folders_of_old(world, teachers, encoded, tmp_path):
    plain = refine(world, teachers, encoded, tmp_path / "plain", {**SHORT, **STILL})
    off = {"groups": "none", "statistics": "running", "anchors": "init"}
    named = refine(world, teachers, encoded, tmp_path / "named", {**SHORT, **STILL, **off})
    assert results(plain) == results(named)
    assert refined(plain).name == refined(named).name
    ranks = refine(world, teachers, encoded, tmp_path / "ranks", {**SHORT, **STILL, "compose": "rank"})
    for a, b in zip(batches(plain), batches(ranks), strict=True):  # three classes in batches of three
        assert torch.equal(a["images"], b["images"])


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_give_the_same_bytes(world, teachers, encoded, grouped, tmp_path):
    shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)
    process = launch(refining(world, tmp_path, teachers, [BOTH]), "refine", processes=2)
    _, message = process.communicate(timeout=240)
    assert process.returncode == 0, message
    assert results(tmp_path) == results(grouped)


@pytest.mark.multi_process
@pytest.mark.parametrize(
    "last", ["class-00001.safetensors", pytest.param("group_statistics.safetensors", marks=pytest.mark.slow)]
)
def test_killed_statistics_go_on_with_the_next_class(world, teachers, encoded, grouped, tmp_path, last):
    shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)
    file = refining(world, tmp_path, teachers, [BOTH])

    def killed() -> int:
        write = refine_groups.write_tensors

        def write_and_die(path: Path, *content: object) -> None:
            write(path, *content)
            if path.name == last:
                os.kill(os.getpid(), signal.SIGKILL)

        refine_groups.write_tensors = write_and_die
        return run(file, "refine")

    process = Forked(killed)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("cache/g*/*.safetensors")}
    assert before
    assert run(file, "refine") == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert results(tmp_path) == results(grouped)


def few_images(world: Path, out: Path, counts: dict[str, int]) -> str:
    """The first images of some classes of the world."""
    for split in ("train", "test"):
        for name, number in counts.items():
            (out / split / name).mkdir(parents=True)
            for image in sorted((world / "images" / split / name).iterdir())[:number]:
                shutil.copy(image, out / split / name)
    return str(out)


@pytest.mark.parametrize("groups", ["gps", pytest.param("cells", marks=pytest.mark.slow)])
def test_a_class_with_fewer_images_than_ipc_has_fewer_groups(world, teachers, tmp_path, groups):
    source = few_images(world, tmp_path / "few", {"red": 9, "green": 9, "blue": 2})
    stage = {**BOTH, "groups": groups, "min_classes": 2}
    assert run(draw(refining(world, tmp_path, teachers, [stage], source__path=source)), "refine") == 0
    statistics = read_tensors(refined(tmp_path) / "group_statistics.safetensors")[0]
    assert len(statistics["mean-0"]) == 3
    assert [len(b["images"]) for b in batches(tmp_path)] == [3, 3, 2]
    facts = read_json(refined(tmp_path) / "manifest.json")["groups"]
    assert facts["groups"] == 8
    assert facts["images"][0] >= 1


def test_one_class_is_grouped_too(world, teachers, tmp_path):
    source = few_images(world, tmp_path / "one", {"red": 9})
    own = {**teachers[0], "classes": [2]}
    assert run(draw(refining(world, tmp_path, [own], [BOTH], source__path=source)), "refine") == 0
    assert [len(b["images"]) for b in batches(tmp_path)] == [1, 1, 1]
    facts = read_json(refined(tmp_path) / "manifest.json")["groups"]
    assert (facts["groups"], facts["images"]) == (3, [3, 3])


def test_a_teacher_without_batch_norm_and_prototypes_of_old_are_said(world, teachers, encoded, tmp_path, capsys):
    plain = {"net": "convnet3", "path": str(world / "teacher.safetensors"), "mean": [0.5] * 3, "std": [0.5] * 3}
    for name, more, message in (
        ("norm", {}, "no teacher has batch norm (convnet3)"),
        ("none", {"r_bn": 0.0}, "groups need a teacher with batch norm, and convnet3 has none"),
    ):
        refine(world, teachers, encoded, tmp_path / name, {**BOTH, **more, "teachers": [plain]}, code=2)
        assert message in capsys.readouterr().err
    shutil.copytree(encoded, tmp_path / "old")
    for path in tmp_path.glob("old/run/prototypes/*/class-*.safetensors"):
        p = Prototypes.load(path)
        Prototypes(**{**vars(p), "rows": None, "cells": None}).save(path)
    assert run(refining(world, tmp_path / "old", teachers, [BOTH]), "refine") == 2
    assert "do not say which images are in their cells" in capsys.readouterr().err


def test_a_dry_run_counts_one_batch_of_each_rank(world, teachers, tmp_path, capsys):
    file = refining(world, tmp_path, teachers, [{**BOTH, "batch_size": 9}])
    assert run(file, "run", "--dry-run") == 0
    assert "fadrm, 9 images in 3 batches, 9 steps" in capsys.readouterr().out
