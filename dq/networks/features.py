"""The cache of a teacher's features of every train image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from dq.core.devices import reader_threads
from dq.core.errors import InputError, RunError
from dq.core.files import open_tensors
from dq.core.plain import PlainDict, PlainMapping
from dq.core.seeds import digest_of
from dq.data.image_cache import ImageCache, Reading, fill, write_manifest
from dq.data.source import ImageSource
from dq.networks.teacher import Teacher

C = TypeVar("C", bound=ImageCache)


@dataclass(frozen=True)
class FeatureCache(ImageCache):
    """Cache of a teacher's features (D,) float32 of every train image."""

    name: ClassVar[str] = "features"
    verb: ClassVar[str] = "cluster"

    def width(self) -> int:
        """Return the number of features of an image."""
        with open_tensors(self.path(self._spans.part[0])) as f:
            return int(f.get_slice(self.name).get_shape()[1])

    def load_rows(self, label: int, rows: Tensor) -> Tensor:
        """Load features (n, D) of one class, of the source rows `rows`.

        Raises:
            RunError: if they are of other images.
        """
        features, cached_rows = self.load(label)
        if not torch.equal(cached_rows, rows):
            raise RunError(
                f"{self.folder} has features of {len(cached_rows)} images that are not the {len(rows)} images of "
                f"class {label} {self.class_names[label]!r}; delete it and give the same command again"
            )
        return features


def open_features(cache_dir: str | Path, source: ImageSource, image_size: int, teacher_digest: str) -> FeatureCache:
    """Return the feature cache of this data, teacher, image side in px and preprocessing."""
    return open_teacher_cache(
        FeatureCache, "features", cache_dir, source, teacher_identity(source, image_size, teacher_digest)
    )


def teacher_identity(source: ImageSource, image_size: int, teacher_digest: str) -> PlainDict:
    """Return what decides a teacher's features of the train images, for a digest."""
    return {
        "data": source.fingerprint,
        "teacher": teacher_digest,
        "image_size": image_size,
        "preprocess": source.preprocess,
        "on_bad_image": "raise",  # decides whether there is a result, never which
    }


def open_teacher_cache(
    kind: type[C], name: str, cache_dir: str | Path, source: ImageSource, identity: PlainMapping
) -> C:
    """Open the cache of this identity, in a folder whose name begins with `name`."""
    key = digest_of(identity)
    cache = kind(Path(cache_dir) / f"{name}-{key}", source.class_names, key, len(source.train))
    write_manifest(cache.folder, {**identity, "origin": source.origin})
    return cache


def extract_features(
    source: ImageSource,
    teacher: Teacher,
    cache: FeatureCache,
    image_size: int,
    *,
    local_units: Callable[[list[float]], list[int]] | None = None,
    main: bool = True,
) -> None:
    """Write the features that the cache lacks; see `dq.data.image_cache.fill`.

    Raises:
        InputError: if the teacher's features are not finite.
    """

    def compute(images: Tensor, rows: list[int]) -> Tensor:
        features = teacher.features(images)
        if not torch.isfinite(features).all():
            row = rows[int((~torch.isfinite(features).all(1)).nonzero()[0])]
            raise InputError(
                f"the teacher {teacher.name} gives NaN or infinite features of {source.train.where(row)}; name "
                "another teacher"
            )
        return features

    device = next(teacher.net.parameters()).device
    reading = Reading(image_size, teacher.batch_size, reader_threads(device), pin=device.type == "cuda")
    fill(cache, source, compute, reading, local_units=local_units, main=main)
