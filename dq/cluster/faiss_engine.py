"""Lloyd iterations by FAISS, on CPU or on this process's own GPU. The only module that imports faiss."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dq.core.errors import InputError


def has_faiss() -> bool:
    return importlib.util.find_spec("faiss") is not None


def has_faiss_gpu() -> bool:
    """Whether the installed build drives GPUs and sees one."""
    if not has_faiss():
        return False
    import faiss

    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def lloyd_faiss(
    x: Tensor, centroids: Tensor, weights: Tensor | None, *, n_iter: int, tol: float
) -> tuple[Tensor, int, bool]:
    """Lloyd's algorithm on one class from given centroids.

    x (n, d) and centroids (k, d) float32; weights (n,) or None. FAISS splits empty clusters by itself and does not
    say so; the caller recounts.

    Returns:
        centroids (k, d) on x's device, iterations, whether it stopped before `n_iter`.
    """
    if not has_faiss():
        raise InputError("cluster.engine=faiss needs FAISS; install dq-distill[faiss], or use engine=torch")
    import faiss

    points = np.ascontiguousarray(x.detach().cpu().numpy(), dtype=np.float32)
    start = np.ascontiguousarray(centroids.detach().cpu().numpy(), dtype=np.float32)
    k, d = start.shape
    cp = faiss.ClusteringParameters()
    cp.niter = n_iter
    # The default subsamples silently to 256 points per centroid, and warns below 39.
    cp.max_points_per_centroid = max(1, len(points))
    cp.min_points_per_centroid = 1
    cp.early_stop_threshold = tol
    clustering = faiss.Clustering(d, k, cp)
    faiss.copy_array_to_vector(start.ravel(), clustering.centroids)
    if x.device.type == "cuda" and has_faiss_gpu():
        resources = faiss.StandardGpuResources()
        config = faiss.GpuIndexFlatConfig()
        # Kmeans(gpu=True) would take every visible GPU in every process.
        config.device = x.device.index if x.device.index is not None else torch.cuda.current_device()
        index: Any = faiss.GpuIndexFlatL2(resources, d, config)
    else:
        index = faiss.IndexFlatL2(d)
    w = None if weights is None else np.ascontiguousarray(weights.detach().cpu().numpy(), dtype=np.float32)
    clustering.train(points, index, w)
    found = faiss.vector_float_to_array(clustering.centroids).reshape(k, d)
    stats: Any = clustering.iteration_stats
    used = stats.size()
    return torch.from_numpy(found.copy()).to(x.device), int(used), bool(used < n_iter)
