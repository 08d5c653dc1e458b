"""Real images to compare with: as many as a distilled set has, at random, by coreset rules, or as a teacher's patches.

The rules are functions of arrays that return row numbers; `select` turns one of them into a `DistilledSet`.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dq.cluster.kmeans import kmeans
from dq.core.errors import InputError
from dq.core.seeds import derive_seed, digest_of
from dq.core.version import __version__
from dq.data.coresets import _centred_classes, herding_rows, k_center_rows, random_rows
from dq.data.images import read_images
from dq.data.source import ImageSource
from dq.distilled.set import DistilledSet
from dq.networks.patches import Rank, patch_images
from dq.networks.teacher import Teacher

log = logging.getLogger("dq")

BASELINES = ("random", "herding", "k-center", "nearest", "patches")
BY_FEATURES = ("herding", "k-center", "nearest")


def nearest_rows(features: Tensor, labels: np.ndarray, ipc: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the real points nearest to k-means centroids, one of each cell, and the sizes of the cells.

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
    for label, rows, x in _centred_classes(features, labels, ipc):
        found = kmeans(x, min(ipc, len(rows)), seed=derive_seed(seed, "nearest", label), name=f"class {label}")
        distance = (x - found.centroids[found.labels]).square().sum(1)
        for cell, count in enumerate(found.counts.tolist()):
            own = (found.labels == cell).nonzero()[:, 0]
            chosen.append(rows[int(own[distance[own].argmin()])])
            counts.append(count)
    return np.array(chosen, np.int64), np.array(counts, np.int64)


# --- sets ---------------------------------------------------------------------------------------------------------


def select(
    name: str,
    source: ImageSource,
    ipc: int,
    *,
    image_size: int,
    seed: int = 0,
    features: Tensor | Callable[[], Tensor] | None = None,
    teacher: Teacher | None = None,
    candidates: np.ndarray | None = None,
    pool: int = 300,
    crops: int = 5,
    factor: int = 1,
    rank: Rank = "easy",
) -> DistilledSet:
    """A set of real images chosen by one of `BASELINES`, with weights 1, in class order.

    Args:
        name: "random", "herding", "k-center", "nearest" or "patches".
        ipc: images per class; a smaller class gives all that it has.
        image_size: side of the images in px.
        seed: of random, nearest and patches; the other two are deterministic.
        features: (n, d) float for the rows of the train split, or a function that makes them; for herding, k-center
            and nearest.
        teacher: for patches.
        candidates: (m,) ascending int64 rows of the train split that may be chosen; None: all.
        pool: of patches; see `patch_images`, also for crops, factor and rank.

    Raises:
        InputError: if the name is unknown, what the rule needs is missing, or a class has no candidates.

    Example:
        small = select("herding", source, 10, image_size=64, features=latents.flatten(1))
        small.save("sets", "ipc10-herding")
    """
    if name not in BASELINES:
        raise InputError(f"no selection is called {name!r}; choose {', '.join(BASELINES)}")
    labels = _candidate_labels(source, candidates)
    record: dict[str, Any] = {
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
        found = patch_images(
            source,
            ipc,
            teacher=teacher,
            image_size=image_size,
            seed=seed,
            candidates=candidates,
            pool=pool,
            crops=crops,
            factor=factor,
            rank=rank,
        )
        images, rows = found.images, found.rows
    else:
        if name == "random":
            rows = random_rows(labels, ipc, seed)
        else:
            x = _features(name, features, source, candidates)
            record["feature_size"] = x.shape[1]
            if name == "herding":
                rows = herding_rows(x, labels, ipc)
            elif name == "k-center":
                rows = k_center_rows(x, labels, ipc)
            else:
                rows, counts = nearest_rows(x, labels, ipc, seed)
        rows = rows if candidates is None else candidates[rows]
        images, kept, bad = read_images(source.train, rows, image_size, source.preprocess, on_bad=source.on_bad_image)
        if bad:
            log.warning(
                "%d of %d selected images cannot be read and are left out, first: %s", len(bad), len(rows), bad[0]
            )
            counts = None if counts is None else counts[np.isin(rows, kept)]
            rows = np.array(kept, np.int64)
        record["unreadable"] = len(bad)
    return _assemble(source, images, rows, counts, ipc, record)


def _candidate_labels(source: ImageSource, candidates: np.ndarray | None) -> np.ndarray:
    """Labels of the rows that may be chosen, checked."""
    n = len(source.train)
    if candidates is None:
        labels = source.train.labels
    else:
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
    name: str, features: Tensor | Callable[[], Tensor] | None, source: ImageSource, candidates: np.ndarray | None
) -> Tensor:
    """Features of the candidates."""
    if features is None:
        raise InputError(f"the selection {name!r} compares images by features; give features, or choose 'random'")
    x = features() if callable(features) else features
    n = len(source.train)
    if x.ndim != 2 or len(x) != n or not x.is_floating_point():
        raise InputError(f"features must be ({n}, d) float, a row per train image, not {tuple(x.shape)} {x.dtype}")
    return x if candidates is None else x[torch.from_numpy(candidates)]


def _assemble(
    source: ImageSource, images: Tensor, rows: np.ndarray, counts: np.ndarray | None, ipc: int, record: dict[str, Any]
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
            "cluster": {"engine": "torch" if record["name"] == "nearest" else "no clustering"},
            "generate": {"mode": "none"},
            "labels": None,
            "selection": record,
        },
    )
