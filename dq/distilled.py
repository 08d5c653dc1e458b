"""`DistilledSet`: images, labels, weights and where they came from; to and from a folder that `load_dataset` opens."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq.dist import atomic_path, check_name, read_json, write_json, write_text
from dq.errors import InputError, RunError

PARQUET = "train-00000-of-00001.parquet"


@dataclass(frozen=True)
class DistilledSet:
    """A small labelled image set. Rows are in class order, heaviest prototype first."""

    images: Tensor  # (N, 3, H, W) uint8, or float32 in [0, 1] unless not `bounded`
    labels: Tensor  # (N,) int64
    weights: Tensor  # (N,) float32, training weights, mean near 1
    class_names: tuple[str, ...]
    prototype: Tensor  # (N,) int64, rank of the prototype in its class
    counts: Tensor  # (N,) int64, images that the prototype stands for
    source_row: Tensor  # (N,) int64, the nearest real image's row in the source's train split
    soft_labels: Tensor | None = None  # (N, C) float16, a teacher's logits of the stored images
    bounded: bool = True  # False: float pixels may leave [0, 1], as those of matching methods do
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.images)
        for name in ("labels", "weights", "prototype", "counts", "source_row"):
            if len(getattr(self, name)) != n:
                raise InputError(f"a distilled set of {n} images has {len(getattr(self, name))} {name}")
        if self.images.ndim != 4 or self.images.shape[1] != 3 or self.images.dtype not in (torch.uint8, torch.float32):
            shape = tuple(self.images.shape)
            raise InputError(f"images must be (N, 3, H, W) uint8 or float32, not {shape} {self.images.dtype}")
        if not n:
            raise InputError("a distilled set needs at least one image")
        if self.images.dtype == torch.float32 and not torch.isfinite(self.images).all():
            raise InputError("float images of a distilled set must be finite; leave broken ones out")
        if self.bounded and self.images.dtype == torch.float32 and not _in_range(self.images):
            raise InputError(
                "float images of a distilled set must lie in [0, 1]; scale them, or give the mean and std that they "
                "were normalised with"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images.shape[2:]))
        return f"DistilledSet({len(self)} images of {size} px, {len(self.class_names)} classes)"

    @property
    def ipc(self) -> int:
        """Images of the largest class."""
        return int(torch.bincount(self.labels).max())

    def save(self, folder: str | Path, config_name: str = "default") -> Path:
        """Write `folder/<config_name>/train-00000-of-00001.parquet` and the folder's README card.

        Every set in the folder becomes one configuration of the card: `load_dataset(folder, config_name)`.
        Float images keep their values in a column `pixels` beside the 8-bit `image`.
        """
        from datasets import Array3D, ClassLabel, Dataset, Features, List, Value
        from datasets import Image as ImageFeature

        folder = Path(folder)
        check_name(config_name, "the set's name")
        columns: dict[str, Any] = {
            "image": [{"bytes": _png(x), "path": None} for x in self.images_uint8()],
            "label": self.labels.tolist(),
            "weight": self.weights.tolist(),
            "prototype": self.prototype.tolist(),
            "count": self.counts.tolist(),
            "source_row": self.source_row.tolist(),
        }
        features = {
            "image": ImageFeature(),
            "label": ClassLabel(names=list(self.class_names)),
            "weight": Value("float32"),
            "prototype": Value("int32"),
            "count": Value("int64"),
            "source_row": Value("int64"),
        }
        if self.soft_labels is not None:
            columns["soft_label"] = self.soft_labels.numpy()
            features["soft_label"] = List(Value("float16"), length=len(self.class_names))
        if self.images.dtype == torch.float32:
            columns["pixels"] = self.images.numpy()
            features["pixels"] = Array3D(shape=tuple(self.images.shape[1:]), dtype="float32")
        table = Dataset.from_dict(columns, features=Features(features))
        path = folder / config_name / PARQUET
        with atomic_path(path) as temporary:
            table.to_parquet(str(temporary))
        record = {
            **self.provenance,
            "config_name": config_name,
            "rows": len(self),
            "classes": list(self.class_names),
            "content": hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest(),
        }
        write_json(folder / config_name / "provenance.json", record)
        write_text(folder / "README.md", dataset_card(folder))
        return path

    @staticmethod
    def load(folder: str | Path, config_name: str | None = None) -> DistilledSet:
        """Read a set written by `save`; `config_name` may be left out if the folder holds one set."""
        import pyarrow.parquet as pq
        from datasets import Dataset

        folder = Path(folder)
        known = sorted(p.parent.name for p in folder.glob("*/provenance.json"))
        if config_name is None and len(known) == 1:
            config_name = known[0]
        if config_name not in known:
            raise InputError(f"{folder} has no set {config_name!r}; it has {', '.join(known) or 'none'}")
        # Not load_dataset: its cache takes two folders with the same card for the same data.
        try:
            rows = Dataset(pq.read_table(folder / config_name / PARQUET))
        except (OSError, ValueError) as e:  # pyarrow's errors are of these kinds
            raise RunError(
                f"{folder / config_name / PARQUET} cannot be read ({e}); make the set again with `dq label`"
            ) from e
        soft = rows.with_format("numpy")["soft_label"][:] if "soft_label" in rows.column_names else None
        if "pixels" in rows.column_names:
            images = torch.from_numpy(np.stack(rows.with_format("numpy")["pixels"][:])).float()
        else:
            pictures = [np.asarray(row["image"].convert("RGB")).transpose(2, 0, 1) for row in rows]
            images = torch.from_numpy(np.stack(pictures))
        return DistilledSet(
            images=images,
            labels=torch.tensor(rows["label"][:]),
            weights=torch.tensor(rows["weight"][:]),
            class_names=tuple(rows.features["label"].names),
            prototype=torch.tensor(rows["prototype"][:]),
            counts=torch.tensor(rows["count"][:]),
            source_row=torch.tensor(rows["source_row"][:]),
            soft_labels=None if soft is None else torch.from_numpy(np.stack(soft)).half(),
            bounded=images.dtype == torch.uint8 or _in_range(images),
            provenance=read_json(folder / config_name / "provenance.json"),
        )

    def images_uint8(self) -> Tensor:
        """Images as (N, 3, H, W) uint8, rounded where they are float."""
        if self.images.dtype == torch.uint8:
            return self.images
        return (self.images.clamp(0, 1) * 255).round().to(torch.uint8)


def write_set(folder, config_name, parts, provenance):
    from dataclasses import replace

    found = list(parts)

    def cat(name):
        values = [getattr(p, name) for p in found]
        return None if values[0] is None else torch.cat(values)

    names = ("images", "labels", "weights", "prototype", "counts", "source_row", "soft_labels")
    return replace(found[0], **{n: cat(n) for n in names}, provenance=provenance).save(folder, config_name)


def has_set(folder, config_name, recipe):
    from dq.dist import is_done

    path = folder / config_name / "provenance.json"
    return is_done(path) and read_json(path).get("recipe") == recipe


def write_card(folder):
    write_text(folder / "README.md", dataset_card(folder))


def _in_range(images: Tensor) -> bool:
    return bool(images.min() >= 0 and images.max() <= 1)


def _png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def dataset_card(folder: Path) -> str:
    """The README of a folder of distilled sets, generated from their provenance files."""
    from jinja2 import Environment, PackageLoader

    records = [read_json(p) for p in sorted(folder.glob("*/provenance.json"))]
    environment = Environment(loader=PackageLoader("dq"), trim_blocks=True, lstrip_blocks=True)
    rows = max((r["rows"] for r in records), default=0)
    sizes = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return environment.get_template("dataset_card.md").render(
        records=records,
        first=records[0],
        size=next((name for limit, name in sizes if rows < limit), "n>1M"),
        json=json.dumps,
    )
