"""Properties that every engine shares, theory with closed forms, and equivalence with scikit-learn."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.stats import norm

from dq.cluster.kmeans import Clustering, kmeans, kmeans_many, nearest, quantization_stats
from dq.cluster.lloyd import assign, kmeans_plusplus, lloyd, squared_distances
from dq.cluster.online import clvq, minibatch
from dq.cluster.transport import barycenter, exact_plan, sinkhorn_plan, squared_cost, uniform_w2
from dq.config.schema import ClusterConfig
from dq.core.errors import InputError

ENGINES = ["faiss", "torch", "clvq", "minibatch", "barycenter"]
LLOYD = ["faiss", "torch"]


def blobs(n: int = 200, d: int = 6, k: int = 4, seed: int = 0, spread: float = 0.05) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(k, d, generator=g)
    return centers[torch.randint(k, (n,), generator=g)] + spread * torch.randn(n, d, generator=g)


def exact(engine: str, **kwargs) -> ClusterConfig:
    return ClusterConfig(engine=engine, tol=0.0, n_iter=500, **kwargs)


def gaussian_grid(n: int = 200_001) -> torch.Tensor:
    return torch.from_numpy(norm.ppf((np.arange(n) + 0.5) / n)).float()[:, None]


# --- closed forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 8])
@pytest.mark.parametrize("engine", LLOYD)
def test_uniform_law_quantizer(k: int, engine: str) -> None:
    x = ((torch.arange(20_000) + 0.5) / 20_000)[:, None]
    r = kmeans(x, k, config=exact(engine), seed=1)
    expected = (2 * torch.arange(1, k + 1) - 1) / (2 * k)
    assert torch.allclose(r.centroids.flatten().sort().values, expected, atol=3e-3)
    assert torch.allclose(r.counts / 20_000, torch.full((k,), 1 / k), atol=6e-3)
    assert math.sqrt(r.inertia / 20_000) == pytest.approx(1 / (2 * math.sqrt(3) * k), rel=2e-3)


def test_uniform_law_rate_is_one_over_k() -> None:
    x = ((torch.arange(20_000) + 0.5) / 20_000)[:, None]
    ks = [2, 4, 8, 16]
    w2 = [math.sqrt(kmeans(x, k, config=exact("torch")).inertia / 20_000) for k in ks]
    slope = np.polyfit(np.log(ks), np.log(w2), 1)[0]
    assert slope == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize(
    ("k", "points", "masses", "distortion"),
    [
        (2, [-0.7979, 0.7979], [0.5, 0.5], 0.36338),
        (3, [-1.2240, 0.0, 1.2240], [0.2703, 0.4595, 0.2703], 0.19017),
        (4, [-1.5104, -0.4528, 0.4528, 1.5104], [0.1631, 0.3369, 0.3369, 0.1631], 0.11748),
        (5, None, None, 0.07994),
    ],
)
@pytest.mark.parametrize("engine", LLOYD)
def test_gaussian_quantizer(k: int, points: list, masses: list, distortion: float, engine: str) -> None:
    x = gaussian_grid()
    r = kmeans(x, k, config=exact(engine), seed=0)
    assert r.inertia / len(x) == pytest.approx(distortion, rel=2e-3)
    if points is not None:
        order = r.centroids.flatten().argsort()
        assert torch.allclose(r.centroids.flatten()[order], torch.tensor(points), atol=5e-3)
        assert torch.allclose(r.counts[order] / len(x), torch.tensor(masses), atol=3e-3)


@pytest.mark.parametrize(
    ("k", "mass", "best_uniform", "points_uniform"), [(3, 0.4361, 0.4547, 0.4675), (8, 0.1859, 0.2344, 0.4341)]
)
def test_weights_repair_what_kmeans_points_alone_get_wrong(
    k: int, mass: float, best_uniform: float, points_uniform: float
) -> None:
    """The table of W2 for N(0,1): points with masses < best uniform points < k-means points with uniform weights."""
    x = gaussian_grid(4_001)
    r = kmeans(x, k, config=exact("torch"), seed=0)
    assert math.sqrt(r.inertia / len(x)) == pytest.approx(mass, rel=6e-3)
    assert uniform_w2(x, r.centroids) == pytest.approx(points_uniform, rel=1e-2)
    b = kmeans(x, k, config=ClusterConfig(engine="barycenter", tol=1e-7, n_iter=300), seed=0)
    assert uniform_w2(x, b.centroids) == pytest.approx(best_uniform, rel=6e-3)


@pytest.mark.parametrize("seed", range(3))
def test_sse_over_n_is_exact_w2_squared(seed: int) -> None:
    """Against a linear program over all transport plans; uniform weights are never better."""
    x = blobs(40, 3, 5, seed, spread=0.5).double()
    r = kmeans(x.float(), 4, config=exact("torch"), seed=seed)
    cost = squared_cost(x, r.centroids.double()).numpy()
    n, k = cost.shape

    def program(b: np.ndarray) -> float:
        rows = np.kron(np.eye(n), np.ones((1, k)))
        columns = np.kron(np.ones((1, n)), np.eye(k))
        marginals = np.concatenate([np.full(n, 1 / n), b])
        return linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=marginals, method="highs").fun

    assert r.inertia / n == pytest.approx(program((r.counts / n).numpy()), rel=1e-5)
    uniform = program(np.full(k, 1 / k))
    assert uniform_w2(x.float(), r.centroids) ** 2 == pytest.approx(uniform, rel=1e-4)
    assert r.inertia / n <= uniform + 1e-9


@pytest.mark.parametrize("engine", LLOYD)
def test_lloyd_fixed_point(engine: str) -> None:
    x = blobs(300, 8, 6, spread=0.6)
    r = kmeans(x, 5, config=exact(engine))
    assert r.converged
    m = r.counts / len(x)
    assert torch.allclose(m @ r.centroids, x.mean(0), atol=1e-5)
    total = (x - x.mean(0)).square().sum(1).mean()
    between = (m * (r.centroids - x.mean(0)).square().sum(1)).sum()
    assert total.item() == pytest.approx(r.inertia / len(x) + between.item(), rel=1e-5)
    for c in range(5):
        assert torch.allclose(r.centroids[c], x[r.labels == c].mean(0), atol=1e-5)


def test_distortion_never_rises_with_iterations() -> None:
    x = blobs(400, 10, 9, spread=0.8)
    start = x[:7].clone()
    sse = [
        kmeans(x, 7, config=ClusterConfig(engine="torch", n_iter=i, tol=0.0), start=start).inertia for i in range(1, 9)
    ]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(sse))
    assert sse[-1] < sse[0]


# --- properties of every engine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_result_is_consistent(engine: str) -> None:
    x = blobs(230, 6, 5, spread=0.4)
    r = kmeans(x, 7, config=ClusterConfig(engine=engine), seed=3)
    assert r.counts.sum() == len(x)
    assert r.counts.min() > 0
    assert torch.equal(r.counts, torch.bincount(r.labels, minlength=7))
    assert (r.counts[:-1] >= r.counts[1:]).all()
    if engine != "barycenter":
        distance = torch.cdist(x.double(), r.centroids.double())
        assert torch.allclose(distance.min(1).values, distance.gather(1, r.labels[:, None])[:, 0], atol=1e-4)
    direct = (x.double() - r.centroids[r.labels].double()).square().sum(1)
    assert torch.allclose(torch.bincount(r.labels, weights=direct, minlength=7), r.sse, rtol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_same_seed_same_bits_and_input_untouched(engine: str) -> None:
    x = blobs()
    before = x.clone()
    a = kmeans(x, 4, config=ClusterConfig(engine=engine), seed=5)
    b = kmeans(x, 4, config=ClusterConfig(engine=engine), seed=5)
    assert torch.equal(a.centroids, b.centroids)
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(x, before)


@pytest.mark.parametrize("engine", ENGINES)
def test_k_one_is_the_mean(engine: str) -> None:
    x = blobs(90, 5)
    r = kmeans(x, 1, config=ClusterConfig(engine=engine, expand=10))
    assert torch.allclose(r.centroids[0], x.mean(0), atol=1e-4)
    assert r.counts.tolist() == [90]


@pytest.mark.parametrize("engine", ["faiss", "torch", "barycenter"])
def test_k_equals_n_has_no_distortion(engine: str) -> None:
    x = blobs(12, 4, spread=1.0)
    r = kmeans(x, 12, config=exact(engine))
    assert r.inertia == pytest.approx(0, abs=1e-9)
    assert r.counts.tolist() == [1] * 12


@pytest.mark.parametrize("engine", ["faiss", "torch", "clvq"])
def test_separated_blobs_are_found(engine: str) -> None:
    x = blobs(400, 20, 4, spread=0.01)
    r = kmeans(x, 4, config=ClusterConfig(engine=engine))
    assert r.inertia / len(x) == pytest.approx(20 * 0.01**2, rel=0.2)


@pytest.mark.parametrize("engine", LLOYD)
def test_weighted_is_repeated(engine: str) -> None:
    x = blobs(60, 4, 5, spread=0.4)
    w = torch.randint(1, 4, (60,), generator=torch.Generator().manual_seed(0))
    start = x[[0, 11, 22, 33]].clone()
    a = kmeans(x, 4, config=exact(engine), weights=w.float(), start=start)
    b = kmeans(x.repeat_interleave(w, 0), 4, config=exact(engine), start=start)
    order_a, order_b = a.centroids[:, 0].argsort(), b.centroids[:, 0].argsort()
    assert torch.allclose(a.centroids[order_a], b.centroids[order_b], atol=1e-5)
    assert a.inertia == pytest.approx(b.inertia, rel=1e-5)


@pytest.mark.parametrize("engine", LLOYD)
def test_scaled_weights_change_nothing(engine: str) -> None:
    x = blobs(80, 4, 5, spread=0.4)
    w = torch.rand(80, generator=torch.Generator().manual_seed(1)) + 0.1
    start = x[:4].clone()
    a = kmeans(x, 4, config=exact(engine), weights=w, start=start)
    b = kmeans(x, 4, config=exact(engine), weights=8 * w, start=start)
    assert torch.allclose(a.centroids, b.centroids, atol=1e-6)


@pytest.mark.parametrize("engine", LLOYD)
def test_zero_weight_points_do_not_matter(engine: str) -> None:
    x = blobs(80, 4, 5, spread=0.4)
    far = torch.cat([x, torch.full((5, 4), 30.0)])
    w = torch.cat([torch.ones(80), torch.zeros(5)])
    start = x[:4].clone()
    a = kmeans(x, 4, config=exact(engine), start=start)
    b = kmeans(far, 4, config=exact(engine), weights=w, start=start)
    assert torch.allclose(a.centroids.sort(0).values, b.centroids.sort(0).values, atol=1e-4)


@pytest.mark.parametrize("engine", LLOYD)
def test_shift_and_scale_equivariant(engine: str) -> None:
    x = blobs(150, 5, 5, spread=0.5)
    a = kmeans(x, 4, config=exact(engine), seed=2)
    b = kmeans(4 * x + 100, 4, config=exact(engine), seed=2)
    assert torch.allclose(4 * a.centroids + 100, b.centroids, atol=2e-3)
    assert torch.equal(a.counts, b.counts)


@pytest.mark.parametrize("engine", LLOYD)
def test_masses_do_not_depend_on_data_order(engine: str) -> None:
    x = blobs(150, 5, 4, spread=0.3)
    p = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    start = x[:4].clone()
    a = kmeans(x, 4, config=exact(engine), start=start)
    b = kmeans(x[p], 4, config=exact(engine), start=start)
    assert torch.equal(a.counts, b.counts)
    assert torch.equal(a.labels[p], b.labels)


@pytest.mark.parametrize("engine", LLOYD)
def test_equals_scikit_learn_from_the_same_start(engine: str) -> None:
    from sklearn.cluster import KMeans

    x = blobs(500, 16, 8, spread=0.7)
    start = x[:9].clone()
    reference = KMeans(9, init=start.numpy(), n_init=1, tol=0, max_iter=500).fit(x.numpy())
    r = kmeans(x, 9, config=exact(engine), start=start)
    assert r.inertia == pytest.approx(reference.inertia_, rel=1e-5)
    order = torch.from_numpy(reference.cluster_centers_)[:, 0].argsort()
    own_order = r.centroids[:, 0].argsort()
    assert torch.allclose(r.centroids[own_order], torch.from_numpy(reference.cluster_centers_)[order], atol=1e-4)


def test_default_start_is_no_worse_than_scikit_learn() -> None:
    from sklearn.cluster import KMeans

    g = np.random.default_rng(0)
    x = (g.normal(size=(30, 160))[g.integers(0, 30, 1500)] + g.normal(size=(1500, 160))).astype(np.float32)
    theirs = np.mean([KMeans(50, n_init=1, random_state=s).fit(x).inertia_ for s in range(3)])
    inertia = np.mean([kmeans(torch.from_numpy(x), 50, seed=s).inertia for s in range(3)])
    assert inertia <= 1.001 * theirs


@pytest.mark.parametrize("dimensions", [(6, 6, 6), (6, 4, 6)])
def test_batched_is_the_loop(dimensions: tuple[int, ...]) -> None:
    """Also where classes differ in dimensions, as principal coordinates of few images do."""
    xs = [blobs(n, d, 5, seed, spread=0.4) for seed, (n, d) in enumerate(zip((40, 90, 65), dimensions, strict=True))]
    config = exact("torch")
    together = kmeans_many(xs, 5, config=config, seeds=[7, 8, 9])
    for x, seed, r in zip(xs, (7, 8, 9), together, strict=True):
        alone = kmeans(x, 5, config=config, seed=seed)
        assert torch.equal(alone.labels, r.labels)
        assert torch.allclose(alone.centroids, r.centroids, atol=1e-5)


def test_race_runs_in_a_subspace_and_pads() -> None:
    """Classes of other sizes, more dimensions than the subspace and more points than the sample."""
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, 200, generator=g) * torch.linspace(3, 0.1, 200) for n in (2500, 700)]
    together = kmeans_many(xs, 6, config=ClusterConfig(engine="torch"), seeds=[1, 2])
    for x, seed, r in zip(xs, (1, 2), together, strict=True):
        alone = kmeans(x, 6, config=ClusterConfig(engine="torch"), seed=seed)
        assert r.counts.sum() == len(x)
        assert r.inertia == pytest.approx(alone.inertia, rel=5e-3)


def test_restarts_keep_the_best() -> None:
    x = blobs(300, 4, 12, spread=0.1)
    config = ClusterConfig(engine="torch", init="random", tol=0.0)
    one = [kmeans(x, 12, config=config, seed=s).inertia for s in range(4)]
    many = [
        kmeans(x, 12, config=ClusterConfig(engine="torch", init="random", tol=0.0, n_init=6), seed=s).inertia
        for s in range(4)
    ]
    assert all(m <= o * (1 + 1e-6) for m, o in zip(many, one, strict=True))
    assert sum(many) < 0.9 * sum(one)


# --- small and degenerate classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["faiss", "torch", "clvq", "minibatch"])
def test_duplicates_leave_no_empty_prototype(engine: str) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(6, 1)
    with pytest.warns(UserWarning, match="only 2 distinct points to offer for ipc=5"):
        r = kmeans(x, 5, config=ClusterConfig(engine=engine), name="class 3 'cat'")
    assert r.counts.tolist() == [6, 6]
    assert r.requested == 5
    assert r.inertia == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("engine", ["faiss", "torch", "clvq", "minibatch", "barycenter"])
def test_fewer_points_than_k_clamps_with_a_report(engine: str) -> None:
    x = blobs(4, 3, spread=1.0)
    with pytest.warns(UserWarning, match="class 3 'cat' has only 4 distinct points"):
        r = kmeans(x, 10, config=ClusterConfig(engine=engine), name="class 3 'cat'")
    assert len(r.centroids) == 4
    assert r.counts.tolist() == [1, 1, 1, 1]


def test_fewer_points_than_k_raises_if_told_to() -> None:
    with pytest.raises(InputError, match=r"class 3 'cat' has 4 images but ipc=10; .*on_small=clamp"):
        kmeans(blobs(4, 3), 10, config=ClusterConfig(on_small="raise"), name="class 3 'cat'")


def test_non_finite_latents_are_named() -> None:
    x = blobs(20, 3)
    x[7, 1] = float("nan")
    with pytest.raises(InputError, match=r"class 0 'a' .*NaN.*point 7\b"):
        kmeans(x, 2, name="class 0 'a'")


@pytest.mark.parametrize("weights", [torch.zeros(20), -torch.ones(20), torch.ones(19)])
def test_wrong_weights_are_refused(weights: torch.Tensor) -> None:
    with pytest.raises(InputError, match="weights of the data"):
        kmeans(blobs(20, 3), 2, weights=weights)


def test_empty_cells_are_refilled() -> None:
    x = blobs(100, 3, 4, spread=0.2)
    start = torch.cat([x[:2], torch.full((2, 3), 50.0)])  # two centroids that own nothing
    for engine in LLOYD:
        r = kmeans(x, 4, config=exact(engine), start=start)
        assert r.counts.min() > 0
        assert len(r.counts) == 4


# --- parts --------------------------------------------------------------------------------------------------------


def test_kmeans_plusplus_never_repeats_a_distinct_point() -> None:
    x = blobs(30, 3, spread=0.5)[None]
    chosen = kmeans_plusplus(x, torch.ones(1, 30), 30, [torch.Generator().manual_seed(0)])
    assert sorted(chosen[0].tolist()) == list(range(30))


def test_assign_chunks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x = blobs(100, 5)[None]
    c = x[:, :7]
    whole = assign(x, c)
    monkeypatch.setattr("dq.cluster.lloyd.CHUNK_ELEMENTS", 21)
    monkeypatch.setattr("dq.cluster.lloyd.CACHED_ELEMENTS", 21)
    assert torch.equal(assign(x, c), whole)
    direct = (x[0] - c[0][whole[0]]).square().sum(1)
    assert torch.allclose(squared_distances(x, c, whole)[0], direct, atol=1e-6)


def test_lloyd_freezes_classes_that_are_done() -> None:
    easy, hard = blobs(60, 4, 2, spread=0.01), blobs(60, 4, 9, seed=1, spread=0.8)
    x = torch.stack([easy, hard])
    start = x[:, :4].clone()
    c, iterations, converged = lloyd(x, start, torch.ones(2, 60), n_iter=200, tol=0.0)
    assert converged.all()
    for b in range(2):
        alone, n, _ = lloyd(x[b : b + 1], start[b : b + 1], torch.ones(1, 60), n_iter=200, tol=0.0)
        assert int(n[0]) == int(iterations[b])
        assert torch.allclose(alone[0], c[b], atol=1e-6)


def test_clvq_is_the_textbook_update_for_batches_of_one() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(50, 3, generator=g)
    start = z[:4].clone()
    a, b = 1.0, 10.0
    r = clvq(lambda p: z.split(1), 4, generator=g, init=start, step=(a, b))
    x, w = start.double(), torch.full((4,), 0.25, dtype=torch.float64)
    for i, sample in enumerate(z.double(), start=1):
        gain = a / (b + i)
        k = (x - sample).square().sum(1).argmin()
        x[k] -= gain * (x[k] - sample)
        w = (1 - gain) * w
        w[k] += gain
    assert torch.allclose(r.centroids.double(), x, atol=1e-5)
    assert torch.allclose(r.running_weights, w, atol=1e-6)


def test_clvq_default_step_is_the_running_mean_of_the_samples_won() -> None:
    z = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    r = clvq(lambda p: z.split(7), 1, generator=torch.Generator(), init=torch.zeros(1, 2))
    assert torch.allclose(r.centroids[0], z.mean(0), atol=1e-6)
    assert r.running_weights.tolist() == [1.0]


def test_clvq_companion_weights_approach_the_masses() -> None:
    x = blobs(4000, 3, 3, spread=0.05)
    g = torch.Generator().manual_seed(0)
    x = x[torch.randperm(len(x), generator=g)]
    r = clvq(lambda p: x.split(64), 3, generator=g, passes=2)
    masses = torch.bincount(nearest(x, r.centroids), minlength=3) / len(x)
    assert torch.allclose(r.running_weights.float(), masses, atol=0.02)


def test_clvq_more_passes_do_not_hurt() -> None:
    x = blobs(800, 8, 10, spread=0.5)

    def run(passes: int) -> float:
        return np.mean(
            [kmeans(x, 10, config=ClusterConfig(engine="clvq", passes=passes), seed=s).inertia for s in range(4)]
        )

    assert run(6) < run(1)


def test_minibatch_tail_bug_is_reproduced_and_mended() -> None:
    x = torch.zeros(25, 2)
    x[20:] = 100.0  # only the tail holds them
    order = torch.arange(25)
    lost = minibatch(
        x + torch.randn(25, 2, generator=torch.Generator().manual_seed(0)),
        5,
        order=order,
        expand=2,
        drop_tail=True,
        seed=0,
    )
    kept = minibatch(
        x + torch.randn(25, 2, generator=torch.Generator().manual_seed(0)),
        5,
        order=order,
        expand=2,
        drop_tail=False,
        seed=0,
    )
    assert (lost.steps, kept.steps) == (20, 25)
    assert lost.centroids.max() < 50
    assert kept.centroids.max() > 10


def test_minibatch_dies_like_d4m_where_no_batch_fills() -> None:
    config = ClusterConfig(engine="minibatch", expand=10, drop_tail=True)
    with pytest.raises(InputError, match=r"never fills one batch of expand\*k = 200"):
        kmeans(blobs(150, 3), 20, config=config)


def test_minibatch_is_scikit_learn_partial_fit() -> None:
    from sklearn.cluster import MiniBatchKMeans

    x = blobs(60, 4, 5, spread=0.4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    r = minibatch(x, 6, order=order, expand=2, drop_tail=True, seed=0)
    reference = MiniBatchKMeans(6, random_state=0, n_init="auto")
    for i in range(0, 60, 12):
        reference.partial_fit(x[order][i : i + 12].numpy())
    assert np.allclose(r.centroids.numpy(), reference.cluster_centers_, atol=1e-6)


def test_exact_plan_has_the_marginals() -> None:
    cost = squared_cost(blobs(12, 2), blobs(4, 2, seed=1))
    plan = exact_plan(cost)
    assert torch.allclose(plan.sum(1), torch.full((12,), 1 / 12, dtype=torch.float64))
    assert torch.allclose(plan.sum(0), torch.full((4,), 1 / 4, dtype=torch.float64))


def test_sinkhorn_batch_is_the_loop_and_tends_to_the_exact_plan() -> None:
    costs = torch.stack([squared_cost(blobs(12, 2, seed=s), blobs(4, 2, seed=s + 9)) for s in range(3)]).double()
    together = sinkhorn_plan(costs, entropy=0.02)
    for b in range(3):
        assert torch.allclose(together[b], sinkhorn_plan(costs[b : b + 1], entropy=0.02)[0], atol=1e-7)
        assert torch.allclose(together[b].sum(0), torch.full((4,), 0.25, dtype=torch.float64), atol=1e-12)
        sharp = (sinkhorn_plan(costs[b : b + 1], entropy=0.002, n_iter=20_000)[0] * costs[b]).sum()
        assert sharp.item() == pytest.approx((exact_plan(costs[b]) * costs[b]).sum().item(), rel=2e-2)


@pytest.mark.parametrize("transport", ["exact", "entropic"])
def test_barycenter_cells_are_balanced(transport: str) -> None:
    x = torch.cat([blobs(90, 4, 1, spread=0.3), 3 + blobs(30, 4, 1, seed=2, spread=0.3)])
    _, labels, _, _ = barycenter(x, x[[0, 40, 80, 110]].clone(), transport=transport, n_iter=50)
    assert torch.bincount(labels, minlength=4).tolist() == pytest.approx(
        [30] * 4, abs=0 if transport == "exact" else 6
    )


def test_barycenter_beats_kmeans_points_under_uniform_weights() -> None:
    x = torch.cat([blobs(160, 3, 1, spread=0.5), 4 + blobs(40, 3, 1, seed=2, spread=0.5)])
    points = kmeans(x, 8, config=exact("torch"))
    center = kmeans(x, 8, config=ClusterConfig(engine="barycenter"))
    assert uniform_w2(x, center.centroids) < uniform_w2(x, points.centroids)


def test_stats_are_what_they_say() -> None:
    x = blobs(120, 4, 3, spread=0.3)
    r = kmeans(x, 3, config=exact("torch"))
    s = quantization_stats(x, r)
    assert s["w2_mass"] ** 2 == pytest.approx(r.inertia / 120, rel=1e-6)
    assert s["w2_uniform"] >= s["w2_mass"]
    counts = r.counts.double()
    assert s["ess_mass"] == pytest.approx(float(counts.sum() ** 2 / counts.square().sum()))
    assert s["ess_mass"] <= s["ess_sqrt"] <= 3
    total = float((x - x.mean(0)).square().sum())
    assert s["explained"] == pytest.approx(1 - r.inertia / total, rel=1e-5)


def test_no_warning_in_the_ordinary_case() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        r = kmeans(blobs(), 4)
    assert isinstance(r, Clustering)


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    xs = [blobs(n, 32, 6, seed, spread=0.4) for seed, n in enumerate((300, 500))]
    config = exact("torch", init="k-means++")
    cpu = kmeans_many(xs, 6, config=config)
    gpu = kmeans_many([x.to("cuda") for x in xs], 6, config=config)
    for a, b in zip(cpu, gpu, strict=True):
        assert a.inertia == pytest.approx(b.inertia, rel=1e-4)
    again = kmeans_many([x.to("cuda") for x in xs], 6, config=config)
    assert all(torch.equal(a.centroids, b.centroids) for a, b in zip(gpu, again, strict=True))
