"""The same problem solved by scikit-learn, POT, and D4M's sequence of calls."""

from __future__ import annotations

import math
import warnings

import numpy as np
import ot
import pytest
import torch

from dq.cluster.kmeans import kmeans, quantization_stats
from dq.cluster.online import minibatch
from dq.cluster.transport import barycenter, exact_plan, sinkhorn_plan, squared_cost, uniform_w2
from dq.config.schema import ClusterConfig
from dq.core.seeds import derive_seed, generator

LLOYD = ["faiss", "torch"]
SEEDS = range(5)


def mixture(n: int, d: int, modes: int, seed: int, spread: float = 0.7) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(modes, d, generator=g)[torch.randint(modes, (n,), generator=g)] + spread * torch.randn(
        n, d, generator=g
    )


# --- scikit-learn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("engine", LLOYD)
def test_lloyd_is_scikit_learns(engine: str, weighted: bool, seed: int) -> None:
    """From the same start to the end, with and without weights: centers, labels, inertia, number of iterations."""
    from sklearn.cluster import KMeans

    x = mixture(300, 8, 9, seed)
    w = torch.rand(300, generator=torch.Generator().manual_seed(seed)).pow(3) + 0.01 if weighted else None
    start = x[:7].clone()
    reference = KMeans(7, init=start.double().numpy(), n_init=1, tol=0, max_iter=500)
    reference.fit(x.double().numpy(), sample_weight=None if w is None else w.double().numpy())
    r = kmeans(x, 7, config=ClusterConfig(engine=engine, tol=0.0, n_iter=500), weights=w, start=start)
    assert r.inertia == pytest.approx(reference.inertia_, rel=1e-6)
    centers = torch.from_numpy(reference.cluster_centers_)
    order = torch.cdist(r.centroids.double(), centers).argmin(1)
    assert torch.allclose(r.centroids.double(), centers[order], atol=1e-5)
    assert torch.equal(order[r.labels], torch.from_numpy(reference.labels_).long())
    assert r.n_iter == reference.n_iter_


@pytest.mark.parametrize("engine", ["faiss", "torch", "clvq", "minibatch"])
def test_fewer_distinct_points_than_clusters(engine: str) -> None:
    """`test_kmeans_relocating_with_duplicates` of scikit-learn: 4 distinct points, 5 clusters, and a warning."""
    x = torch.tensor([[0.0, 0], [1, 1], [1, 1], [1, 0], [0, 1]])
    start = None if engine == "minibatch" else x.clone()
    with pytest.warns(UserWarning, match="only 4 distinct points to offer for ipc=5"):
        r = kmeans(x, 5, config=ClusterConfig(engine=engine), start=start)
    assert r.counts.tolist() == [2, 1, 1, 1]
    assert r.inertia == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("engine", LLOYD)
def test_start_at_the_fitted_centers_stays(engine: str) -> None:
    """`test_kmeans_init_fitted_centers` of scikit-learn."""
    x = mixture(200, 4, 5, 0)
    config = ClusterConfig(engine=engine, tol=0.0, n_iter=300)
    first = kmeans(x, 5, config=config)
    again = kmeans(x, 5, config=config, start=first.centroids)
    assert torch.allclose(again.centroids, first.centroids, atol=1e-6)
    assert again.n_iter <= 2


