"""Nearest centroids by FAISS, on CPU or on the GPU of this process.

The only module that imports faiss.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dq.core.errors import InputError


def has_faiss() -> bool:
    """Whether FAISS is installed."""
    return importlib.util.find_spec("faiss") is not None


def has_faiss_gpu() -> bool:
    """Whether the installed build drives GPUs and sees one."""
    if not has_faiss():
        return False
    import faiss

    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def faiss_assigner(x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Make a function that assigns points x (n, d) float32 to centroids, for `lloyd`.

    FAISS's own `Clustering` is not used: it stops on the unweighted objective, and splits an empty cell by scaling
    another centroid, which in centered data leaves the centroid of a cell that owns everything at the origin.

    Returns:
        `assign(points, centroids)` with points (1, n, d), which are those of x, and centroids (1, k, d): (1, n) int64.

    Raises:
        InputError: if FAISS is not installed.
    """
    if not has_faiss():
        raise InputError("cluster.engine=faiss needs FAISS; install dq-distill[faiss], or use engine=torch")
    import faiss

    points = np.ascontiguousarray(x.detach().cpu().numpy(), dtype=np.float32)
    if x.device.type == "cuda" and has_faiss_gpu():
        resources = faiss.StandardGpuResources()
        config = faiss.GpuIndexFlatConfig()
        # faiss.Kmeans(gpu=True) would take every visible GPU in every process.
        config.device = x.device.index if x.device.index is not None else torch.cuda.current_device()
        index: Any = faiss.GpuIndexFlatL2(resources, x.shape[1], config)
    else:
        index = faiss.IndexFlatL2(x.shape[1])

    def assign(_: Tensor, centroids: Tensor) -> Tensor:
        index.reset()
        index.add(np.ascontiguousarray(centroids[0].detach().cpu().numpy(), dtype=np.float32))
        labels = index.search(points, 1)[1]
        return torch.from_numpy(labels.reshape(1, -1)).to(x.device)

    return assign
