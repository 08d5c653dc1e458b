"""How good a prior is: distances between sets of features, coverage, copies of train images, and what a classifier
says of the samples.

The functions on top see arrays of features (n, d) alone and compute in float64. Distances of features are Euclidean
and exact to about 1e-8 of the features' norm. (torchmetrics and torch-fidelity have the first two of these distances
with features of Inception's network, which they fetch, and torchvision.)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dq.config.prior import PriorReportConfig
from dq.config.schema import GenerateConfig
from dq.core.errors import InputError
from dq.core.seeds import generator
from dq.data.images import read_images
from dq.data.source import ImageSource, Split
from dq.diffusion.codec import decode_latents, encode_latents, to_signed, to_unit
from dq.diffusion.generator import LatentGenerator
from dq.diffusion.prior.samples import Draw, stored_samples
from dq.diffusion.sampling import choose_scheduler
from dq.networks.real_data import RealData
from dq.networks.teacher import pooled_logits

log = logging.getLogger("dq")

MM = "use_mm_for_euclid_dist"
ROWS = 1024  # rows of each side whose distances are in memory at once
PERCENTILE = 1.0  # of test-to-train distances: a sample nearer than that is as near as the nearest of the test images


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians with the moments of two sets (Heusel et al. 2017, equation 6):

        |m_x - m_y|^2 + Tr(S_x + S_y - 2 (S_x S_y)^(1/2)).

    With S_x = X'X for the centered rows X over sqrt(n - 1), the last trace is the sum of the singular values of XY'.
    So no root of a matrix is taken, and sets with fewer rows than dimensions need no special case. There the
    covariance is singular and the distance is still defined. It is biased upwards, the more the fewer rows (Chong &
    Forsyth 2020): compare values of equal n only, and with that of real images of the same n.

    Args:
        x, y: (n, d) and (m, d) features.

    Raises:
        InputError: for fewer than two rows, unequal dimensions, or values that are not finite.
    """
    x, y = _checked(x, y, least=2)
    mx, my = x.mean(0), y.mean(0)
    a, b = ((v - m) / (len(v) - 1) ** 0.5 for v, m in ((x, mx), (y, my)))
    spread = a.square().sum() + b.square().sum()
    # an orthogonal factor does not change singular values
    overlap = torch.linalg.svdvals(_triangle(a) @ _triangle(b).T).sum()
    return max(0.0, float((mx - my).square().sum() + spread - 2 * overlap))


