"""Cells that run empty, degenerate start points, and weights: all engines held against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dq.cluster.kmeans import kmeans, quantization_stats
from dq.cluster.lloyd import _cumulative_products as cumulative_products
from dq.cluster.lloyd import cell_totals, cumulative_sums
from dq.cluster.online import minibatch, systematic_sample
from dq.config.schema import ClusterConfig
from dq.core.errors import InputError
from dq.core.seeds import derive_seed, generator

LLOYD = ["faiss", "torch"]
STARTED = ["faiss", "torch", "clvq", "barycenter"]  # minibatch draws its own start


def mixture(n: int = 240, d: int = 5, modes: int = 6, seed: int = 0, spread: float = 0.3) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(modes, d, generator=g)
    return centers[torch.randint(modes, (n,), generator=g)] + spread * torch.randn(n, d, generator=g)


def config(engine: str, **settings) -> ClusterConfig:
    return ClusterConfig(engine=engine, **settings)


# --- relocation in Lloyd's engines --------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", LLOYD)
@pytest.mark.parametrize("tol", [0.0, 1e-4])
def test_relocated_clusters_of_scikit_learn(engine: str, tol: float) -> None:
    """`test_kmeans_relocated_clusters` of scikit-learn: the second start owns no point."""
    x = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.5, 1.0], [1.0, 1.0]])
    start = torch.tensor([[0.5, 0.5], [3.0, 3.0]])
    r = kmeans(x, 2, config=config(engine, tol=tol), start=start)
    assert r.inertia == pytest.approx(0.25)
    assert r.converged
    assert r.n_iter == 3
    assert sorted(r.centroids.tolist()) == [[0.25, 0.0], [0.75, 1.0]]


def starts(x: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    return {
        "all equal, at the mean": x.mean(0).expand(k, -1).clone(),
        "all equal, at a point": x[:1].repeat(k, 1),
        "all far off and equal": torch.full((k, x.shape[1]), 1e3),
        "one good, others far off": torch.cat(
            [x[:1], 1e3 + torch.arange(k - 1)[:, None] + torch.zeros(1, x.shape[1])]
        ),
        "pairs of equals": x[: k // 2].repeat(2, 1),
    }


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", list(starts(torch.zeros(2, 1), 2)))
def test_degenerate_starts_end_near_a_good_start(kind: str, weighted: bool) -> None:
    """A cell that owns everything is split, by every engine, and the two of Lloyd agree."""
    k = 6
    x = mixture()
    w = torch.rand(len(x), generator=torch.Generator().manual_seed(1)) + 0.1 if weighted else None
    good = kmeans(x, k, config=config("torch", n_init=5), weights=w).inertia
    one_cell = kmeans(x, 1, config=config("torch"), weights=w).inertia
    results = {}
    for engine in STARTED:
        if weighted and engine == "barycenter":
            continue
        settings = {"transport": "entropic", "entropy": 0.05} if engine == "barycenter" else {}
        r = results[engine] = kmeans(x, k, config=config(engine, **settings), weights=w, start=starts(x, k)[kind])
        assert len(r.counts) == k, engine
        # a barycenter balances its cells, and one pass of a stream stays near its start
        bound = {"clvq": 0.5 * one_cell, "barycenter": 0.25 * one_cell}.get(engine, 1.5 * good)
        assert r.inertia < bound, engine
    assert results["faiss"].inertia == pytest.approx(results["torch"].inertia, rel=1e-4)
    assert torch.equal(results["faiss"].counts, results["torch"].counts)
    assert results["faiss"].converged
    assert results["torch"].converged


@pytest.mark.parametrize("seed", range(12))
def test_faiss_is_torch_under_weights(seed: int) -> None:
    """FAISS by itself stops on the unweighted objective; the heavy points here are few."""
    x = mixture(300, 4, 12, seed, spread=0.8)
    g = torch.Generator().manual_seed(seed)
    w = torch.rand(300, generator=g).pow(8) + 1e-3
    a, b = (kmeans(x, 10, config=config(e, init="random"), weights=w, seed=seed) for e in LLOYD)
    assert a.inertia == pytest.approx(b.inertia, rel=1e-5)
    assert a.n_iter == b.n_iter


@pytest.mark.parametrize("engine", LLOYD)
def test_a_cell_moved_after_the_last_iteration_is_not_converged(engine: str) -> None:
    x = mixture()
    far = torch.cat([x[:1], torch.full((3, 5), 1e3)])
    r = kmeans(x, 4, config=config(engine, n_iter=1), start=far)
    assert r.n_iter == 1
    assert not r.converged
    assert r.counts.min() > 0


# --- an empty cell of a stream moves alone -----------------------------------------------------------------------


def test_the_other_centers_of_a_minibatch_stay_those_of_partial_fit() -> None:
    """Bit for bit, with empty cells. D4M calls scikit-learn's `partial_fit` on batches of a shuffled class."""
    from sklearn.cluster import MiniBatchKMeans

    moved = 0
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(60, 2, generator=g)[torch.randint(40, (60,), generator=g)]  # repeated images run cells empty
        k, expand = 20, 1
        r = kmeans(x, k, config=config("minibatch", expand=expand), seed=seed)
        order = torch.randperm(len(x), generator=generator(seed, "order", 0))
        points = (x - x.mean(0))[order].numpy()
        model = MiniBatchKMeans(k, random_state=derive_seed(seed, "minibatch", 0) % 2**32, n_init="auto")
        for i in range(0, len(x), expand * k):
            model.partial_fit(points[i : i + expand * k])
        expected = torch.from_numpy(model.cluster_centers_) + x.mean(0)
        owned = torch.cdist(x.double(), expected.double()).argmin(1).bincount(minlength=k) > 0
        rows = {tuple(c) for c in r.centroids.tolist()}
        assert {tuple(c) for c in expected[owned].tolist()} <= rows
        assert r.converged == bool(owned.all())
        others = rows - {tuple(c) for c in expected[owned].tolist()}
        shifted = {tuple(c) for c in ((x - x.mean(0)) + x.mean(0)).tolist()}
        assert others <= shifted  # an empty one lies on a point
        moved += len(others)
    assert moved > 6


