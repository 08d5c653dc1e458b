"""Quality of a prior: samples beside real images, in a teacher's features."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dq.config.prior import PriorReportConfig
from dq.config.schema import GenerateConfig
from dq.core.errors import InputError
from dq.core.plain import PlainDict
from dq.core.seeds import generator
from dq.core.version import __version__
from dq.data.images import read_images
from dq.data.source import ImageSource, Split
from dq.diffusion.codec import decode_images, encode_latents, to_signed
from dq.diffusion.generator import LatentGenerator
from dq.diffusion.prior.metrics import (
    density_coverage,
    frechet_distance,
    kernel_distance,
    least_rmse,
    nearest,
    nearest_ratio,
)
from dq.diffusion.prior.samples import Draw, stored_samples
from dq.diffusion.sampling import choose_scheduler
from dq.networks.real_data import RealData
from dq.networks.teacher import pooled_logits

log = logging.getLogger("dq")


@dataclass(frozen=True)
class PriorQuality:
    """Measurements of a prior, and the images they were taken on."""

    records: list[PlainDict]  # one per row of the table
    labels: Tensor  # (N,) class of every sample
    samples: dict[float, Tensor]  # by guidance scale: (N, 3, S, S) uint8
    distances: dict[float, Tensor]  # by guidance scale: (N,) to the nearest train image, in features
    closest: dict[float, Tensor]  # by guidance scale: (N,) row of that image in the train split


def sample_counts(source: ImageSource, per_class: int) -> np.ndarray:
    """Images per class that can be compared, at most `per_class`.

    A class has as many as it has both test and train images.
    """
    tested = np.bincount(source.test.labels, minlength=len(source.class_names))
    return np.minimum(source.class_counts(), tested).clip(max=per_class)


def checked_counts(source: ImageSource, config: PriorReportConfig) -> np.ndarray:
    """`sample_counts` of a source.

    Raises:
        InputError: if these are too few for density and coverage.
    """
    counts = sample_counts(source, config.per_class)
    if counts.sum() <= config.neighbors:
        raise InputError(
            f"{source.origin} has test and train images for {counts.sum()} samples only; name a larger split with "
            "--set source.test_split=NAME, or lower prior_report.neighbors"
        )
    return counts


def plan_draw(
    pipe: LatentGenerator,
    real_data: RealData,
    config: PriorReportConfig,
    generate: GenerateConfig,
    *,
    resolution: int,
    seed: int,
) -> Draw:
    """Settings of the samples to measure: `sample_counts` of every class.

    Raises:
        InputError: if the model is no DiT for these classes at this resolution, or the test split is too small.
    """
    source = real_data.source
    counts = checked_counts(source, config)
    if counts.min() < config.per_class:
        name = source.class_names[int(counts.argmin())]
        log.warning(
            "prior_report.per_class=%d is more than some classes have images: %r is measured on %d",
            config.per_class,
            name,
            counts.min(),
        )
    ids = pipe.check_inputs(generate, resolution, source.class_names)
    return Draw(
        pipe=pipe,
        scheduler=choose_scheduler(pipe.scheduler, generate.scheduler),
        condition_ids=tuple(ids),
        counts=tuple(counts.tolist()),
        num_inference_steps=config.num_inference_steps,
        image_size=real_data.image_size,
        seed=seed,
        batch_size=generate.batch_size,
        internal_guidance=generate.internal_guidance,
        autoguidance=generate.autoguidance,
    )


def measure_prior(
    draw: Draw, real_data: RealData, config: PriorReportConfig, *, resolution: int, folder: Path
) -> PriorQuality:
    """Measure samples, real train images and the codec against test images.

    All rows have the same number of images of every class. `real test` are the test images that the others are
    compared with; `real train` as many train images, on which the teachers may have been trained; `codec` the same
    test images encoded and decoded, so its distances are of pairs; `guidance G` samples from pure noise. Features are
    those of the first teacher, and no number can be compared with one of Inception features. Accuracy is that of all
    teachers together. Near copies are searched for among all train images.

    `resolution` is the side in px at which the codec sees images. Samples are kept in `folder`; existing ones are not
    drawn again.

    Raises:
        InputError: without a teacher, or if a required image cannot be read.
    """
    if not real_data.teachers:
        raise InputError("a prior is measured in the features of a teacher; set teachers")
    source, side, teacher = real_data.source, real_data.image_size, real_data.teachers[0]
    test_rows = _rows(source.test, draw.counts, draw.seed)
    test_images = _read(real_data, source.test, test_rows, side)
    train_images = _read(real_data, source.train, _rows(source.train, draw.counts, draw.seed), side)
    decoded = _through_codec(draw, _read(real_data, source.test, test_rows, resolution))
    reference = _reference(draw, real_data, test_images, config.neighbors)
    numbers = {**_nearness(reference, reference.test_distances[:, 0]), "accuracy": _accuracy(reference, test_images)}
    numbers["pixel_rmse"] = _smallest_rmse(reference, test_images, reference.test_neighbors)
    rows: list[PlainDict] = [{"row": "real test", **numbers}]
    for name, images in (("real train", train_images), ("codec", decoded)):
        numbers = _feature_distances(reference, teacher.features(images))
        rows.append({"row": name, "accuracy": _accuracy(reference, images), **numbers})
    samples, nearest_distances, closest = {}, {}, {}
    for g in config.guidance:
        images = stored_samples(draw, g, folder)
        features = teacher.features(images)
        distances, neighbors = nearest(features, reference.train_features, config.neighbors)
        numbers = {**_feature_distances(reference, features), **_nearness(reference, distances[:, 0])}
        numbers |= {"accuracy": _accuracy(reference, images), "guidance": g}
        numbers["pixel_rmse"] = _smallest_rmse(reference, images, neighbors)
        rows.append({"row": f"guidance {g:g}", **numbers})
        samples[g], nearest_distances[g] = images, distances[:, 0]
        closest[g] = reference.train_rows[neighbors[:, 0]]
    facts = _facts(draw, real_data, config, reference.train_features.shape)
    return PriorQuality([_record(r, facts) for r in rows], draw.labels, samples, nearest_distances, closest)


@dataclass(frozen=True)
class _Reference:
    """Real images to compare with, in features of the first teacher."""

    real_data: RealData
    labels: Tensor  # (N,) class of every compared image
    seed: int
    test_features: Tensor  # (N, d)
    train_features: Tensor  # (n, d), of the train images that can be read
    train_rows: Tensor  # (n,) int64, their rows in the train split
    test_distances: Tensor  # (N, k), of test images to their nearest train images
    test_neighbors: Tensor  # (N, k) int64, indices of these into `train_features`


def _reference(draw: Draw, real_data: RealData, test_images: Tensor, k: int) -> _Reference:
    features = real_data.features()
    readable = (~features.isnan().all(1)).nonzero()[:, 0]
    train_features = features[readable]
    test_features = real_data.teachers[0].features(test_images)
    distances, neighbors = nearest(test_features, train_features, k)
    return _Reference(real_data, draw.labels, draw.seed, test_features, train_features, readable, distances, neighbors)


def _accuracy(reference: _Reference, images: Tensor) -> float:
    """Accuracy of all teachers together."""
    predictions = pooled_logits(reference.real_data.teachers, images).argmax(1)
    return float((predictions == reference.labels).double().mean())


def _feature_distances(reference: _Reference, features: Tensor) -> dict[str, float]:
    """Distances between features (N, d) and those of the test images."""
    k = reference.test_neighbors.shape[1]
    kernel = kernel_distance(features, reference.test_features, seed=reference.seed)
    density, coverage = density_coverage(reference.test_features, features, k)
    return {
        "frechet": frechet_distance(features, reference.test_features),
        "kernel": kernel[0],
        "kernel_std": kernel[1],
        "density": density,
        "coverage": coverage,
    }


def _nearness(reference: _Reference, distances: Tensor) -> dict[str, float]:
    """`nearest_ratio` of distances (N,) to the nearest train images."""
    share, ratio = nearest_ratio(distances, reference.test_distances[:, 0])
    return {"near_share": share, "median_ratio": ratio}


def _smallest_rmse(reference: _Reference, images: Tensor, neighbors: Tensor) -> float:
    """Smallest pixel RMSE of images to their nearest train images.

    Images are (N, 3, S, S) uint8, `neighbors` (N, k).
    """
    real_data, rmse = reference.real_data, []
    for x, i in zip(images.split(64), neighbors.split(64), strict=True):
        rows = reference.train_rows[i.flatten()].tolist()
        candidates = _read(real_data, real_data.source.train, rows, real_data.image_size)
        rmse.append(least_rmse(x, candidates.unflatten(0, i.shape)))
    return float(torch.cat(rmse).min())


MEASURED = (
    *("row", "guidance", "images", "accuracy", "frechet", "kernel", "kernel_std", "density", "coverage"),
    *("near_share", "median_ratio", "pixel_rmse"),
)


def _record(row: PlainDict, facts: PlainDict) -> PlainDict:
    """A row with every column (None if missing) and the shared facts."""
    record = {k: row.get(k, facts.get(k)) for k in MEASURED} | facts
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in record.items()}


def _facts(draw: Draw, real_data: RealData, config: PriorReportConfig, train: Sequence[int]) -> PlainDict:
    import diffusers

    return {
        "images": sum(draw.counts),
        "classes": sum(n > 0 for n in draw.counts),
        "per_class": config.per_class,
        "image_size": real_data.image_size,
        "train_images": train[0],
        "features": train[1],
        "teacher": "+".join(t.name for t in real_data.teachers),
        "neighbors": config.neighbors,
        "steps": draw.num_inference_steps,
        **draw.weaker_guidance,
        "scheduler": type(draw.scheduler).__name__,
        "seed": draw.seed,
        "dq": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def _rows(split: Split, counts: Sequence[int], seed: int) -> list[int]:
    """Rows of a split, `counts[c]` of class c, class by class."""
    chosen: list[int] = []
    for c, n in enumerate(counts):
        rows = np.flatnonzero(split.labels == c)
        order = torch.randperm(len(rows), generator=generator(seed, "prior report", split.name, c))
        chosen += rows[order[:n].numpy()].tolist()
    return chosen


def _read(real_data: RealData, split: Split, rows: Sequence[int], side: int) -> Tensor:
    images, _, bad = read_images(split, rows, side, real_data.source.preprocess, on_bad="skip")
    if bad:
        reason = bad[0].partition(";")[0]
        raise InputError(f"equal numbers of images are compared, but {reason}; replace it ({len(bad)} such images)")
    return images


def _through_codec(draw: Draw, images: Tensor) -> Tensor:
    """Encode and decode images, at the samples' size."""

    def batches() -> Iterator[Tensor]:
        for x in images.split(draw.batch_size):
            z = encode_latents(draw.pipe.vae, to_signed(x))
            yield decode_images(draw.pipe.vae, z, draw.image_size, dtype=torch.uint8)

    with torch.no_grad():
        return torch.cat(list(batches()))
