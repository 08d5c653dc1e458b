"""Arguments of nearly the right type: taken, or refused in a sentence, never a traceback from within."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dq.core.errors import InputError
from dq.data.load import load_source
from dq.distilled.external import load_set
from dq.distilled.set import DistilledSet
from dq.evaluation.evaluate import evaluate

X, Y = torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1, 2, 2])


def small() -> DistilledSet:
    n = torch.zeros(3).long()
    return DistilledSet(X[::2], torch.tensor([0, 1, 2]), torch.ones(3), ("0", "1", "2"), n, n + 1, n)


@pytest.mark.parametrize(
    "source",
    [
        None,
        3,
        X,
        X.numpy(),
        (X, Y, Y),
        (X, list("aabbcc")),
        (X, Y.float()),
        (X.long(), Y),
        {0: (X, Y)},
        {"train": (X, Y), 1: (X, X)},
        b"x",
        (X[:0], Y[:0]),
    ],
    ids=str,
)
def test_sources(source) -> None:
    with pytest.raises(InputError):
        load_source(source)


@pytest.mark.parametrize("names", [3, "abc", ["a"], ["a", "a", "b"], {"a", "b", "c"}, {"a": 0, "b": 1, "c": 2}])
def test_class_names(names, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        load_source((X, Y), class_names=names)
    small().save(tmp_path, "set")
    with pytest.raises(InputError):
        load_set(tmp_path, names)


@pytest.mark.parametrize(
    "given",
    [
        {"protocol": None},
        {"protocol": 3},
        {"students": 3},
        {"students": []},
        {"n_seeds": 0},
        {"n_seeds": 1.0},
        {"n_seeds": True},
        {"image_size": 0},
        {"image_size": 8.0},
        {"image_size": "8"},
        {"baselines": ("random", "random")},
        {"baselines": 3},
        {"output_dir": 3},
        {"cache_dir": None},
        {"accelerator": "cpu"},
        {"epochs": 0},
        {"epochs": 1.5},
    ],
    ids=str,
)
def test_evaluate(given: dict) -> None:
    options = {"n_seeds": 1, "epochs": 1, "image_size": 8, "baselines": (), **given}
    with pytest.raises(InputError):
        evaluate(small(), {"train": (X, Y), "test": (X, Y)}, **options)


@pytest.mark.parametrize("path", [None, 3, ""])
def test_paths_of_sets(path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a path"):
        load_set(path)
    with pytest.raises(InputError, match="is a path"):
        small().save(path)
    with pytest.raises(InputError, match="the name of a set"):
        small().save(tmp_path, path)


def test_rows_of_a_slice() -> None:
    s = small()
    assert [r["label"] for r in s[1:]] == [1, 2]
    assert s[-1]["label"] == 2
    with pytest.raises(IndexError):
        _ = s[3]
