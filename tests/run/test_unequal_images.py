"""Fewer prototypes than images: how images are divided by mass, and what follows from that through a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from models import tiny_dit, tiny_kl
from runs import full

from dq.cli.main import main
from dq.cluster.prototypes import Prototypes, images_by_mass
from dq.config.methods import check_methods
from dq.config.overrides import apply_settings
from dq.config.reader import from_dict
from dq.config.schema import RunConfig
from dq.core.errors import InputError
from dq.core.files import read_metadata, read_tensors
from dq.distilled.set import DistilledSet
from dq.run.distill import DistillPipeline
from dq.run.folder import class_file, open_run
from dq.run.planning.plan import like_source, plan
from dq.run.stages.cluster import cluster, prototype_folder
from dq.run.stages.encode import encode
from dq.run.stages.generate import Draw, generate


def prototypes(counts: list[int], masses: list[float] | None = None) -> Prototypes:
    z = torch.zeros(len(counts), 1, 1, 1)
    rows = torch.arange(len(counts))
    weights = None if masses is None else torch.tensor(masses, dtype=torch.float64)
    return Prototypes(0, "class", z, torch.tensor(counts), rows.double(), z, rows, {}, weights)


@pytest.mark.parametrize(
    ("masses", "total", "numbers"),
    [
        ([4, 3, 2, 1], 10, [4, 3, 2, 1]),
        ([5, 3, 2], 7, [4, 2, 1]),  # shares 3.5, 2.1, 1.4: the largest remainder
        ([1, 1, 1], 7, [3, 2, 2]),  # ties go to the earlier
        ([97, 1, 1, 1], 6, [3, 1, 1, 1]),  # at least one each
        ([50, 48, 1, 1], 5, [2, 1, 1, 1]),  # 2.5 and 2.4 make room for the two that have too little
        ([7], 3, [3]),
        ([0.1, 0.1, 0.1], 3, [1, 1, 1]),
    ],
)
def test_images_follow_masses(masses: list[float], total: int, numbers: list[int]) -> None:
    assert images_by_mass(masses, total) == numbers


def test_images_are_all_given_out() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        k = int(torch.randint(1, 12, (), generator=g))
        total = k + int(torch.randint(0, 40, (), generator=g))
        masses = torch.rand(k, generator=g).pow(3) + 1e-3
        numbers = torch.tensor(images_by_mass(masses, total))
        share = masses / masses.sum() * total
        assert int(numbers.sum()) == total
        assert int(numbers.min()) >= 1
        assert (numbers - share < 1)[numbers > 1].all()
        assert (numbers.diff()[masses.diff() > 0] >= 0).all()  # no order is turned round
    with pytest.raises(InputError, match="2 images are too few for 3 prototypes"):
        images_by_mass([1, 1, 1], 2)
    with pytest.raises(InputError, match="prototype 1 has no mass"):
        images_by_mass([1, 0], 2)


@pytest.mark.parametrize("kind", ["uniform", "mass", "sqrt"])
@pytest.mark.parametrize("normalize", ["none", "class", "sqrt_k"])
def test_images_share_the_mass_of_their_prototype(kind: Any, normalize: Any) -> None:
    p = prototypes([40, 30, 20, 10])
    assert torch.equal(p.image_weights(2, kind, normalize), p.weights(kind, normalize).repeat_interleave(2))
    assert torch.allclose(p.image_weights([2] * 4, kind, normalize), p.image_weights(2, kind, normalize))
    w = p.image_weights([4, 3, 2, 1], kind, normalize)  # every image stands for 10 of train
    assert torch.allclose(w, w[:1].expand(10))
    w = p.image_weights([1, 2, 0, 1], "mass")
    assert w.tolist() == pytest.approx([4 * 40 / 80, 4 * 15 / 80, 4 * 15 / 80, 4 * 10 / 80])  # the third is left out
    assert prototypes([1, 1], [0.75, 0.25]).image_weights([3, 1], "mass").tolist() == pytest.approx([1.0] * 4)


# --- in a run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe() -> DistillPipeline:
    return DistillPipeline(vae=tiny_kl(), transformer=tiny_dit(), scheduler=DDIMScheduler(clip_sample=False))


def test_equal_masses_are_images_per_prototype(tmp_path: Path, toy_source, accelerator, pipe) -> None:
    data = {
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
        "codec": {"resolution": 8},
        "generate": {"mode": "dit", "num_inference_steps": 3, "batch_size": 16},
        "cluster": {"prototypes_per_class": 2},
        "ipc": [6],
    }
    run = open_run(from_dict(RunConfig, data), toy_source, accelerator)
    cache = encode(run, pipe.vae)
    cluster(run, cache)
    points = prototype_folder(run, cache, 6, run.resolved("ddoq"))
    for label in range(3):  # as if all cells had as many images
        p = Prototypes.load(class_file(points, label))
        Prototypes(**{**vars(p), "counts": torch.tensor([4, 4])}).save(class_file(points, label))
    generate(run, pipe, cache)
    made = [read_tensors(f)[0]["images"] for f in sorted(tmp_path.glob("run/images/*/class-*"))]
    resolved = run.resolved("ddoq")
    copied = apply_settings(run.config, {"generate.images_per_prototype": 3}).generate
    by_copies = Draw(run, tmp_path / "copies", points, resolved.method, copied, [])
    assert by_copies.numbers == [[3, 3]] * 3
    assert Draw(run, tmp_path, points, resolved.method, resolved.generate, [], budget=6).numbers == [[3, 3]] * 3
    from dq.run.stages.generate import _generated

    ids = pipe.check_inputs(copied, 8, run.source.class_names)
    by_copies = Draw(run, tmp_path / "copies", points, resolved.method, copied, ids)
    again = [images for *_, images in _generated(pipe, [(by_copies, unit) for unit in by_copies.units])]
    assert torch.equal(torch.cat(again), torch.cat(made))
    assert {read_metadata(f)["copies"] for f in tmp_path.glob("run/images/*/class-*")} == {3}


def test_a_run_with_fewer_prototypes_than_images(world: Path, tmp_path: Path, teachers) -> None:
    chosen = {"candidates": 2, "select": "transport", "select_teacher": teachers[0]}
    fadrm = {"stage": "fadrm", "sizes": [8], "steps": [1], "batch_size": 3, "jitter": 1, "weighted": True}
    fadrm["teachers"] = teachers[:1]
    methods = {
        "few": {"weights": "mass", "override": {"cluster.prototypes_per_class": 2}},
        "chosen": {"refine": [fadrm], "override": {"cluster.prototypes_per_class": 2, "generate": chosen}},
        "small": {"override": {"cluster.prototypes_per_class": 10}},  # more than the images of a class
    }
    file = full(world, tmp_path, ipc=[10], methods=methods, evaluate__students=[])
    assert main(["run", "--config", str(file), "--cpu"]) == 0
    sets = {m: DistilledSet.load(tmp_path / "run/dataset", f"ipc10-{m}") for m in methods}
    for name, s in sets.items():
        assert torch.bincount(s.labels).tolist() == [10, 10, 10], name
        for label in range(3):
            own = s.labels == label
            counts, number = s.counts[own], torch.bincount(s.prototype[own])
            each = counts[torch.cat([torch.zeros(1, dtype=torch.int64), number.cumsum(0)[:-1]])]
            assert number.tolist() == images_by_mass(each, 10)
            if name == "few":
                share = counts / number[s.prototype[own]]
                assert torch.allclose(s.weights[own], (10 * share / share.sum()).float())
    assert torch.bincount(sets["few"].prototype[sets["few"].labels == 0]).max() > 5  # unequal


def test_what_cannot_have_several_images_is_refused() -> None:
    def refused(message: str, **changes: Any) -> None:
        settings = {"ipc": [10], "generate.mode": "dit", "cluster.prototypes_per_class": 5}
        with pytest.raises(InputError, match=message):
            check_methods(apply_settings(RunConfig(), {**settings, **changes}))

    refused("prototypes_per_class=5, more than ipc=1", ipc=[1, 10])
    refused("but representative=real gives one image", **{"methods.ddoq.representative": "real"})
    refused("but generate.mode=decode gives one image", **{"generate.mode": "decode"})
    refused("but generate.noise=inversion gives one image", **{"generate.noise": "inversion"})


def test_a_plan_counts_the_images_of_small_classes_too() -> None:
    settings = {"ipc": [10], "generate.mode": "dit", "cluster.prototypes_per_class": 5, "evaluate.students": []}
    text = plan(apply_settings(RunConfig(), settings), like_source("3x4"))
    assert "ipc 10      12 prototypes, 1 method (ddoq), 30 images" in text
    assert "fewer than" not in text