def test_the_last_batch_of_a_minibatch_may_be_smaller_than_k() -> None:
    x = mixture(25, 3, 4)
    r = minibatch(x, 10, order=torch.arange(25), expand=1, drop_tail=False, seed=0)
    assert r.steps == 25
    assert r.centroids.shape == (10, 3)


def test_the_other_centers_of_clvq_stay_those_of_the_stream() -> None:
    from dq.cluster.online import clvq

    moved = 0
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        x = torch.cat([torch.zeros(588, 2), torch.randn(12, 2, generator=g)])  # few points in the head of the stream
        k = 8
        r = kmeans(x, k, config=config("clvq", batch_size=16), seed=seed)
        order = torch.randperm(len(x), generator=generator(seed, "order", 0, 0))
        points = x - x.mean(0)
        batches = points[order].split(16)
        stream = clvq(lambda p, batches=batches: batches, k, generator=generator(seed, "kmeans", 0))
        expected = stream.centroids + x.mean(0)
        owned = torch.cdist(points.double(), stream.centroids.double()).argmin(1).bincount(minlength=k) > 0
        assert {tuple(c) for c in expected[owned].tolist()} <= {tuple(c) for c in r.centroids.tolist()}
        assert r.converged == bool(owned.all())
        moved += k - int(owned.sum())
    assert moved > 0


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["faiss", "torch", "clvq"])
@pytest.mark.parametrize("start", [False, True])
def test_equal_weights_are_no_weights(engine: str, start: bool) -> None:
    x = mixture(130, 4)
    first = x[:5].clone() if start else None
    plain = kmeans(x, 5, config=config(engine), start=first, seed=3)
    unit = kmeans(x, 5, config=config(engine), weights=torch.ones(130), start=first, seed=3)
    for name in ("centroids", "labels", "counts", "masses", "sse"):
        assert torch.equal(getattr(plain, name), getattr(unit, name)), name
    doubled = kmeans(x, 5, config=config(engine), weights=torch.full((130,), 2.0), start=first, seed=3)
    assert torch.equal(plain.centroids, doubled.centroids)
    assert torch.equal(2 * plain.masses, doubled.masses)


@pytest.mark.parametrize("engine", ["minibatch", "barycenter"])
def test_engines_without_weights_refuse_them(engine: str) -> None:
    with pytest.raises(InputError, match=rf"cluster\.engine={engine} .*weights.*faiss, torch or clvq"):
        kmeans(mixture(), 3, config=config(engine), weights=torch.ones(240))