@pytest.mark.parametrize("engine", LLOYD)
def test_one_iteration_is_one_of_scikit_learn(engine: str) -> None:
    """`test_k_means_1_iteration` of scikit-learn, from distinct points, whose cells are never empty."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    x = mixture(100, 5, 4, 3)
    start = x[:5].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        reference = KMeans(5, init=start.numpy(), n_init=1, max_iter=1, tol=0).fit(x.numpy())
    r = kmeans(x, 5, config=ClusterConfig(engine=engine, n_iter=1), start=start)
    order = torch.cdist(r.centroids, torch.from_numpy(reference.cluster_centers_)).argmin(1)
    assert torch.allclose(r.centroids, torch.from_numpy(reference.cluster_centers_)[order], atol=1e-5)
    assert r.n_iter == 1
    assert not r.converged


# --- D4M ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("n", "k", "expand"), [(120, 6, 2), (125, 5, 5), (60, 10, 1)])
def test_minibatch_is_d4ms_sequence_of_calls(n: int, k: int, expand: int, seed: int) -> None:
    """Centers and counts bit for bit, D4M's lost tail included: `MiniBatchKMeans(ipc, random_state, batch_size,
    n_init="auto")`, and `partial_fit` whenever km_expand * ipc latents of a class have been collected."""
    from sklearn.cluster import MiniBatchKMeans

    x = mixture(n, 16, 8, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    r = minibatch(x, k, order=order, expand=expand, drop_tail=True, seed=0)
    model = MiniBatchKMeans(k, random_state=0, batch_size=k * expand, n_init="auto")
    collected: list[np.ndarray] = []
    for i in order.tolist():
        collected.append(x[i].view(1, -1).numpy())
        if len(collected) == expand * k:
            model.partial_fit(np.vstack(collected))
            collected = []
    assert np.array_equal(r.centroids.numpy(), model.cluster_centers_)
    assert torch.equal(r.running_weights, torch.from_numpy(model._counts.astype("float64") / model._counts.sum()))
    assert r.steps == n - len(collected)


@pytest.mark.parametrize("seed", range(6))
def test_minibatch_on_d4ms_float16_latents(seed: int) -> None:
    """D4M's latents are float16, which scikit-learn computes with in float64; here it is centered float32."""
    from sklearn.cluster import MiniBatchKMeans

    z, k = (mixture(130, 64, 8, seed) + 0.3).half(), 10
    r = kmeans(z, k, config=ClusterConfig(engine="minibatch", expand=1, drop_tail=True), seed=seed)
    order = torch.randperm(130, generator=generator(seed, "order", 0))
    model = MiniBatchKMeans(k, random_state=derive_seed(seed, "minibatch", 0) % 2**32, n_init="auto")
    for batch in z[order].split(k):
        model.partial_fit(batch.numpy())
    assert model.cluster_centers_.dtype == np.float64
    centers = torch.from_numpy(model.cluster_centers_)
    nearest = torch.cdist(r.centroids.double(), centers).argmin(1)
    assert (r.centroids.double() - centers[nearest]).abs().max() < 1e-5


# --- POT ----------------------------------------------------------------------------------------------------------


def cost_by_pot(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    return ot.dist(x.double().numpy(), y.double().numpy(), metric="sqeuclidean")


@pytest.mark.parametrize("seed", SEEDS)
def test_w2_is_pots(seed: int) -> None:
    x = mixture(150, 12, 6, seed)
    r = kmeans(x.double(), 9, seed=seed)
    cost = cost_by_pot(x, r.centroids)
    uniform_x, uniform_c = np.full(150, 1 / 150), np.full(9, 1 / 9)
    assert uniform_w2(x, r.centroids) == pytest.approx(math.sqrt(ot.emd2(uniform_x, uniform_c, cost)), rel=1e-8)
    stats = quantization_stats(x.double(), r)
    masses = (r.counts / 150).double().numpy()
    assert stats["w2_mass"] == pytest.approx(math.sqrt(ot.emd2(uniform_x, masses, cost)), rel=1e-6)
    assert stats["w2_uniform"] == pytest.approx(math.sqrt(ot.emd2(uniform_x, uniform_c, cost)), rel=1e-6)
    w = torch.rand(150, generator=torch.Generator().manual_seed(seed)).double()
    shares = (w / w.sum()).numpy()
    assert uniform_w2(x, r.centroids, w) == pytest.approx(math.sqrt(ot.emd2(shares, uniform_c, cost)), rel=1e-8)
    assert np.allclose(exact_plan(cost, w).numpy(), ot.emd(shares, uniform_c, cost), atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("seed", SEEDS)
def test_barycenter_is_pots(seed: int, offset: float) -> None:
    """Free-support barycenter of one uniform measure after the same number of rounds, in float64."""
    x = mixture(80, 6, 5, seed).double() + offset
    start = x[:5].clone()
    points, _, used, _ = barycenter(x, start, n_iter=6, tol=0.0)
    reference = ot.lp.free_support_barycenter(
        [x.numpy()], [np.full(80, 1 / 80)], start.numpy(), np.full(5, 1 / 5), numItermax=used, stopThr=0
    )
    assert np.abs(points.numpy() - reference).max() <= (1e-12 if offset == 0 else 1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_entropic_plan_is_pots(seed: int) -> None:
    x = mixture(40, 4, 4, seed).double()
    cost = squared_cost(x, x[:5])
    plan = sinkhorn_plan(cost[None], entropy=0.1, n_iter=5000, tol=1e-13)[0]
    reference = ot.bregman.sinkhorn_log(
        np.full(40, 1 / 40),
        np.full(5, 1 / 5),
        cost.numpy(),
        float(0.1 * cost.mean()),
        numItermax=20_000,
        stopThr=1e-14,
    )
    assert np.allclose(plan.numpy(), reference, atol=1e-11)


@pytest.mark.parametrize("transport", ["exact", "entropic"])
def test_barycenter_far_from_the_origin(transport: str) -> None:
    """In float32, and in float64, which the entropic one took for no points at all."""
    x = mixture(60, 4, 5, 0)
    near = barycenter(x, x[:5], transport=transport, n_iter=10)[0]
    for far in (x + 1e4, x.double() + 1e4):
        points = barycenter(far, far[:5], transport=transport, n_iter=10)[0]
        assert points.dtype == far.dtype
        assert uniform_w2(far, points) == pytest.approx(uniform_w2(x, near), rel=2e-3)
