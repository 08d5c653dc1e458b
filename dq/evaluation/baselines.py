"""Baselines of real images: random, coresets, or a teacher's patches.

The rules are functions of arrays that return row numbers; `select` turns one of them into a `DistilledSet`.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from dq.cluster.inputs import as_tensor
from dq.cluster.kmeans import Clustering, kmeans
from dq.config.students import Baseline
from dq.core.errors import InputError
from dq.core.plain import PlainDict
from dq.core.seeds import derive_seed, digest_of
from dq.core.text import plural
from dq.core.version import __version__
from dq.data.coresets import (
    boundary_prototype_rows,
    centered_classes,
    facility_rows,
    herding_rows,
    k_center_rows,
    median_rows,
    random_rows,
    window_rows,
)
from dq.data.images import read_images
from dq.data.source import ImageSource
from dq.distilled.set import DistilledSet
from dq.networks.patches import PatchRecipe, Rank, patch_images
from dq.networks.teacher import Teacher

log = logging.getLogger("dq")

BASELINES = tuple(name for name in get_args(Baseline) if name != "full")
BY_FEATURES = ("herding", "k-center", "nearest", "facility", "facility_cad", "bps")
BY_SCORE = {  # difficulty of `dq.networks.difficulty`, or what a teacher says (`RealData.predictions`)
    "facility_cad": "cad",
    "bps": "entropy",
    "window": "el2n",
    "forgetting": "forgetting",
    "confidence": "probability",
}
BY_PREDICTION = ("bps", "confidence")
BY_DIFFICULTY = tuple(name for name in BY_SCORE if name not in BY_PREDICTION)
CLUSTERED = ("nearest", "bps")
Scores = Callable[[str], Tensor]  # name of a score -> (n,) float, by row of the train split


def nearest_rows(features: Tensor, labels: np.ndarray, ipc: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows nearest to k-means centroids, and the sizes of the cells.

    A class with fewer than `ipc` images gives all that it has. One with copies may have fewer cells than that, of
    which `kmeans` warns.

    Args:
        features: (n, d) float.
        labels: (n,) class indices.
        ipc: centroids per class.
        seed: of the start points of k-means.

    Returns:
        (rows,) and (rows,) int64: rows in class order, within a class the largest cell first, and points per cell.
    """
    chosen, counts = [], []
    for rows, cells, distance in _cells(features, labels, ipc, purpose="nearest", seed=seed):
        for cell, count in enumerate(cells.counts.tolist()):
            inside = (cells.labels == cell).nonzero()[:, 0]
            chosen.append(rows[int(inside[distance[inside].argmin()])])
            counts.append(count)
    return np.array(chosen, np.int64), np.array(counts, np.int64)


