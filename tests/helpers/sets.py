"""Distilled sets of a few images, and whether two are the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from dq.distilled.set import DistilledSet

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


def same(a: DistilledSet, b: DistilledSet) -> bool:
    tensors = [f.name for f in dataclasses.fields(a) if isinstance(getattr(a, f.name), torch.Tensor)]
    return a.class_names == b.class_names and all(torch.equal(getattr(a, n), getattr(b, n)) for n in tensors)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
