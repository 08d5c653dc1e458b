"""Baselines as entries of a table: their numbers, identities and files, and what they are selected by."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dq.config.dtypes import device_dtypes, resolve_dtypes
from dq.config.pruning import DifficultyConfig
from dq.config.students import EvaluateConfig, default_baselines
from dq.core.errors import InputError
from dq.data.coresets import facility_rows, median_rows, window_rows
from dq.data.load import load_source
from dq.evaluation.baselines import BASELINES, BY_DIFFICULTY, select
from dq.evaluation.entries import Entry, Work, baseline_entries, check_difficulty, prepare_selections
from dq.evaluation.evaluate import evaluate_sets
from dq.networks.difficulty import find_difficulty
from dq.networks.real_data import RealData, check_taught
from dq.networks.teacher import Teacher

AGENT = DifficultyConfig(runs=2, score_epoch=3, batch_size=8, lr=0.02, augment="none", dtype="float32")


def alone() -> SimpleNamespace:
    return SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, wait_for_everyone=lambda: None)


def teacher(seed: int = 0) -> Teacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)
        )
    return Teacher(net.eval(), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 7, f"teacher {seed}", "conv")


@pytest.fixture
def bench(toy_source, tmp_path) -> RealData:
    none = np.array([], np.int64)
    shares = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
    return RealData(toy_source, 8, tmp_path / "cache", torch.device("cpu"), (teacher(),), none, *shares, AGENT)


def entries(bench: RealData, folder: Path, *names: str, **settings) -> dict[str, Entry]:
    evaluate = EvaluateConfig(seeds=1, baselines=names, **settings)
    return {e.name: e for e in baseline_entries(bench, evaluate, Work(folder, alone()), {"2": 2})}


def test_every_baseline_is_selected_once_and_read_again(bench, tmp_path: Path, toy_source) -> None:
    made = entries(bench, tmp_path, *BASELINES)
    assert list(made) == list(BASELINES)
    work = Work(tmp_path, alone())
    prepare_selections(made, bench, work)
    for name, entry in made.items():
        s = entry.load()
        assert len(s) == entry.images == 6
        assert s.provenance["selection"]["name"] == name
    files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()}
    assert len([f for f in files if f.suffix == ".parquet"]) == len(BASELINES)
    again = entries(bench, tmp_path, *BASELINES)
    prepare_selections(again, bench, work)
    assert all(torch.equal(again[n].load().images, made[n].load().images) for n in BASELINES)
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()} == files

    # by the scores of the difficulty stage, by the features that runs cluster by, and by what the teacher says
    labels, n = toy_source.train.labels, len(toy_source.train)
    cache = find_difficulty(bench.cache_dir, toy_source, 8, AGENT)
    rows = {name: entry.load().source_row.tolist() for name, entry in made.items()}
    assert rows["window"] == window_rows(cache.by_row("el2n", 2, n), labels, 2, 0.5).tolist()
    assert rows["forgetting"] == window_rows(cache.by_row("forgetting", 2, n), labels, 2, 1.0).tolist()
    assert rows["facility"] == facility_rows(bench.features(), labels, 2).tolist()
    weights = cache.by_row("cad", 2, n)
    assert rows["facility_cad"] == facility_rows(bench.features(), labels, 2, weights).tolist()
    images = torch.from_numpy(np.stack([toy_source.train.read(i) for i in range(n)]))
    p = bench.teachers[0].logits(images).softmax(1)
    assert torch.allclose(bench.predictions()["entropy"], -(p * p.log()).sum(1), atol=1e-6)
    assert rows["confidence"] == median_rows(p[torch.arange(n), torch.from_numpy(labels)], labels, 2).tolist()


def test_images_that_cannot_be_read_are_left_out_of_every_baseline(toy_source, bench, tmp_path: Path) -> None:
    def read(row: int):
        if row in (1, 9):
            raise OSError("gone")
        return toy_source.train.read(row)

    split = dataclasses.replace(toy_source.train, read=read)
    skipping = load_source(dataclasses.replace(toy_source, splits={"train": split}), on_bad_image="skip")
    pooled = dataclasses.replace(bench, source=skipping, teachers=(), cache_dir=tmp_path / "pooled", _cache={})
    taught = dataclasses.replace(bench, source=skipping, cache_dir=tmp_path / "taught", _cache={})
    work = Work(tmp_path, alone())
    for real, names in ((taught, BASELINES), (pooled, ("herding", "k-center", "nearest"))):
        made = entries(real, tmp_path, *names)
        prepare_selections(made, real, work)
        for name, entry in made.items():
            s = entry.load()
            assert not {1, 9} & set(s.source_row.tolist()), name
            if name != "random":  # draws before it reads
                assert len(s) == 6, name
    features, p = taught.features(), taught.predictions()["entropy"]
    assert features.isnan().all(1).nonzero()[:, 0].tolist() == p.isnan().nonzero()[:, 0].tolist() == [1, 9]
    assert torch.equal(features[10], bench.features()[10])
    whole = select("facility", skipping, 30, image_size=8, features=features)
    assert len(whole) == len(toy_source.train) - 2
    assert whole.provenance["selection"]["unreadable"] == 2


def test_a_class_without_cad_is_selected_without_weights(toy_source, bench, caplog) -> None:
    features, labels = bench.features(), torch.from_numpy(toy_source.train.labels)
    cad = torch.where(labels == 1, 0.0, torch.rand(len(labels), generator=torch.Generator().manual_seed(0)))
    weighted, plain = (
        select(name, toy_source, 3, image_size=8, features=features, scores=lambda _: cad)
        for name in ("facility_cad", "facility")
    )
    of = [
        [r for r, y in zip(s.source_row.tolist(), s.labels.tolist(), strict=True) if y == 1] for s in (weighted, plain)
    ]
    assert of[0] == of[1]
    assert [r.getMessage()[:31] for r in caplog.records] == ["CAD of class 1 is 0 everywhere,"]
    assert "prune.epochs" in caplog.text
    assert "'facility'" in caplog.text


def test_an_identity_names_what_a_selection_goes_by(bench, tmp_path: Path) -> None:
    def names(bench: RealData = bench, **settings) -> dict[str, str]:
        return {n: e.identity for n, e in entries(bench, tmp_path, *BASELINES, **settings).items()}

    base = names()
    assert len(set(base.values())) == len(BASELINES)

    def changed(other: dict[str, str]) -> set[str]:
        return {n for n in BASELINES if other[n] != base[n]}

    longer = dataclasses.replace(bench, difficulty=dataclasses.replace(AGENT, score_epoch=4))
    assert changed(names(longer)) == {"facility_cad", "window", "forgetting"} == set(BY_DIFFICULTY)
    more = dataclasses.replace(bench, difficulty=dataclasses.replace(AGENT, runs=3))
    assert changed(names(more)) == set(BY_DIFFICULTY)
    taught = dataclasses.replace(bench, teachers=(teacher(1),))
    assert changed(names(taught)) == set(BASELINES) - {"random", "window", "forgetting"}
    assert changed(names(window_start=0.25)) == {"window"}


def test_an_evaluation_shares_its_scores_with_runs(toy_source, tmp_path: Path, accelerator) -> None:
    cache, difficulty = tmp_path / "cache", dataclasses.replace(AGENT, dtype="auto", score_epoch=1)
    config = EvaluateConfig(seeds=1, baselines=("window",), students=({"net": "convnet3w32", "epochs": 1},))
    options = {"config": config, "cache_dir": cache, "accelerator": accelerator, "difficulty": difficulty}
    rows = evaluate_sets({}, toy_source, folder=tmp_path / "run", image_size=8, ipcs=[2], **options)
    assert [(r.set, r.images) for r in rows] == [("window", 6)]
    resolved = resolve_dtypes(difficulty, device_dtypes("cpu"))  # as a run has it
    folder = find_difficulty(cache, toy_source, 8, resolved).folder
    assert [f for f in cache.iterdir() if f.name.startswith("difficulty-")] == [folder]


@pytest.mark.parametrize("name", ["facility", "facility_cad", "bps", "confidence", "patches"])
def test_a_baseline_that_needs_a_teacher_is_refused_without_one(name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' needs a teacher; set teachers"):
        check_taught(EvaluateConfig(baselines=("random", name)), [], ())
    check_taught(EvaluateConfig(baselines=("random", "window", "forgetting")), [], ())


def test_difficulty_that_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InputError, match=r"'facility_cad' .*difficulty"):
        check_difficulty(("facility_cad",), DifficultyConfig(score_epoch=1), 3, 8)
    with pytest.raises(InputError, match="convnet9"):
        check_difficulty(("window",), DifficultyConfig(net="convnet9"), 3, 8)
    check_difficulty(("facility",), DifficultyConfig(net="convnet9", score_epoch=1), 3, 8)


def test_the_strongest_selection_is_a_default_where_there_is_a_teacher(caplog) -> None:
    caplog.set_level("INFO", "dq")
    assert default_baselines((teacher(),)) == ("random", "facility")
    assert not caplog.records
    assert default_baselines(()) == ("random",)
    assert "random images alone, since no teacher is named" in caplog.text


def test_baselines_are_as_many_as_the_images_of_the_sets(bench, tmp_path):
    work = Work(tmp_path, alone())
    evaluate = EvaluateConfig(seeds=2, baselines=("random", "nearest", "full"))
    held_out = dataclasses.replace(bench, validation_rows=np.array([23]))  # of the class of 7
    made = baseline_entries(held_out, evaluate, work, {"2": 4, "5": 7})
    # under the ipc of the table, one random subset per seed; the last class has 6 images left
    assert [(e.name, e.ipc, e.images, e.seeds) for e in made] == [
        ("random", "2", 12, (0,)),
        ("random", "2", 12, (1,)),
        ("nearest", "2", 12, (0, 1)),
        ("random", "5", 20, (0,)),
        ("random", "5", 20, (1,)),
        ("nearest", "5", 20, (0, 1)),
        ("full", "full", 23, (0,)),
    ]
    assert all(len(e.load()) == e.images for e in made)


@pytest.mark.parametrize(("side", "ipc", "factor"), [(128, 2, 2), (128, 1, 1), (64, 2, 1)])
def test_patches_are_mosaics_as_in_rded_unless_told(bench, tmp_path, side, ipc, factor):
    def identity(**settings) -> str:
        evaluate = EvaluateConfig(baselines=("patches",), **settings)
        large = dataclasses.replace(bench, image_size=side)
        (entry,) = baseline_entries(large, evaluate, Work(tmp_path, alone()), {str(ipc): ipc})
        return entry.identity

    assert identity() == identity(patch_factor=factor)
    assert identity() != identity(patch_factor=3 - factor)
