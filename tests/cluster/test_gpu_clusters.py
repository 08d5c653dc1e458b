"""k-means on a CUDA device: as on the CPU, alone as beside other classes, and twice the same bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dq.cluster.kmeans import Clustering, kmeans_many
from dq.cluster.spaces import embed
from dq.config.schema import ClusterConfig
from dq.core.seeds import derive_seed

pytestmark = pytest.mark.gpu
STARTS = ("k-means++", "random", "pca-multistart")


def clumps(n: int, seed: int) -> Tensor:
    """Points (n, 4, 2, 2) around six centers that lie far apart."""
    g = torch.Generator().manual_seed(seed)
    centers = 6 * torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(9))
    return centers[torch.arange(n) % 6] + 0.3 * torch.randn(n, 4, 2, 2, generator=g)


def clustered(classes: list[Tensor], config: ClusterConfig, device: str) -> list[Clustering]:
    features = [z.flatten(1)[:, :5].abs() for z in classes]
    points = [embed(z.to(device), f.to(device), config) for z, f in zip(classes, features, strict=True)]
    seeds = [derive_seed("class", len(z)) for z in classes]
    return kmeans_many(points, 6, config=config, seeds=seeds, names=[f"class {len(z)}" for z in classes])


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("space", ["latents", "pca", "whitened", "features", "joint"])
def test_every_start_and_space_finds_the_cells_of_the_cpu(init: str, space: str) -> None:
    config = ClusterConfig(engine="torch", init=init, space=space, dims=4 if space in ("pca", "whitened") else None)  # type: ignore[arg-type]
    classes = [clumps(n, n) for n in (90, 120)]
    cpu, gpu = (clustered(classes, config, d) for d in ("cpu", "cuda"))
    for a, b in zip(cpu, gpu, strict=True):
        assert b.centroids.device.type == "cuda" or b.labels.device.type in ("cpu", "cuda")
        assert b.inertia == pytest.approx(a.inertia, rel=1e-3)
        assert int(b.counts.sum()) == int(a.counts.sum())
        assert sorted(b.counts.tolist()) == sorted(a.counts.tolist())


@pytest.mark.parametrize("init", STARTS)
def test_a_class_alone_and_beside_others_and_twice(init: str) -> None:
    config = ClusterConfig(engine="torch", init=init)  # type: ignore[arg-type]
    classes = [clumps(n, n) for n in (90, 120, 60)]
    together, again = clustered(classes, config, "cuda"), clustered(classes, config, "cuda")
    alone = [clustered([z], config, "cuda")[0] for z in classes]
    for a, b, c in zip(together, again, alone, strict=True):
        assert torch.equal(a.centroids, b.centroids)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.sse, b.sse)
        assert torch.equal(a.counts.cpu(), c.counts.cpu())
        torch.testing.assert_close(a.centroids, c.centroids, rtol=1e-4, atol=1e-4)