def bps_rows(features: Tensor, labels: np.ndarray, ipc: int, entropy: Tensor, seed: int) -> np.ndarray:
    """Rows of prototypes and boundary images of the k-means cells.

    See `boundary_prototype_rows`. A class has one cell for every two of its images, so that an average cell gives a
    prototype and a boundary image: the paper's communities have no fixed number.

    Args:
        features: (n, d) float.
        labels: (n,) class indices.
        ipc: images per class; a class with fewer gives all that it has.
        entropy: (n,) of a teacher's predictions.
        seed: of the start points of k-means.

    Returns:
        (rows,) int64 in class order.
    """
    cells, distances = np.zeros(len(labels), np.int64), np.zeros(len(labels))
    for rows, clustering, distance in _cells(features, labels, -(-ipc // 2), purpose="bps", seed=seed):
        cells[rows], distances[rows] = clustering.labels.numpy(), distance.numpy()
    return boundary_prototype_rows(labels, ipc, cells=cells, distances=distances, entropy=entropy.numpy())


def _cells(
    features: Tensor, labels: np.ndarray, k: int, *, purpose: str, seed: int
) -> Iterator[tuple[np.ndarray, Clustering, Tensor]]:
    """Yield rows, at most k cells and squared distances per class.

    Rows are (n,), distances to the centroids (n,) float64.
    """
    for label, rows, x in centered_classes(features, labels, k):
        cells = kmeans(x, min(k, len(rows)), seed=derive_seed(seed, purpose, label), name=f"class {label}")
        yield rows, cells, (x - cells.centroids[cells.labels]).square().sum(1)


# --- sets ---------------------------------------------------------------------------------------------------------


def select(
    name: str,
    source: ImageSource,
    ipc: int,
    *,
    image_size: int,
    seed: int = 0,
    features: Tensor | np.ndarray | Callable[[], Tensor | np.ndarray] | None = None,
    scores: Scores | None = None,
    teacher: Teacher | None = None,
    candidates: np.ndarray | None = None,
    window_start: float = 0.5,
    pool: int = 300,
    crops: int = 5,
    factor: int = 1,
    rank: Rank = "easy",
) -> DistilledSet:
    """Select real images by one of `BASELINES`, with weights 1.

    Args:
        name: one of `BASELINES`.
        source: real images.
        ipc: images per class; a smaller class gives all that it has.
        image_size: side of the images in px.
        seed: of random, nearest, bps and patches; the others are deterministic.
        features: (n, d) float tensor or array for the rows of the train split, or a function that makes them; for
            herding, k-center, nearest, facility, facility_cad and bps. Rows of NaN, as scores of NaN, are images that
            cannot be read; with `source.on_bad_image` skip they are left out.
        scores: gives by name (n,) float for the rows of the train split: "cad" for facility_cad, "entropy" for bps,
            "el2n" for window, "forgetting", and "probability" of the class for confidence.
        teacher: for patches.
        candidates: (m,) ascending int64 rows of the train split that may be chosen; None: all.
        window_start: of window; see `dq.data.coresets.window_rows`.
        pool: of patches; see `PatchRecipe`.
        crops: of patches.
        factor: of patches.
        rank: of patches.

    Raises:
        InputError: if the name is unknown, what the rule needs is missing, or a class has no candidates.

    Example:
        small = select("herding", source, 10, image_size=64, features=latents.flatten(1))
        small.save("sets", "ipc10-herding")
    """
    if name not in BASELINES:
        raise InputError(f"no selection is called {name!r}; choose {', '.join(BASELINES)}")
    labels = _candidate_labels(source, candidates)
    record: PlainDict = {
        "name": name,
        "seed": seed,
        "image_size": image_size,
        "preprocess": source.preprocess,
        "candidates": None
        if candidates is None
        else {"rows": len(candidates), "digest": digest_of(candidates.tolist())},
    }
    counts = None
    if name == "patches":
        if teacher is None:
            raise InputError("the selection 'patches' needs a teacher; give one, or choose another selection")
        record |= {"teacher": teacher.digest, "pool": pool, "crops": crops, "factor": factor, "rank": rank}
        recipe = PatchRecipe(image_size, pool, crops, factor, rank)
        patches = patch_images(source, ipc, recipe, teacher=teacher, seed=seed, candidates=candidates)
        images, rows = patches.images, patches.rows
    else:
        x = _features(name, features, source, candidates) if name in BY_FEATURES else None
        score = _score(name, scores, source, candidates) if name in BY_SCORE else None
        inputs = _rule_inputs(name, source, _RuleInputs(candidates, labels, x, score))
        record |= {} if x is None else {"feature_size": x.shape[1]}
        record |= {} if score is None else {"score": BY_SCORE[name]}
        record |= {"window_start": window_start} if name == "window" else {}
        rows, counts = _rule(name, inputs, ipc, seed=seed, window_start=window_start)
        rows = rows if inputs.candidates is None else inputs.candidates[rows]
        images, read_rows, bad = read_images(
            source.train, rows, image_size, source.preprocess, on_bad=source.on_bad_image
        )
        if bad:
            log.warning(
                "%d of %d selected images cannot be read and are left out, first: %s", len(bad), len(rows), bad[0]
            )
            counts = None if counts is None else counts[np.isin(rows, read_rows)]
            rows = np.array(read_rows, np.int64)
        record["unreadable"] = len(bad) + inputs.unreadable
    return _assemble(source, images, rows, counts, ipc, record)


@dataclass(frozen=True)
class _RuleInputs:
    """What a rule selects from and by."""

    candidates: np.ndarray | None  # (m,) int64, rows of the train split; None: all
    labels: np.ndarray  # (m,) class indices
    features: Tensor | None  # (m, d)
    scores: Tensor | None  # (m,)
    unreadable: int = 0  # images left out, since they have no features or scores


def _rule_inputs(name: str, source: ImageSource, inputs: _RuleInputs) -> _RuleInputs:
    """Leave out unreadable images, and make CAD a positive weight."""
    is_complete = _complete([v for v in (inputs.features, inputs.scores) if v is not None], source)
    if is_complete is not None:
        unreadable = len(is_complete) - int(is_complete.sum())
        log.warning("the selection %r leaves out %s, which cannot be read", name, plural(unreadable, "train image"))
        rows = np.arange(len(source.train)) if inputs.candidates is None else inputs.candidates
        candidates = rows[is_complete.numpy()]
        features, scores = (None if v is None else v[is_complete] for v in (inputs.features, inputs.scores))
        inputs = _RuleInputs(candidates, _candidate_labels(source, candidates), features, scores, unreadable)
    if name == "facility_cad" and inputs.scores is not None:
        inputs = dataclasses.replace(inputs, scores=_positive_weights(inputs.scores, inputs.labels))
    return inputs


def _rule(
    name: str, inputs: _RuleInputs, ipc: int, *, seed: int, window_start: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Indices of the candidates that a rule selects, and cell sizes."""
    labels, x, score = inputs.labels, inputs.features, inputs.scores
    if name == "nearest" and x is not None:
        return nearest_rows(x, labels, ipc, seed)
    if name == "bps" and x is not None and score is not None:
        return bps_rows(x, labels, ipc, score, seed), None
    if x is not None:
        rule = {"herding": herding_rows, "k-center": k_center_rows}.get(name)
        return facility_rows(x, labels, ipc, score) if rule is None else rule(x, labels, ipc), None
    if score is not None:
        if name == "confidence":
            return median_rows(score, labels, ipc), None
        # the images that are forgotten most often, as DeepCore takes them
        return window_rows(score, labels, ipc, window_start if name == "window" else 1.0), None
    return random_rows(labels, ipc, seed), None


def _score(name: str, scores: Scores | None, source: ImageSource, candidates: np.ndarray | None) -> Tensor:
    """The score (m,) of the candidates that a rule goes by."""
    if scores is None:
        raise InputError(
            f"the selection {name!r} goes by scores of the images ({BY_SCORE[name]}); give scores, or choose 'random'"
        )
    if not callable(scores):
        raise InputError(
            f"scores must be a function of a name such as {BY_SCORE[name]!r} that gives a tensor, not "
            f"{type(scores).__name__}"
        )
    values, n = as_tensor(scores(BY_SCORE[name]), "scores"), len(source.train)
    if values.shape != (n,):
        raise InputError(f"scores must be ({n},), one per train image, not {tuple(values.shape)}")
    return values if candidates is None else values[torch.from_numpy(candidates)]


def _positive_weights(cad: Tensor, labels: np.ndarray) -> Tensor:
    """CAD (m,) as weights, which are 1 in classes without any.

    Facility location needs a positive weight in every class.
    """
    weights = cad.clone()
    for label in np.unique(labels):
        rows = torch.from_numpy(labels == label)
        if not bool(weights[rows].any()):
            log.warning(
                "CAD of class %d is 0 everywhere, and 'facility_cad' selects it without weights, as 'facility' does; "
                "more epochs (prune.epochs, prune.score_epoch) may tell its images apart",
                label,
            )
            weights[rows] = 1.0
    return weights


def _complete(values: list[Tensor], source: ImageSource) -> Tensor | None:
    """Which candidates have features and scores, (m,) bool; None: all.

    Features (m, d) and scores (m,) of images that cannot be read are NaN. Under `raise` they are refused later.
    """
    masks = [~v.reshape(len(v), -1).isnan().all(1) for v in values]
    if source.on_bad_image == "raise" or all(bool(mask.all()) for mask in masks):
        return None
    return torch.stack(masks).all(0)


def _candidate_labels(source: ImageSource, candidates: np.ndarray | None) -> np.ndarray:
    """Check the candidates and return their labels."""
    n = len(source.train)
    if candidates is None:
        labels = source.train.labels
    else:
        if not isinstance(candidates, np.ndarray):
            raise InputError(f"candidates must be an array of ascending int64 rows, not {type(candidates).__name__}")
        ascending = candidates.ndim == 1 and candidates.dtype == np.int64 and (np.diff(candidates) > 0).all()
        if not ascending or not len(candidates) or candidates[0] < 0 or candidates[-1] >= n:
            raise InputError(f"candidates must be ascending int64 rows in 0..{n - 1}, without repetition")
        labels = source.train.labels[candidates]
    sizes = np.bincount(labels, minlength=len(source.class_names))
    _check_no_empty(source, sizes, "candidates" if candidates is not None else "images")
    return labels


def _check_no_empty(source: ImageSource, sizes: np.ndarray, what: str) -> None:
    if sizes.min() == 0:
        c = int(sizes.argmin())
        raise InputError(
            f"class {c} {source.class_names[c]!r} has no {what} to select from; add some, or drop the class"
        )


def _features(
    name: str,
    features: Tensor | np.ndarray | Callable[[], Tensor | np.ndarray] | None,
    source: ImageSource,
    candidates: np.ndarray | None,
) -> Tensor:
    """Features of the candidates."""
    if features is None:
        raise InputError(f"the selection {name!r} compares images by features; give features, or choose 'random'")
    x = as_tensor(features() if callable(features) else features, "features")
    n = len(source.train)
    if x.ndim != 2 or len(x) != n or not x.is_floating_point():
        raise InputError(f"features must be ({n}, d) float, a row per train image, not {tuple(x.shape)} {x.dtype}")
    return x if candidates is None else x[torch.from_numpy(candidates)]


def _assemble(
    source: ImageSource, images: Tensor, rows: np.ndarray, counts: np.ndarray | None, ipc: int, record: PlainDict
) -> DistilledSet:
    labels = source.train.labels[rows]
    _check_no_empty(source, np.bincount(labels, minlength=len(source.class_names)), "readable images")
    n = len(rows)
    return DistilledSet(
        images=images,
        labels=torch.from_numpy(labels.copy()),
        weights=torch.ones(n),
        class_names=source.class_names,
        prototype=torch.from_numpy(np.arange(n) - np.searchsorted(labels, labels)),
        counts=torch.ones(n, dtype=torch.int64) if counts is None else torch.from_numpy(counts),
        source_row=torch.from_numpy(rows),
        provenance={
            "dq": __version__,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "source": {
                "origin": source.origin,
                "fingerprint": source.fingerprint,
                "classes": list(source.class_names),
                "train_counts": source.class_counts().tolist(),
            },
            "seed": record["seed"],
            "ipc": ipc,
            # what the columns of the dataset card ask for
            "method": {"name": record["name"], "representative": "real", "weights": "uniform"},
            "cluster": {"engine": "torch" if record["name"] in CLUSTERED else "no clustering"},
            "generate": {"mode": "none"},
            "labels": None,
            "selection": record,
        },
    )
