"""`DistilledSet`: images, labels, weights and provenance, saved as Parquet."""

from __future__ import annotations

import hashlib
import logging
import math
import operator
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, overload

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from dq.config.students import LabelKind
from dq.core.errors import InputError
from dq.core.files import as_path, read_json
from dq.core.plain import PlainDict
from dq.core.text import check_name, plural
from dq.distilled.card import write_dataset_card
from dq.distilled.format import DIGEST_BYTES, PROVENANCE, find_set, recorded_kind, shard_files
from dq.distilled.hub import download_set, push_folder
from dq.distilled.parquet import _in_range, _intact, read_shard, rows_as_dataset, write_set
from dq.distilled.png import save_images

log = logging.getLogger("dq")


@dataclass(frozen=True)
class DistilledSet:
    """A small labeled image set in class order, heaviest prototype first."""

    images: Tensor  # (N, 3, H, W) uint8, or float32 in [0, 1] unless not `bounded`
    labels: Tensor  # (N,) int64
    weights: Tensor  # (N,) float32, training weights, mean near 1
    class_names: tuple[str, ...]
    prototype: Tensor  # (N,) int64, rank of the prototype in its class
    counts: Tensor  # (N,) int64, images that the prototype stands for
    source_row: Tensor  # (N,) int64, the nearest real image's row in the source's train split
    soft_labels: Tensor | None = None  # (N, C) float16, label vectors of the stored images
    bounded: bool = True  # False: float pixels may leave [0, 1], as those of matching methods do
    label_kind: LabelKind = "logits"  # what the label vectors are
    step_size: float | None = None  # learning rate of a student that was learned with the images
    provenance: PlainDict = field(default_factory=dict)

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
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.class_names):
            raise InputError(
                f"labels of a distilled set go from {int(self.labels.min())} to {int(self.labels.max())}, but there "
                f"are {len(self.class_names)} classes; number them from 0"
            )
        soft = self.soft_labels
        if soft is not None and tuple(soft.shape) != (n, len(self.class_names)):
            raise InputError(f"soft_labels must be {(n, len(self.class_names))}, not {tuple(soft.shape)}")
        if soft is not None and not torch.isfinite(soft).all():
            raise InputError("soft_labels of a distilled set must be finite and fit float16; leave broken rows out")
        if soft is not None and self.label_kind == "probabilities" and (soft < 0).any():
            raise InputError("soft_labels of a distilled set are called probabilities but some are negative")
        if self.label_kind not in get_args(LabelKind):
            kinds = ", ".join(get_args(LabelKind))
            raise InputError(f"label_kind of a distilled set is one of {kinds}, not {self.label_kind!r}")
        if self.step_size is not None and not (math.isfinite(self.step_size) and self.step_size > 0):
            raise InputError(f"step_size of a distilled set is a positive number, not {self.step_size!r}")
        if self.images.dtype == torch.float32 and not torch.isfinite(self.images).all():
            raise InputError("float images of a distilled set must be finite; leave broken ones out")
        if self.bounded and self.images.dtype == torch.float32 and not _in_range(self.images):
            raise InputError(
                "float images of a distilled set must lie in [0, 1]; scale them, or give the mean and std that they "
                "were normalized with"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images.shape[2:]))
        return f"DistilledSet({plural(len(self), 'image')} of {size} px, {plural(len(self.class_names), 'class')})"

    @overload
    def __getitem__(self, index: int) -> PlainDict: ...

    @overload
    def __getitem__(self, index: slice) -> list[PlainDict]: ...

    def __getitem__(self, index: int | slice) -> PlainDict | list[PlainDict]:
        """One row, or a list of rows for a slice.

        A row has `image` (3, H, W), `label`, `weight`, and `soft_label` (C,) if the set has label vectors.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = operator.index(index)
        row = {"image": self.images[i], "label": int(self.labels[i]), "weight": float(self.weights[i])}
        return row if self.soft_labels is None else {**row, "soft_label": self.soft_labels[i]}

    def __iter__(self) -> Iterator[PlainDict]:
        return (self[i] for i in range(len(self)))

    def to_dataset(self) -> Any:
        """The set as a `datasets.Dataset` with the saved columns."""
        return rows_as_dataset(self)

    def to_torch(self) -> TensorDataset:
        """The set as a `torch.utils.data.TensorDataset`.

        Its tensors are images, labels, weights and, if any, label vectors. Images are (3, H, W) float32 and lie in [0,
        1] unless the set is not `bounded`.
        """
        images = self.images.float() / 255 if self.images.dtype == torch.uint8 else self.images
        soft = () if self.soft_labels is None else (self.soft_labels.float(),)
        return TensorDataset(images, self.labels, self.weights, *soft)

    @property
    def ipc(self) -> int:
        """Number of images of the largest class."""
        return int(torch.bincount(self.labels).max())

    def save(self, folder: str | Path, config_name: str = "default") -> Path:
        """Write the set to `folder`/`config_name` as Parquet files.

        The folder's README card is written too: every set becomes one of its configurations, for `load_dataset(folder,
        config_name)`.

        Returns:
            The first of the Parquet files.
        """
        folder = as_path(folder, "the folder of a set")
        check_name(config_name, "the name of a set")
        path = write_set(folder, config_name, [self], self.provenance)
        write_dataset_card(Path(folder))
        return path

    @staticmethod
    def load(folder: str | Path, config_name: str | None = None) -> DistilledSet:
        """Read a set written by `save`.

        Args:
            folder: of the set itself, of several sets, or of a run.
            config_name: of one set among several; None stands for the only one.

        Raises:
            InputError: if there is no such set; lists the available ones.
            Damaged: if one of its files is.
        """
        folder, config_name = find_set(Path(folder), config_name)
        record = read_json(folder / config_name / PROVENANCE)
        tables = []
        for path, facts in shard_files(folder / config_name, record):
            with _intact(path):
                data = path.read_bytes()
                if facts and hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest() != facts["blake2b"]:
                    raise ValueError("its bytes are not those that were written")
                tables.append(read_shard(data))
        with _intact(folder / config_name):
            names = tables[0]["names"]
            if any(t["names"] != names for t in tables) or not all(isinstance(n, str) for n in names):
                raise ValueError("its files do not name the classes by the same texts")
            columns = {name: torch.cat([t[name] for t in tables]) for name in tables[0] if name != "names"}
            images = columns.pop("pixels", columns["image"])
            return DistilledSet(
                images=images,
                labels=columns["label"],
                weights=columns["weight"],
                class_names=names,
                prototype=columns["prototype"],
                counts=columns["count"],
                source_row=columns["source_row"],
                soft_labels=columns.get("soft_label"),
                bounded=images.dtype == torch.uint8 or _in_range(images),
                label_kind=recorded_kind(record, str(folder / config_name)),
                step_size=record.get("step_size"),
                provenance=record,
            )

    def push_to_hub(
        self,
        repo_id: str,
        config_name: str = "default",
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        **card: Any,
    ) -> Any:
        """Push the set to a data set repository of the Hub.

        It becomes one configuration. The repository is created if it does not exist; its other configurations stay,
        and so does what you wrote into its card.

        Args:
            repo_id: "name" (in your own namespace) or "owner/name".
            config_name: name of the configuration.
            private: whether a new repository is private; None: the account's default.
            revision: branch to push to.
            token: None takes HF_TOKEN or the login.
            commit_message: None names the set.
            create_pr: open a pull request in place of a commit.
            **card: `license`, `pretty_name`, `source_license`, `generator_license`; see `HubConfig`.

        Returns:
            The commit (huggingface_hub's `CommitInfo`), which is also its URL as text.
        """
        settings = {"private": private, "revision": revision, "create_pr": create_pr, **card}
        with tempfile.TemporaryDirectory() as scratch:
            self.save(scratch, config_name)
            return push_folder(scratch, repo_id, token=token, commit_message=commit_message, **settings)

    @staticmethod
    def from_hub(
        repo_id: str,
        config_name: str | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> DistilledSet:
        """Download a set that `push_to_hub` or `dq push` uploaded.

        Args:
            repo_id: "owner/name".
            config_name: None takes the only configuration, or the one that the card marks as default.
            revision: branch, tag or commit.
            token: None takes HF_TOKEN or the login.
            cache_dir: where the files are kept; None: the Hub library's own cache.
        """
        return DistilledSet.load(
            *download_set(repo_id, config_name, revision=revision, token=token, cache_dir=cache_dir)
        )

    def save_images(self, folder: str | Path) -> Path:
        """Write `folder`/CLASS/0000.png, heaviest image of a class first, and `folder`/weights.csv.

        Float images are rounded to bytes, and label vectors stay with the set. See `dq.distilled.png.save_images`.

        Returns:
            The folder.

        Raises:
            InputError: if the folder holds something already.
        """
        return save_images(folder, self.images_uint8(), self.labels, self.weights, self.class_names)

    def images_uint8(self) -> Tensor:
        """Images as (N, 3, H, W) uint8, rounded where they are float."""
        if self.images.dtype == torch.uint8:
            return self.images
        return (self.images.clamp(0, 1) * 255).round().to(torch.uint8)