def kernel_distance(
    x: Tensor, y: Tensor, *, subsets: int = 100, size: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance (Binkowski et al. 2018): unbiased squared maximum mean discrepancy under the kernel
    (x.y / d + 1)^3, mean and standard deviation over seeded subsets without replacement.

    Being unbiased it may be negative. Subsets of one set overlap: the deviation is that of a subset of this size, not
    the error of the mean.

    Args:
        x, y: (n, d) and (m, d) features.
        size: rows of a subset of either set; None: half of the smaller set, at most 1,000.

    Raises:
        InputError: if `size` is below 2 or above the smaller set.
    """
    x, y = _checked(x, y, least=2)
    least = min(len(x), len(y))
    size = max(2, min(1000, least // 2)) if size is None else size
    if not 2 <= size <= least or subsets < 1:
        raise InputError(f"{subsets} subsets of {size} rows cannot be drawn from {least}; choose 2 to {least} rows")
    found = []
    for s in range(subsets):
        g = generator(seed, "kernel distance", s)
        a, b = (v[torch.randperm(len(v), generator=g)[:size]] for v in (x, y))
        pairs = size * (size - 1)
        inner = sum((k.sum() - k.diagonal().sum()) / pairs for k in (_cubic(a, a), _cubic(b, b)))
        found.append(inner - 2 * _cubic(a, b).mean())
    values = torch.stack(found)
    return float(values.mean()), float(values.std(correction=0))


def density_coverage(real: Tensor, fake: Tensor, k: int = 5, *, rows: int = ROWS) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, equations 4 and 5).

    Around every real row lies the ball that reaches its k-th nearest real neighbor. Density is the number of balls
    that hold a fake row, over k, in the mean over fake rows: about 1 for the same law, and not bounded by it. Coverage
    is the share of balls that hold any fake row, in [0, 1].

    Args:
        real, fake: (n, d) and (m, d) features.
        rows: of each side whose distances are in memory at once (8 rows^2 bytes).

    Raises:
        InputError: if there are not more than k real rows.
    """
    real, fake = _checked(real, fake, least=1)
    if len(real) <= k:
        raise InputError(f"{len(real)} real images have no {k} neighbors each; give more, or fewer neighbors")
    inside, covered = 0, 0
    radii = nearest(real, real, k + 1, rows=rows)[0][:, k]  # the nearest of all is the row itself
    for ball, radius in zip(real.split(rows), radii.split(rows)):
        held = torch.zeros(len(ball), dtype=torch.bool)
        for part in fake.split(rows):
            within = torch.cdist(ball, part, compute_mode=MM) < radius[:, None]
            inside += int(within.sum())
            held |= within.any(1)
        covered += int(held.sum())
    return inside / (k * len(fake)), covered / len(real)


def nearest(x: Tensor, y: Tensor, k: int = 1, *, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """The k nearest rows of y (m, d) for every row of x (n, d): distances (n, k) float64, ascending, and indices.

    Raises:
        InputError: if y has fewer than k rows.
    """
    if len(y) < k:
        raise InputError(f"{len(y)} rows have no {k} nearest; give more, or fewer neighbors")
    distances, indices = [], []
    for part in x.split(rows):
        part = part.double()
        d, i = part.new_empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.int64)
        for first in range(0, len(y), rows):
            block = torch.cdist(part, y[first : first + rows].double(), compute_mode=MM)
            d = torch.cat([d, block], 1)
            i = torch.cat([i, torch.arange(first, first + block.shape[1]).expand(len(part), -1)], 1)
            d, kept = d.topk(min(k, d.shape[1]), largest=False)
            i = i.gather(1, kept)
        distances.append(d)
        indices.append(i)
    return torch.cat(distances), torch.cat(indices)


def nearest_ratio(distances: Tensor, usual: Tensor, percentile: float = PERCENTILE) -> tuple[float, float]:
    """Whether samples lie nearer to train images than real test images do.

    Args:
        distances: (n,) of every sample to its nearest train image.
        usual: (m,) of every test image to its nearest train image.
        percentile: of `usual`, below which a sample counts as near.

    Returns:
        The share of samples that are near, `percentile` / 100 for samples like test images; and the median of
        `distances` over that of `usual`, 1 for those, 0 for copies.

    Raises:
        InputError: if half of the test images are themselves copies of train images.
    """
    median = float(usual.double().median())
    if median == 0:
        raise InputError("most test images are train images; name another split with --set source.test_split=NAME")
    near = distances.double() < torch.quantile(usual.double(), percentile / 100)
    return float(near.double().mean()), float(distances.double().median()) / median


def least_rmse(images: Tensor, candidates: Tensor) -> Tensor:
    """Root mean square difference in gray levels (0 to 255) of every image (n, 3, S, S) uint8 to the most similar of
    its candidates (n, k, 3, S, S) uint8: (n,), 0 for an exact copy."""
    return (candidates.float() - images[:, None].float()).square().mean((2, 3, 4)).sqrt().amin(1)


def _checked(x: Tensor, y: Tensor, *, least: int) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise InputError(f"features must be (n, d) and (m, d), not {tuple(x.shape)} and {tuple(y.shape)}")
    if min(len(x), len(y)) < least:
        raise InputError(f"{min(len(x), len(y))} rows of features are too few; give at least {least} of each set")
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise InputError("some features are NaN or infinite; check the teacher and its images")
    return x.detach().cpu().double(), y.detach().cpu().double()


def _triangle(a: Tensor) -> Tensor:
    """R with R'R = a'a and as few rows as it can have."""
    return torch.linalg.qr(a, mode="r").R if len(a) > a.shape[1] else a


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


# --- a prior ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PriorQuality:
    """What was measured of a prior, and the images it was measured on."""

    records: list[dict[str, Any]]  # one per row of the table
    labels: Tensor  # (N,) class of every sample
    samples: dict[float, Tensor]  # by guidance scale: (N, 3, S, S) uint8
    distances: dict[float, Tensor]  # by guidance scale: (N,) to the nearest train image, in features
    closest: dict[float, Tensor]  # by guidance scale: (N,) row of that image in the train split


def sample_counts(source: ImageSource, per_class: int) -> np.ndarray:
    """Images of every class that can be compared: as many as it has test and train images, at most `per_class`."""
    tested = np.bincount(source.test.labels, minlength=len(source.class_names))
    return np.minimum(source.class_counts(), tested).clip(max=per_class)


def checked_counts(source: ImageSource, config: PriorReportConfig) -> np.ndarray:
    """`sample_counts` of a source.

    Raises:
        InputError: if these are too few for density and coverage.
    """
    wanted = sample_counts(source, config.per_class)
    if wanted.sum() <= config.neighbors:
        raise InputError(
            f"{source.origin} has test and train images for {wanted.sum()} samples only; name a larger split with "
            "--set source.test_split=NAME, or lower prior_report.neighbors"
        )
    return wanted


def plan_draw(
    pipe: LatentGenerator,
    bench: RealData,
    config: PriorReportConfig,
    generate: GenerateConfig,
    *,
    resolution: int,
    seed: int,
) -> Draw:
    """What is drawn of a prior in order to measure it: `sample_counts` of every class.

    Raises:
        InputError: if the model is no DiT for these classes at this resolution, or the test split is too small.
    """
    source = bench.source
    wanted = checked_counts(source, config)
    if wanted.min() < config.per_class:
        name = source.class_names[int(wanted.argmin())]
        log.warning(
            "prior_report.per_class=%d is more than some classes have images: %r is measured on %d",
            config.per_class,
            name,
            wanted.min(),
        )
    ids = pipe.check_inputs(generate, resolution, source.class_names)
    return Draw(
        pipe=pipe,
        scheduler=choose_scheduler(pipe.scheduler, generate.scheduler),
        condition_ids=tuple(ids),
        counts=tuple(wanted.tolist()),
        num_inference_steps=config.num_inference_steps,
        image_size=bench.image_size,
        seed=seed,
        batch_size=generate.batch_size,
        internal_guidance=generate.internal_guidance,
        autoguidance=generate.autoguidance,
    )


def measure_prior(
    draw: Draw, bench: RealData, config: PriorReportConfig, *, resolution: int, folder: Path
) -> PriorQuality:
    """Measure samples of a prior against real test images, beside what real images and the codec reach.

    All rows have the same number of images of every class. `real test` are the test images that the others are
    compared with; `real train` as many train images, on which the teachers were perhaps trained; `codec` the same
    test images encoded and decoded, so its distances are of pairs; `guidance G` samples from pure noise. Features are
    those of the first teacher, and no number here can be compared with one of Inception features. Accuracy is that of
    all teachers together. Near copies are searched for among all train images.

    Args:
        resolution: side in px at which the codec sees images.
        folder: where drawn samples are kept; those that are there are not drawn again.

    Raises:
        InputError: without a teacher, or if an image that is needed cannot be read.
    """
    if not bench.teachers:
        raise InputError("a prior is measured in the features of a teacher; set teachers")
    source, labels = bench.source, draw.labels
    test_rows = _rows(source.test, draw.counts, draw.seed)
    real = _read(bench, source.test, test_rows, bench.image_size)
    train_images = _read(bench, source.train, _rows(source.train, draw.counts, draw.seed), bench.image_size)
    decoded = _through_codec(draw, _read(bench, source.test, test_rows, resolution))
    features = bench.features()
    readable = (~features.isnan().all(1)).nonzero()[:, 0]
    train = features[readable]
    real_features = bench.teachers[0].features(real)
    usual, rows = nearest(real_features, train, config.neighbors)

    def rmse(images: Tensor, candidates: Tensor) -> float:
        least = []
        for x, i in zip(images.split(64), candidates.split(64)):
            found = _read(bench, source.train, readable[i.flatten()].tolist(), bench.image_size)
            least.append(least_rmse(x, found.unflatten(0, i.shape)))
        return float(torch.cat(least).min())

    def right(images: Tensor) -> float:
        return float((pooled_logits(bench.teachers, images).argmax(1) == labels).double().mean())

    def compared(x: Tensor) -> dict[str, float]:
        kernel = kernel_distance(x, real_features, seed=draw.seed)
        density, coverage = density_coverage(real_features, x, config.neighbors)
        return {
            "frechet": frechet_distance(x, real_features),
            "kernel": kernel[0],
            "kernel_std": kernel[1],
            "density": density,
            "coverage": coverage,
        }

    def near(distances: Tensor) -> dict[str, float]:
        share, ratio = nearest_ratio(distances, usual[:, 0])
        return {"near_share": share, "median_ratio": ratio}

    found: list[dict[str, Any]] = [
        {"row": "real test", "accuracy": right(real), **near(usual[:, 0]), "pixel_rmse": rmse(real, rows)},
        {
            "row": "real train",
            "accuracy": right(train_images),
            **compared(bench.teachers[0].features(train_images)),
        },
        {"row": "codec", "accuracy": right(decoded), **compared(bench.teachers[0].features(decoded))},
    ]
    samples, all_distances, closest = {}, {}, {}
    for g in config.guidance:
        images = stored_samples(draw, g, folder)
        features = bench.teachers[0].features(images)
        distances, rows = nearest(features, train, config.neighbors)
        numbers = {**compared(features), **near(distances[:, 0]), "pixel_rmse": rmse(images, rows)}
        found.append({"row": f"guidance {g:g}", "guidance": g, "accuracy": right(images), **numbers})
        samples[g], all_distances[g], closest[g] = images, distances[:, 0], readable[rows[:, 0]]
    facts = _facts(draw, bench, config, train.shape)
    return PriorQuality([_record(r, facts) for r in found], labels, samples, all_distances, closest)


MEASURED = (
    *("row", "guidance", "images", "accuracy", "frechet", "kernel", "kernel_std", "density", "coverage"),
    *("near_share", "median_ratio", "pixel_rmse"),
)


def _record(row: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """A row with every column, None where it says nothing, and the facts that all rows share."""
    full = {k: row.get(k, facts.get(k)) for k in MEASURED} | facts
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in full.items()}


def _facts(draw: Draw, bench: RealData, config: PriorReportConfig, train: Sequence[int]) -> dict[str, Any]:
    import diffusers

    from dq.core.version import __version__

    return {
        "images": sum(draw.counts),
        "classes": sum(n > 0 for n in draw.counts),
        "per_class": config.per_class,
        "image_size": bench.image_size,
        "train_images": train[0],
        "features": train[1],
        "teacher": "+".join(t.name for t in bench.teachers),
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
        own = np.flatnonzero(split.labels == c)
        order = torch.randperm(len(own), generator=generator(seed, "prior report", split.name, c))
        chosen += own[order[:n].numpy()].tolist()
    return chosen


def _read(bench: RealData, split: Split, rows: Sequence[int], side: int) -> Tensor:
    images, _, bad = read_images(split, rows, side, bench.source.preprocess, on_bad="skip")
    if bad:
        what = bad[0].partition(";")[0]
        raise InputError(f"equal numbers of images are compared, but {what}; replace it ({len(bad)} such images)")
    return images


def _through_codec(draw: Draw, images: Tensor) -> Tensor:
    """Images encoded and decoded, at the samples' size: (n, 3, S, S) uint8."""

    def batches() -> Iterator[Tensor]:
        for x in images.split(draw.batch_size):
            z = encode_latents(draw.pipe.vae, to_signed(x))
            yield (to_unit(decode_latents(draw.pipe.vae, z), draw.image_size) * 255).round().to(torch.uint8).cpu()

    with torch.no_grad():
        return torch.cat(list(batches()))
