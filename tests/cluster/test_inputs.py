"""Arguments of nearby types: taken, or refused in a sentence that says what is taken."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from dq.cluster.inputs import as_points, as_weights
from dq.cluster.kmeans import kmeans, kmeans_many, nearest, quantization_stats
from dq.cluster.online import clvq, minibatch
from dq.cluster.prototypes import cell_means, image_weights, latent_stats, make_prototypes
from dq.cluster.spaces import embed, principal_coordinates
from dq.cluster.transport import barycenter, exact_plan, sinkhorn_plan, squared_cost, uniform_w2
from dq.config.schema import ClusterConfig
from dq.core.errors import InputError
from dq.core.numbers import whole_number

POINTS = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
ENGINES = ["faiss", "torch", "clvq", "minibatch", "barycenter"]
READ_ONLY = POINTS.numpy().copy()
READ_ONLY.setflags(write=False)

SAME_POINTS = {
    "array": POINTS.numpy(),
    "read-only array": READ_ONLY,
    "reversed view": POINTS.numpy()[:, ::-1].copy()[:, ::-1],
    "big-endian array": POINTS.numpy().astype(">f4"),
    "nested lists": POINTS.tolist(),
    "list of tensors": list(POINTS),
    "list of arrays": list(POINTS.numpy()),
    "tensor that records gradients": POINTS.clone().requires_grad_(),
    "not contiguous": POINTS.t().contiguous().t(),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", list(SAME_POINTS))
def test_points_of_any_type_are_the_same_points(kind: str, engine: str) -> None:
    config = ClusterConfig(engine=engine)
    expected = kmeans(POINTS, 3, config=config)
    r = kmeans(SAME_POINTS[kind], np.int64(3), config=config, seed=np.int32(0))
    assert torch.equal(r.labels, expected.labels)
    assert torch.allclose(r.centroids.float(), expected.centroids, atol=1e-6)
    assert not r.centroids.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8])
def test_points_of_any_number_type(dtype: torch.dtype) -> None:
    x = (10 * POINTS + 40).round().to(dtype)
    for engine in ENGINES:
        r = kmeans(x, 3, config=ClusterConfig(engine=engine))
        assert r.centroids.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert quantization_stats(x, r)["n"] == 30


@pytest.mark.parametrize("weights", [[1.0] * 30, (1,) * 30, np.ones(30), np.ones(30, int), torch.ones(30).int()])
def test_weights_and_starts_of_any_type(weights: Any) -> None:
    expected = kmeans(POINTS, 3, weights=torch.ones(30), start=POINTS[:3])
    for start in (POINTS[:3].numpy(), POINTS[:3].tolist(), POINTS[:3].double()):
        r = kmeans(POINTS, 3, weights=weights, start=start)
        assert torch.allclose(r.centroids, expected.centroids, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 3.0}, r"k is a whole number of at least 1, not 3\.0"),
        ({"k": True}, "k is a whole number of at least 1, not True"),
        ({"k": "3"}, "k is a whole number of at least 1, not '3'"),
        ({"k": None}, "k is a whole number of at least 1, not None"),
        ({"k": torch.tensor([3, 3])}, "k is a whole number"),
        ({"k": 0}, "k is a whole number of at least 1, not 0"),
        ({"seed": 0.5}, r"seed is a whole number, not 0\.5"),
        ({"x": "points"}, "the data must be a tensor or an array of numbers, not str"),
        ({"x": None}, "the data must be a tensor or an array of numbers, not NoneType"),
        ({"x": [[1.0, 2.0], [3.0]]}, "the data must be a tensor or an array of numbers, not list"),
        ({"x": np.array([["a", "b"]])}, "the data must be a tensor or an array of numbers, not ndarray of <U1"),
        (
            {"x": POINTS.to(torch.complex64)},
            "the data must be a dense tensor of real numbers, not Tensor of torch",
        ),
        ({"x": POINTS.to_sparse()}, "the data must be a dense tensor of real numbers"),
        ({"x": np.ma.masked_less(POINTS.numpy(), 0)}, "the data must have no masked values"),
        ({"x": POINTS[0]}, r"the data must be a non-empty \(n, d\) array, not \(3,\)"),
        ({"x": POINTS[:0]}, r"the data must be a non-empty \(n, d\) array, not \(0, 3\)"),
        ({"x": POINTS[:, :0]}, r"the data must be a non-empty \(n, d\) array, not \(30, 0\)"),
        ({"weights": "uniform"}, "weights of the data must be a tensor or an array of numbers, not str"),
        ({"weights": [1.0] * 29}, r"weights of the data must be \(30,\)"),
        ({"weights": [[1.0]] * 30}, r"weights of the data must be \(30,\)"),
        ({"weights": [float("nan")] * 30}, "weights of the data must be"),
        ({"start": POINTS[:2]}, r"start centroids of the data must be \(3, 3\), not \(2, 3\)"),
        ({"start": "random"}, "start centroids of the data must be a tensor or an array of numbers, not str"),
        ({"start": POINTS[:3] / 0}, "start centroids of the data has NaN or infinite values"),
        ({"config": {"engine": "torch"}}, r"config of k-means is a ClusterConfig\(\.\.\.\), not dict"),
    ],
)
def test_other_types_are_refused_in_a_sentence(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kmeans(**{"x": POINTS, "k": 3, **arguments})


@pytest.mark.parametrize("name", ["weights", "seeds", "starts", "names"])
def test_there_is_one_of_each_for_every_class(name: str) -> None:
    with pytest.raises(InputError, match=f"there are 1 {name} for 2 classes"):
        kmeans_many([POINTS, POINTS], 3, **{name: [None]})
    with pytest.raises(InputError, match=f"there are 3 {name} for 2 classes"):
        kmeans_many([POINTS, POINTS], 3, **{name: np.ones(3)})


@pytest.mark.parametrize("name", ["xs", "weights", "seeds", "starts", "names"])
def test_one_value_is_not_one_for_each_class(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must list one for each class, not be of type int"):
        kmeans_many(**{"xs": [POINTS, POINTS], "k": 3, name: 5})


def test_classes_of_an_array() -> None:
    both = kmeans_many(np.stack([POINTS, POINTS]), 3, weights=np.ones((2, 30)), seeds=np.arange(2))
    assert torch.equal(both[1].labels, kmeans(POINTS, 3, seed=1).labels)


def test_whole_numbers_and_weights_of_any_kind() -> None:
    assert [whole_number(v, "n") for v in (3, np.int8(3), torch.tensor(3), torch.tensor([3]), np.uint64(3))] == [3] * 5
    with pytest.raises(InputError, match="n is a whole number"):
        whole_number(np.bool_(True), "n")
    with pytest.raises(InputError, match="n is a whole number"):
        whole_number(torch.tensor(True), "n")
    assert as_weights([1, 2], 2, "weights").tolist() == [1.0, 2.0]
    assert as_points(np.float64([[1.0, 2.0]]), "x").dtype == torch.float64


# --- the other functions of the package ------------------------------------------------------------------------------

C = POINTS[:4]
RESULT = kmeans(POINTS, 4)


@functools.cache
def reference_barycenter(transport: str) -> torch.Tensor:
    return barycenter(POINTS, C, transport=transport, n_iter=5)[0]


@pytest.mark.parametrize("kind", ["array", "nested lists", "tensor that records gradients", "float64"])
def test_siblings_take_points_of_any_type(kind: str) -> None:
    x = POINTS.double() if kind == "float64" else SAME_POINTS[kind]
    c = {"array": C.numpy(), "nested lists": C.tolist()}.get(kind, C)
    labels = RESULT.labels.numpy() if kind == "array" else RESULT.labels.tolist()
    assert torch.equal(nearest(x, c), nearest(POINTS, C))
    assert uniform_w2(x, c) == pytest.approx(uniform_w2(POINTS, C), rel=1e-6)
    assert torch.allclose(squared_cost(x, c).float(), squared_cost(POINTS, C), atol=1e-5)
    assert quantization_stats(x, RESULT) == pytest.approx(quantization_stats(POINTS, RESULT), rel=1e-5)
    for transport in ("exact", "entropic"):
        points = barycenter(x, c, transport=transport, n_iter=5)[0]
        assert torch.allclose(points.float(), reference_barycenter(transport), atol=1e-4)
        assert not points.requires_grad
    assert torch.allclose(cell_means(x, labels, 4).float(), RESULT.centroids, atol=1e-5)
    means = RESULT.centroids
    assert latent_stats(x, labels, means) == pytest.approx(latent_stats(POINTS, RESULT.labels, means), rel=1e-5)
    p = make_prototypes(0, "a", x, list(range(30)), RESULT)
    assert p.centroids.dtype == p.medoids.dtype == torch.float32
    assert torch.equal(p.medoid_rows, make_prototypes(0, "a", POINTS, torch.arange(30), RESULT).medoid_rows)
    pca = ClusterConfig(space="pca", dims=2)
    assert torch.allclose(embed(x, None, pca), principal_coordinates(POINTS, 2), atol=1e-5)
    assert torch.allclose(embed(x, None, ClusterConfig()).float(), POINTS)
    stream = clvq(lambda p: [x], 4, generator=torch.Generator(), init=c)
    assert torch.allclose(stream.centroids, clvq(lambda p: [POINTS], 4, generator=torch.Generator(), init=C).centroids)
    order = list(range(30))
    settings = {"expand": 1, "drop_tail": False, "seed": 0}
    expected = minibatch(POINTS, 4, order=torch.arange(30), **settings).centroids
    assert torch.allclose(minibatch(x, np.int64(4), order=order, **settings).centroids, expected, atol=1e-5)


def test_siblings_take_costs_masses_and_counts_of_any_type() -> None:
    cost = squared_cost(POINTS, C)
    expected = exact_plan(cost, torch.ones(30), torch.ones(4))
    assert torch.allclose(exact_plan(cost.tolist(), [1] * 30, np.ones(4)), expected)
    assert torch.allclose(sinkhorn_plan(cost[None].numpy(), entropy=0.1), sinkhorn_plan(cost[None], entropy=0.1))
    for counts in ([3, 1], np.array([3, 1]), torch.tensor([3.0, 1.0])):
        assert torch.equal(image_weights(counts, "mass"), torch.tensor([1.5, 0.5]))


OTHER = {
    "nearest of another space": lambda: nearest(POINTS, C[:, :2]),
    "nearest of text": lambda: nearest("x", C),
    "stats of other points": lambda: quantization_stats(POINTS[:9], RESULT),
    "stats of another space": lambda: quantization_stats(POINTS[:, :2], RESULT),
    "stats, weights": lambda: quantization_stats(POINTS, RESULT, weights=[1.0]),
    "cost of another space": lambda: squared_cost(POINTS, C[:, :2]),
    "cost of nothing": lambda: squared_cost(POINTS, C[:0]),
    "plan of NaN": lambda: exact_plan(squared_cost(POINTS, C) / 0 * 0),
    "plan of a vector": lambda: exact_plan([1.0, 2.0]),
    "plan, masses": lambda: exact_plan(squared_cost(POINTS, C), a=[1.0, 2.0]),
    "sinkhorn of a matrix": lambda: sinkhorn_plan(squared_cost(POINTS, C), entropy=0.1),
    "sinkhorn without entropy": lambda: sinkhorn_plan(squared_cost(POINTS, C)[None], entropy=0.0),
    "w2 of NaN": lambda: uniform_w2(POINTS / 0, C),
    "w2, weights": lambda: uniform_w2(POINTS, C, [-1.0] * 30),
    "barycenter of text": lambda: barycenter("x", C),
    "barycenter of another space": lambda: barycenter(POINTS, C[:, :2]),
    "barycenter, transport": lambda: barycenter(POINTS, C, transport="unbalanced"),
    "barycenter, rounds": lambda: barycenter(POINTS, C, n_iter=0),
    "counts of nothing": lambda: image_weights([]),
    "counts of text": lambda: image_weights("4, 3"),
    "counts of NaN": lambda: image_weights([float("nan"), 1.0]),
    "means, labels": lambda: cell_means(POINTS, [0] * 29, 1),
    "means of an empty cell": lambda: cell_means(POINTS, [0] * 30, 2),
    "means, fractional labels": lambda: cell_means(POINTS, [0.0] * 30, 1),
    "latent stats, labels out of range": lambda: latent_stats(POINTS, [4] * 30, C),
    "latent stats of another space": lambda: latent_stats(POINTS, RESULT.labels, C[:, :2]),
    "prototypes, rows": lambda: make_prototypes(0, "a", POINTS, torch.arange(9), RESULT),
    "prototypes of other latents": lambda: make_prototypes(0, "a", POINTS[:9], torch.arange(9), RESULT),
    "representative": lambda: make_prototypes(0, "a", POINTS, torch.arange(30), RESULT).points("mean"),
    "embed of a vector": lambda: embed(POINTS[0], None, ClusterConfig()),
    "directions": lambda: principal_coordinates(POINTS, 1.5),
    "directions of NaN": lambda: principal_coordinates(POINTS / 0),
    "clvq of text": lambda: clvq(lambda p: ["x"], 2, generator=torch.Generator()),
    "clvq, k": lambda: clvq(lambda p: [POINTS], 2.0, generator=torch.Generator()),
    "clvq, init": lambda: clvq(lambda p: [POINTS], 2, generator=torch.Generator(), init=C),
    "clvq of two spaces": lambda: clvq(lambda p: [POINTS[:, :2]], 4, generator=torch.Generator(), init=C),
    "minibatch, k": lambda: minibatch(POINTS, 2.0, order=range(30), expand=1, drop_tail=False, seed=0),
    "minibatch of few": lambda: minibatch(POINTS, 31, order=range(30), expand=1, drop_tail=False, seed=0),
}


@pytest.mark.parametrize("case", list(OTHER))
def test_siblings_refuse_what_does_not_fit(case: str) -> None:
    with pytest.raises(InputError):
        OTHER[case]()
