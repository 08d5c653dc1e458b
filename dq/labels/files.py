"""Files of soft labels of every view of every image in every epoch (FKD, Shen & Xing 2022).

A label epoch is a pure function of images, teachers and a plan. It is computed when needed (`online_labels`) or
written once, file by file, and read through a memory map (`write_shard`, `read_labels`); students get the same bits
either way.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dq.config.reader import from_dict, to_dict
from dq.core.errors import InputError
from dq.core.files import is_done, open_tensors, read_json, write_json, write_tensors
from dq.core.seeds import digest_of_tensors
from dq.data.views import Views
from dq.labels.compute import label_epoch
from dq.labels.packing import pack, unpack
from dq.labels.plan import EpochLabels, LabelPlan, LabelSource
from dq.networks.teacher import Teacher

MANIFEST = "manifest.json"


def shard_file(folder: Path, first: int) -> Path:
    """Return the file that begins with label epoch `first`."""
    return folder / f"epoch-{first + 1:05d}.safetensors"


def write_manifest(
    folder: Path, images: Tensor, plan: LabelPlan, teachers: Sequence[Teacher], **facts: object
) -> None:
    """Write the manifest of a folder of labels, unless it exists."""
    if is_done(folder / MANIFEST):
        return
    import numpy
    import safetensors

    record = {
        "plan": to_dict(plan),
        "teachers": [{"name": t.name, "digest": t.digest} for t in teachers],
        "checksums": checksums(images),
        "versions": {"torch": torch.__version__, "numpy": numpy.__version__, "safetensors": safetensors.__version__},
        **facts,
    }
    write_json(folder / MANIFEST, record)


def checksums(images: Tensor) -> list[int]:
    """Return the CRC-32 of each image."""
    return [zlib.crc32(x.contiguous().cpu().numpy().tobytes()) for x in images]


def write_shard(folder: Path, images: Tensor, teachers: Sequence[Teacher], plan: LabelPlan, epochs: range) -> None:
    """Label the epochs of one file and write it atomically."""
    columns: dict[str, list[Tensor]] = {}
    for epoch in epochs:
        views, logits = label_epoch(images, teachers, plan, epoch)
        row = pack(logits, plan.relabel)
        if plan.relabel.views == "stored":
            stored = ["order", "box", "flip", "partner", "kept", "cut"]
            stored += [name for name in ("shuffle", "operations") if getattr(views, name).numel()]
            row |= {name: getattr(views, name) for name in stored}
        else:
            row["views_digest"] = torch.tensor(views.digest())
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    tensors = {name: torch.stack(values) for name, values in columns.items()}  # (epochs, ...)
    write_tensors(shard_file(folder, epochs.start), tensors, {"epochs": [epochs.start, epochs.stop]}, identity=False)


def read_labels(folder: str | Path, images: Tensor) -> LabelSource:
    """Return labels from the files of `write_shard`.

    An epoch is read on demand, through a memory map. `images` (N, 3, S, S) are those that will be replayed.

    Raises:
        InputError: if the labels were made for other images, or files are missing.
        RunError: when a damaged file is read.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} holds no soft labels (no {MANIFEST}); make them with `dq label`")
    record = read_json(folder / MANIFEST)
    plan = from_dict(LabelPlan, record["plan"])
    _check_images(folder, record["checksums"], images, plan)
    spans = plan.shards()
    missing = [shard_file(folder, s.start).name for s in spans if not shard_file(folder, s.start).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(spans)} label files, first {missing[0]}; run `dq label`"
        )

    def epoch_labels(epoch: int) -> EpochLabels:
        at = (epoch - 1) % plan.epochs
        number = at // plan.shard_epochs
        path = shard_file(folder, spans[number].start)
        with open_tensors(path) as f:
            row = {name: f.get_slice(name)[at - spans[number].start] for name in f.keys()}  # noqa: SIM118
        return EpochLabels(plan, _views(path, plan, row, at), unpack(row, plan.classes))

    return epoch_labels


def _views(path: Path, plan: LabelPlan, row: dict[str, Tensor], epoch: int) -> Views:
    if plan.relabel.views == "seed":
        views = plan.draw(epoch)
        if views.digest() != int(row["views_digest"]):
            raise InputError(
                f"the views of {path} cannot be drawn again: this version of numpy or torch draws others than the one "
                "that made the labels; make them again, or with relabel.views=stored"
            )
        return views
    n = plan.images
    names = [f.name for f in dataclasses.fields(Views)]
    empty = {
        "shuffle": torch.zeros(n, 0, dtype=torch.uint8),
        "color": torch.zeros(n, 0),
        "color_order": torch.zeros(n, 0, dtype=torch.uint8),
        "light": torch.zeros(n, 0),
        "operations": torch.zeros(n, 0, dtype=torch.uint8),
    }
    return Views(**{name: row.get(name, empty.get(name)) for name in names})  # type: ignore[arg-type]


def _check_images(folder: Path, made_for: list[int], images: Tensor, plan: LabelPlan) -> None:
    if len(images) != len(made_for):
        raise InputError(
            f"the labels in {folder} are for {len(made_for)} images, not {len(images)}; run `dq label` for this set"
        )
    if plan.image_digest == digest_of_tensors({"images": images}):
        return
    now = checksums(images)
    other = [i for i, (a, b) in enumerate(zip(made_for, now, strict=True)) if a != b]
    raise InputError(
        f"the labels in {folder} were made for other images: {len(other)} of {len(now)} differ"
        + (f", first image {other[0]}" if other else " in size or type")
        + "; run `dq label` for this set"
    )
