"""Redundancy of a set: its slices, students of one tested on the next, and where the number is shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dq.config.overrides import apply_settings
from dq.config.schema import RunConfig
from dq.config.students import EvaluateConfig
from dq.core.files import read_json
from dq.distilled.external import set_from_tensors
from dq.distilled.set import DistilledSet
from dq.evaluation.evaluate import evaluate_sets
from dq.evaluation.redundancy import slice_of, slice_size
from dq.evaluation.results import read_records
from dq.evaluation.tables import tables_text
from dq.run.planning.plan import like_source, trainings
from dq.run.report import write_results_report

STUDENT = {
    "net": "convnet3w32",
    "norm": "none",
    "epochs": 30,
    "augment": "none",
    "optimizer": "adamw",
    "lr": 3e-3,
    "dtype": "float32",
}
NAMES = ("red", "green", "blue")


def colored(order: list[int]) -> DistilledSet:
    """Three classes of three images; in the first two the class's own color, in the third that of class order[c]."""
    images = torch.zeros(9, 3, 8, 8, dtype=torch.uint8)
    for row in range(9):
        label, rank = divmod(row, 3)
        images[row, label if rank == 0 else order[label]] = 200 + 10 * rank
    return set_from_tensors(images, torch.arange(3).repeat_interleave(3), NAMES)


def test_slices_are_the_next_images_of_every_class() -> None:
    labels = torch.tensor([0] * 5 + [1] * 4)
    s = set_from_tensors(
        torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 3, 2, 2),
        labels,
        ("a", "b"),
        weights=torch.arange(9) + 1.0,
    )
    first, second = slice_of(s, 2, 0), slice_of(s, 2, 1)
    assert first.images[:, 0, 0, 0].tolist() == [0, 1, 5, 6]
    assert second.images[:, 0, 0, 0].tolist() == [2, 3, 7, 8]
    assert (first.labels.tolist(), first.weights.tolist()) == ([0, 0, 1, 1], [1, 2, 6, 7])
    assert [slice_size(n) for n in (0, 1, 2, 5, 20, 99)] == [0, 0, 1, 2, 10, 10]


def test_equal_slices_are_redundant_and_the_number_is_shown(toy_source, tmp_path: Path, accelerator) -> None:
    sets = {
        "same": colored([0, 1, 2]),
        "other": colored([1, 2, 0]),
        "one": set_from_tensors(colored([0, 1, 2]).images[::3], torch.arange(3), NAMES),
    }
    config = EvaluateConfig(seeds=2, baselines=("random",), students=(STUDENT,), redundancy=True)
    options = {"config": config, "cache_dir": tmp_path / "cache", "accelerator": accelerator}
    rows = evaluate_sets(sets, toy_source, folder=tmp_path / "run", **options)
    numbers = {(r.set, r.ipc): r.redundancy for r in rows}
    assert numbers["same", "3"] == (1, 1)
    assert numbers["other", "3"] == (0, 0)  # the next images look like those of another class
    assert numbers["one", "1"] == numbers["random", "1"] == ()
    assert len(numbers["random", "3"]) == 2
    units = sorted((tmp_path / "run" / "eval" / "units").glob("redundancy-*.json"))
    assert len(units) == 6
    assert {(r["images"], r["test_images"]) for r in map(read_json, units)} == {(3, 3)}
    text = tables_text(rows)
    assert "| same | 100.0 ± 0.0 |" in text
    assert "Redundancy: accuracy on the next slice of a set in %" in text
    saved = {
        (r["set"], r["ipc"]): r["redundancy_mean"] for r in read_records(tmp_path / "run" / "eval" / "summary.csv")
    }
    assert (saved["same", "3"], saved["one", "1"]) == ("1.0", "")
    assert "redundancy %" in write_results_report(tmp_path / "run").read_text()

    times = {f: f.stat().st_mtime_ns for f in units}
    again = evaluate_sets(sets, toy_source, folder=tmp_path / "run", **options)
    assert [r.redundancy for r in again] == [r.redundancy for r in rows]
    assert {f: f.stat().st_mtime_ns for f in units} == times
    plain = dataclasses.replace(config, redundancy=False)
    rows = evaluate_sets(sets, toy_source, folder=tmp_path / "run", **options | {"config": plain})
    assert all(r.redundancy == () for r in rows)


@pytest.mark.parametrize(("ipc", "slices"), [(1, []), (6, [30]), (50, [100])])
def test_the_plan_counts_the_trainings_on_slices(ipc: int, slices: list[int]) -> None:
    settings = {"ipc": [ipc], "evaluate.redundancy": True, "evaluate.baselines": [], "evaluate.students": [STUDENT]}
    counts = like_source("cifar10").class_counts()
    planned = trainings(apply_settings(RunConfig(), settings), counts, {("ddoq", str(ipc)): 10 * ipc})
    assert [t.images for t in planned] == [10 * ipc, *slices]