@pytest.mark.parametrize("engine", ["faiss", "torch", "clvq"])
def test_prototypes_are_sorted_by_mass_and_the_masses_returned(engine: str) -> None:
    x = torch.cat([torch.randn(90, 2, generator=torch.Generator().manual_seed(0)) * 0.1, torch.full((5, 2), 9.0)])
    w = torch.cat([torch.ones(90), torch.full((5,), 100.0)])
    r = kmeans(x, 2, config=config(engine), weights=w)
    assert r.counts.tolist() == [5, 90]
    assert r.masses.tolist() == [500.0, 90.0]
    direct = (x.double() - r.centroids[r.labels].double()).square().sum(1) * w
    assert torch.allclose(r.sse, torch.bincount(r.labels, weights=direct, minlength=2), rtol=1e-4, atol=1e-9)
    plain = kmeans(x, 2, config=config(engine))
    assert torch.equal(plain.masses, plain.counts.double())


@pytest.mark.parametrize("engine", LLOYD)
def test_weighted_statistics_are_those_of_repeated_points(engine: str) -> None:
    x = mixture(50, 3)
    w = torch.randint(1, 4, (50,), generator=torch.Generator().manual_seed(0))
    first = x[:4].clone()
    a = kmeans(x, 4, config=config(engine), weights=w, start=first)
    b = kmeans(x.repeat_interleave(w, 0), 4, config=config(engine), start=first)
    s, t = quantization_stats(x, a, weights=w), quantization_stats(x.repeat_interleave(w, 0), b)
    for name in ("distortion", "w2_mass", "w2_uniform", "ess_mass", "ess_sqrt", "explained"):
        assert s[name] == pytest.approx(t[name], rel=1e-5), name
    assert torch.equal(a.masses, b.counts.double())


def test_a_far_point_without_weight_costs_no_digits() -> None:
    x = mixture(80, 4)
    far = torch.cat([x, torch.full((2, 4), 1e7)])
    w = torch.cat([torch.ones(80), torch.zeros(2)])
    for engine in LLOYD:
        a = kmeans(x, 4, config=config(engine), start=x[:4])
        b = kmeans(far, 4, config=config(engine), weights=w, start=x[:4])
        assert b.inertia == pytest.approx(a.inertia, rel=1e-4)


def test_a_systematic_sample_has_the_expected_numbers() -> None:
    g = torch.Generator().manual_seed(0)
    assert torch.equal(systematic_sample(torch.full((50,), 0.3), g), torch.arange(50))
    w = torch.tensor([0.0, 3.0, 0.5, 1.5, 0.0])
    drawn = torch.stack([systematic_sample(w, g).bincount(minlength=5) for _ in range(400)]).double()
    assert torch.allclose(drawn.mean(0), w.double(), atol=0.1)
    assert ((drawn - w).abs() < 1).all()


# --- sums on a device -------------------------------------------------------------------------------------------


def test_sums_of_cells_and_running_sums_by_products() -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.rand(1000, generator=g, dtype=torch.float64)
    labels = torch.randint(7, (1000,), generator=g)
    expected = torch.bincount(labels, weights=values, minlength=9)
    assert torch.allclose(cell_totals(values, labels, 9), expected, rtol=1e-14)
    for n in (1, 255, 256, 257, 70_000):
        rows = torch.rand(2, n, generator=g, dtype=torch.float64)
        assert torch.allclose(cumulative_products(rows), rows.cumsum(1), rtol=1e-12)
        assert torch.equal(cumulative_sums(rows), rows.cumsum(1))


# --- offsets ------------------------------------------------------------------------------------------------------


def test_statistics_of_data_far_from_the_origin() -> None:
    x = mixture(200, 6).double()
    for engine in ("torch", "minibatch", "barycenter"):
        near, far = (kmeans(x + offset, 4, config=config(engine), seed=1) for offset in (0.0, 1e6))
        s, t = quantization_stats(x, near), quantization_stats(x + 1e6, far)
        assert t["w2_mass"] == pytest.approx(s["w2_mass"], rel=1e-5)
        assert t["w2_uniform"] == pytest.approx(s["w2_uniform"], rel=1e-5)
        assert t["explained"] == pytest.approx(s["explained"], rel=1e-5)
        assert far.centroids.dtype == torch.float64
        assert np.allclose(far.centroids - 1e6, near.centroids, atol=1e-4)
