from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dq.distilled import DistilledSet
from dq.errors import InputError

PROVENANCE = {
    "ipc": 2,
    "source": {"origin": "toy"},
    "method": {"name": "ddoq", "representative": "centroid", "weights": "sqrt"},
    "cluster": {"engine": "torch"},
    "generate": {"mode": "decode"},
    "labels": None,
}


def make(*, floats: bool = False, soft: bool = False) -> DistilledSet:
    g = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 5, 5, generator=g)
    return DistilledSet(
        images=images if floats else (images * 255).to(torch.uint8),
        labels=torch.tensor([0, 0, 1, 1, 2, 2]),
        weights=torch.rand(6, generator=g),
        class_names=("zebra", "ant", "bee"),
        prototype=torch.tensor([0, 1] * 3),
        counts=torch.arange(1, 7),
        source_row=torch.arange(10, 16),
        soft_labels=torch.randn(6, 3, generator=g).half() if soft else None,
        provenance=PROVENANCE,
    )


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_save_and_load_round_trip(tmp_path: Path, floats: bool, soft: bool) -> None:
    s = make(floats=floats, soft=soft)
    s.save(tmp_path, "ipc2-ddoq")
    t = DistilledSet.load(tmp_path)
    for field in dataclasses.fields(DistilledSet):
        a, b = getattr(s, field.name), getattr(t, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), field.name
    assert t.class_names == s.class_names
    assert t.provenance["method"]["name"] == "ddoq"


def test_load_dataset_opens_the_folder_with_the_right_features(tmp_path: Path) -> None:
    from datasets import ClassLabel, Image, List, Value, load_dataset

    make(soft=True).save(tmp_path, "ipc2-ddoq")
    make().save(tmp_path, "ipc2-d4m")
    for name, extra in (("ipc2-ddoq", True), ("ipc2-d4m", False)):
        rows = load_dataset(str(tmp_path), name, split="train")
        assert isinstance(rows.features["image"], Image)
        assert rows.features["label"] == ClassLabel(names=["zebra", "ant", "bee"])
        assert rows.features["weight"] == Value("float32")
        assert ("soft_label" in rows.features) == extra
        assert rows[3]["label"] == 1
        assert rows[3]["image"].size == (5, 5)
    assert load_dataset(str(tmp_path), "ipc2-ddoq", split="train").features["soft_label"] == List(
        Value("float16"), length=3
    )


def test_load_dataset_sees_that_a_folder_was_written_anew(tmp_path: Path) -> None:
    """Its cache is keyed by the card, so the card must follow the content."""
    from datasets import load_dataset

    first = make()
    first.save(tmp_path, "x")
    assert load_dataset(str(tmp_path), "x", split="train")["count"][:] == first.counts.tolist()
    dataclasses.replace(first, counts=first.counts + 5).save(tmp_path, "x")
    assert load_dataset(str(tmp_path), "x", split="train")["count"][:] == (first.counts + 5).tolist()
    assert DistilledSet.load(tmp_path).counts.tolist() == (first.counts + 5).tolist()


def test_same_set_same_bytes(tmp_path: Path) -> None:
    a = make(soft=True).save(tmp_path / "a")
    b = make(soft=True).save(tmp_path / "b")
    assert a.read_bytes() == b.read_bytes()


def test_card_lists_every_set(tmp_path: Path) -> None:
    make().save(tmp_path, "ipc2-ddoq")
    make().save(tmp_path, "ipc2-d4m")
    card = (tmp_path / "README.md").read_text()
    assert "- config_name: ipc2-ddoq\n" in card
    assert "path: ipc2-d4m/train-*.parquet" in card
    assert "zebra, ant, bee" in card
    assert card.count("default: true") == 1


def test_faults(tmp_path: Path) -> None:
    make().save(tmp_path, "a")
    make().save(tmp_path, "b")
    with pytest.raises(InputError, match=r"has no set 'c'; it has a, b"):
        DistilledSet.load(tmp_path, "c")
    with pytest.raises(InputError, match=r"has no set None; it has a, b"):
        DistilledSet.load(tmp_path)
    with pytest.raises(InputError, match="a distilled set of 6 images has 5 weights"):
        dataclasses.replace(make(), weights=torch.ones(5))
