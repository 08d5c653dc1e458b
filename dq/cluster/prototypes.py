"""Prototypes of one class: points, cells, and training weights from exact counts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dq.cluster.inputs import as_points, as_rows, as_tensor, as_weights
from dq.cluster.kmeans import Clustering
from dq.cluster.lloyd import cell_sums, squared_distances
from dq.core.errors import InputError
from dq.core.files import read_tensors, write_tensors
from dq.core.plain import PlainDict
from dq.data.coresets import largest_remainder

WeightKind = Literal["uniform", "mass", "sqrt"]
Normalization = Literal["none", "class", "sqrt_k"]


def image_weights(counts: object, kind: WeightKind = "sqrt", normalize: Normalization = "none") -> Tensor:
    """Training weights (K,) float32 of the prototypes of a class from counts n_k.

    With masses m_k = n_k / sum n:  `uniform` 1;  `mass` K m_k (Algorithm 1 of DDOQ);  `sqrt` sqrt(K m_k), the reading
    of the paper's variance-reducing heuristic that gives 1 for equal clusters. The literal equation is not known.

    Args:
        counts: (K,) positive numbers, as a tensor, an array or a list.
        kind: one of these.
        normalize: "none" leaves them; "class" scales to mean 1 in the class; "sqrt_k" scales to sum sqrt(K), the
            form of the only public port (its mean is 1 / sqrt(K)).

    Raises:
        InputError: for counts that are not positive and finite, and other kinds.
    """
    counts = as_tensor(counts, "counts").double()
    if counts.ndim != 1 or not len(counts) or not (torch.isfinite(counts).all() and (counts > 0).all()):
        raise InputError(f"weights need a vector of positive counts, not {counts.tolist()}")
    k = len(counts)
    mass = counts / counts.sum()
    if kind == "uniform":
        w = torch.ones(k, dtype=torch.float64)
    elif kind == "mass":
        w = k * mass
    elif kind == "sqrt":
        w = (k * mass).sqrt()
    else:
        raise InputError(f"weights must be 'uniform', 'mass' or 'sqrt', not {kind!r}")
    if normalize == "class":
        w = w * (k / w.sum())
    elif normalize == "sqrt_k":
        w = w * (k**0.5 / w.sum())
    elif normalize != "none":
        raise InputError(f"normalize must be 'none', 'class' or 'sqrt_k', not {normalize!r}")
    return w.float()


def images_by_mass(masses: object, total: int) -> list[int]:
    """Divide `total` images by masses, by largest remainders, each at least 1.

    Images for the minimum of 1 come from the prototypes furthest above their share; of equal ones the later.

    Args:
        masses: (K,) positive.
        total: at least K.

    Raises:
        InputError: for masses that are not positive, or fewer images than prototypes.
    """
    values = as_tensor(masses, "masses").double()
    w = as_weights(values, len(values), "masses of prototypes").cpu().numpy()
    if not (w > 0).all():
        raise InputError(f"prototype {int((w <= 0).nonzero()[0][0])} has no mass and no share of the images")
    if total < len(w):
        raise InputError(f"{total} images are too few for {len(w)} prototypes, which have at least one each")
    numbers = largest_remainder(w, total).clip(min=1)
    while numbers.sum() > total:
        above = np.where(numbers > 1, numbers - total * w / w.sum(), -np.inf)
        numbers[len(w) - 1 - above[::-1].argmax()] -= 1
    return numbers.astype(int).tolist()


@dataclass(frozen=True)
class Prototypes:
    """Quantizer of one class in the denoiser's latent space, largest cell first.

    K may be below the requested ipc. The cells may have been found in another space (`cluster.space`). Points are
    latents in every case; what measures distances (`sse`, which member is a medoid) does so in the space of the cells.
    """

    label: int
    name: str
    centroids: Tensor  # (K, C, h, w) float32; in another space than the latents': means of the cells' latents
    counts: Tensor  # (K,) int64, images per cell; raw, never transformed
    sse: Tensor  # (K,) float64, sum of squared distances in the cell
    medoids: Tensor  # (K, C, h, w) float32, the member of the cell nearest to its centroid
    medoid_rows: Tensor  # (K,) int64, the rows of the source that the medoids are
    stats: PlainDict = dataclasses.field(default_factory=dict)  # see `quantization_stats` and `latent_stats`
    masses: Tensor | None = None  # (K,) float64, weights of the images of each cell; None: every image weighs 1
    rows: Tensor | None = None  # (n,) int64, the rows of the source that are quantized; None: of a version before
    cells: Tensor | None = None  # (n,) int32, the cell of each of them

    def weights(self, kind: WeightKind = "sqrt", normalize: Normalization = "none") -> Tensor:
        """Training weights, (K,) float32; see `image_weights`."""
        return image_weights(self.counts if self.masses is None else self.masses, kind, normalize)

    def image_weights(
        self, numbers: int | Sequence[int], kind: WeightKind = "sqrt", normalize: Normalization = "none"
    ) -> Tensor:
        """Training weights (N,) float32 of images, prototype by prototype.

        Those of a prototype share its mass. A prototype without images has no weight: the others stand for the class
        by their own masses. With equal numbers these are the `weights`, repeated. `numbers` are images of every
        prototype, one number for all or (K,).
        """
        if isinstance(numbers, int):
            return self.weights(kind, normalize).repeat_interleave(numbers)
        each = torch.tensor(numbers)
        masses = (self.counts if self.masses is None else self.masses).double() / each.clamp(min=1)
        w = image_weights(masses.repeat_interleave(each), kind, normalize)
        # normalized to sqrt(K) over K prototypes, as with equal numbers
        return w * (len(w) / int((each > 0).sum())) ** 0.5 if normalize == "sqrt_k" else w

    def points(
        self, representative: Literal["centroid", "medoid", "real"], *, rescale: Literal["none", "norm"] = "none"
    ) -> Tensor:
        """Latents (K, C, h, w) that represent the cells; those of `real` are the medoids.

        A mean of latents is shorter than any of them. A point that is c times as long has c^2 times the signal: at
        `Start.snr` S, which takes latents of the usual length for granted, the trajectory of a point of length r
        begins with the signal of S (r / median norm)^2, and with that of S itself after `rescale="norm"`.

        `rescale="norm"` gives every point the median Euclidean norm of its class's latents (`median_norm` in the
        stats). The direction stays; a point at the origin stays too.

        Raises:
            InputError: if the stats have no `median_norm`.
        """
        points = self.centroids if representative == "centroid" else self.medoids
        if representative not in ("centroid", "medoid", "real"):
            raise InputError(f"representative must be 'centroid', 'medoid' or 'real', not {representative!r}")
        if rescale == "none":
            return points
        if rescale != "norm":
            raise InputError(f"rescale must be 'none' or 'norm', not {rescale!r}")
        if "median_norm" not in self.stats:
            raise InputError(
                f"the prototypes of class {self.label} {self.name!r} lack the median norm that generate.rescale=norm "
                "needs; delete prototypes/ of the run and run `dq cluster` again"
            )
        norms = points.flatten(1).norm(dim=1).clamp(min=1e-12)
        return points * (self.stats["median_norm"] / norms).view(-1, 1, 1, 1)

    def members(self) -> tuple[Tensor, Tensor]:
        """Quantized rows (n,) int64 of the source, and the cell (n,) int32 of each.

        Raises:
            InputError: for prototypes from a version that did not keep them.
        """
        if self.rows is None or self.cells is None:
            raise InputError(
                f"the prototypes of class {self.label} {self.name!r} do not say which images are in their cells; "
                "delete prototypes/ of the run and run `dq cluster` again"
            )
        return self.rows, self.cells

    def save(self, path: Path) -> None:
        tensors = {
            "centroids": self.centroids,
            "counts": self.counts,
            "sse": self.sse,
            "medoids": self.medoids,
            "medoid_rows": self.medoid_rows,
        }
        more = {"masses": self.masses, "rows": self.rows, "cells": self.cells}
        tensors |= {k: v for k, v in more.items() if v is not None}
        write_tensors(path, tensors, {"label": self.label, "name": self.name, "stats": self.stats})

    @staticmethod
    def load(path: Path) -> Prototypes:
        t, meta = read_tensors(path)
        return Prototypes(label=meta["label"], name=meta["name"], stats=meta["stats"], **t)


def make_prototypes(
    label: int,
    name: str,
    latents: object,
    rows: object,
    result: Clustering,
    *,
    points: object = None,
    weights: object = None,
) -> Prototypes:
    """Make prototypes, without stats, from a clustering of a class's latents.

    Among the members of a cell the nearest to the mean is also the one with the least summed squared distance to
    the others, so the medoid needs no pairwise distances.

    Args:
        label: index of the class.
        name: of the class.
        latents: (n, C, h, w).
        rows: (n,) the images of the source that the latents are of.
        result: clustering of the latents, or of `points`.
        points: (n, d), the same images in the space in which `result` is; None: the latents. With points the centroids
            of `result` are no latents, and the means of the cells' latents stand in for them.
        weights: (n,) those of the clustering; None: there were none.

    Raises:
        InputError: if latents, rows, points and the clustering are not of one number of images.
    """
    latents, rows = as_tensor(latents, "latents"), as_tensor(rows, "rows")
    z = as_rows(latents, "latents")
    x = z if points is None else as_points(points, "points")
    k, n = len(result.counts), len(result.labels)
    if (len(z), len(rows), len(x)) != (n, n, n):
        raise InputError(
            f"the clustering is of {n} images, but there are {len(z)} latents, {len(rows)} rows and {len(x)} points"
        )
    distance = (x - result.centroids[result.labels]).square().sum(1)
    order = distance.argsort(stable=True)
    by_cell = order[result.labels[order].argsort(stable=True)]  # cell after cell, nearest first
    first = by_cell[torch.cat([result.counts.new_zeros(1), result.counts.cumsum(0)[:-1]])]
    centroids = result.centroids if points is None else cell_means(z, result.labels, k, weights)
    return Prototypes(
        label=label,
        name=name,
        centroids=centroids.reshape(k, *latents.shape[1:]).float().cpu(),
        counts=result.counts.cpu(),
        sse=result.sse.cpu(),
        medoids=latents[first].float().cpu(),
        medoid_rows=rows[first.cpu()],
        masses=None if weights is None else result.masses.cpu(),
        rows=rows.cpu(),
        cells=result.labels.int().cpu(),
    )


def select_clusters(result: Clustering, keep: Tensor, *, requested: int) -> tuple[Clustering, Tensor]:
    """Restrict a clustering to some clusters.

    Args:
        result: a clustering of n points.
        keep: (K',) int64, ascending numbers of clusters.
        requested: the requested k.

    Returns:
        The clustering of the points that these own, and which of the points (n,) bool they are.
    """
    at = keep.to(result.labels.device)
    renumber = torch.full_like(result.counts, -1)
    renumber[at] = torch.arange(len(at), device=at.device)
    labels = renumber[result.labels]
    members = labels >= 0
    parts = {name: getattr(result, name)[at] for name in ("centroids", "counts", "masses", "sse")}
    running_weights = None if result.running_weights is None else result.running_weights[at.cpu()]
    chosen = dataclasses.replace(result, **parts, labels=labels[members], running_weights=running_weights)
    return dataclasses.replace(chosen, requested=requested), members


def cell_means(x: object, labels: object, k: int, weights: object = None) -> Tensor:
    """Weighted mean (k, d) of the points x (n, d) of each of k cells.

    `labels` (n,) number the cells, none of which is empty; `weights` (n,) are not negative, None: 1 each.

    Raises:
        InputError: if a cell is empty, or labels are not (n,) whole numbers below k.
    """
    x, labels = as_points(x, "x"), as_tensor(labels, "labels")
    labels = _checked_labels(labels.to(x.device), len(x), k)
    if int(labels.unique().numel()) != k:
        raise InputError(f"only {labels.unique().numel()} of {k} cells have points; number the cells without gaps")
    shift = x.mean(0)
    w = x.new_ones(1, len(x)) if weights is None else as_weights(weights, len(x), "weights of x").to(x)[None]
    sums, mass = cell_sums((x - shift)[None], labels[None], w, k)
    return sums[0] / mass[0, :, None] + shift


def _checked_labels(labels: Tensor, n: int, k: int) -> Tensor:
    integers = not (labels.is_floating_point() or labels.dtype == torch.bool)
    if labels.shape != (n,) or not integers or int(labels.min()) < 0 or int(labels.max()) >= k:
        raise InputError(
            f"labels must be ({n},) whole numbers from 0 to {k - 1}, not {labels.dtype} {tuple(labels.shape)}"
        )
    return labels.long()


def latent_stats(latents: object, labels: object, centroids: object) -> dict[str, float]:
    """Compute statistics of cells of any space as cells of latents.

    `explained_latents` is the share of the variance of the latents that lies between the means of the cells;
    `w2_latents` the root of the mean squared distance of a latent to the centroid of its cell: what it costs to move
    the class into its prototypes with their masses, cell by cell, hence W2 or above (equal for nearest cells);
    `median_norm` the median Euclidean norm of a latent of the class, `centroid_norm` the mean norm of the centroids.

    Args:
        latents: (n, C, h, w) or (n, d).
        labels: (n,) cell of each.
        centroids: (K, C, h, w) or (K, d), of the prototypes.
    """
    z, c = as_rows(latents, "latents"), as_rows(centroids, "centroids")
    if z.shape[1] != c.shape[1]:
        raise InputError(f"latents have {z.shape[1]} numbers each and centroids {c.shape[1]}; give those of one space")
    labels = _checked_labels(as_tensor(labels, "labels").to(z.device), len(z), len(c))
    c = c.to(z)
    norms = torch.linalg.vector_norm(z, dim=1).double()
    centroid_norms = torch.linalg.vector_norm(c, dim=1).double()
    shift = z.mean(0)  # before float64 is rounded
    z, c = (z - shift).float(), (c - shift).float()

    def spread(points: Tensor, cells: Tensor) -> float:
        return float(squared_distances(z[None], points[None], cells[None]).double().sum())

    total = spread(z.mean(0, keepdim=True), torch.zeros_like(labels))
    within = spread(cell_means(z, labels, len(c)), labels)
    return {
        "explained_latents": 1 - within / total if total > 0 else 1.0,
        "w2_latents": math.sqrt(spread(c, labels) / len(z)),
        "median_norm": float(norms.quantile(0.5)),
        "centroid_norm": float(centroid_norms.mean()),
    }
