from __future__ import annotations

import dataclasses

import pytest
import torch

from dq.cluster.kmeans import kmeans
from dq.cluster.prototypes import Prototypes, image_weights, latent_stats, make_prototypes
from dq.core.errors import InputError

COUNTS = torch.tensor([4, 3, 2, 1])


@pytest.mark.parametrize(
    ("kind", "normalize", "expected"),
    [
        ("uniform", "none", [1, 1, 1, 1]),
        ("mass", "none", [1.6, 1.2, 0.8, 0.4]),
        ("mass", "class", [1.6, 1.2, 0.8, 0.4]),
        ("sqrt", "none", [1.2649, 1.0954, 0.8944, 0.6325]),
        ("sqrt", "class", [1.3016, 1.1272, 0.9204, 0.6508]),
        ("sqrt", "sqrt_k", [0.6508, 0.5636, 0.4602, 0.3254]),
    ],
)
def test_weights_table(kind: str, normalize: str, expected: list[float]) -> None:
    assert image_weights(COUNTS, kind, normalize).tolist() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("kind", ["uniform", "mass", "sqrt"])
@pytest.mark.parametrize("normalize", ["none", "class"])
def test_equal_cells_weigh_one(kind: str, normalize: str) -> None:
    assert image_weights(torch.full((5,), 12), kind, normalize).tolist() == pytest.approx([1] * 5)


@pytest.mark.parametrize("args", [(torch.tensor([3, 0]),), (COUNTS, "linear"), (COUNTS, "sqrt", "batch")])
def test_weights_refuse_nonsense(args: tuple) -> None:
    with pytest.raises(InputError):
        image_weights(*args)


def make(n: int = 40, k: int = 4) -> tuple[torch.Tensor, torch.Tensor, Prototypes]:
    z = torch.randn(n, 2, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    rows = torch.arange(1000, 1000 + n)
    result = kmeans(z.flatten(1).float(), k)
    return z, result.labels, dataclasses.replace(make_prototypes(7, "seven", z, rows, result), stats={"n": n})


def test_medoid_is_the_member_with_the_least_summed_squared_distance() -> None:
    z, labels, p = make()
    for c in range(4):
        members = (labels == c).nonzero()[:, 0]
        x = z[members].flatten(1).double()
        best = members[torch.cdist(x, x).square().sum(1).argmin()]
        assert p.medoid_rows[c] == 1000 + best
        assert torch.equal(p.medoids[c], z[best].float())


def test_points() -> None:
    _, _, p = make()
    assert torch.equal(p.points("centroid"), p.centroids)
    assert torch.equal(p.points("medoid"), p.medoids)
    assert p.centroids.shape == (4, 2, 3, 3)


def test_points_of_the_usual_length() -> None:
    z, _, p = make()
    usual = float(z.float().flatten(1).norm(dim=1).median())
    measured = dataclasses.replace(p, stats={"median_norm": usual})
    for kind in ("centroid", "medoid"):
        plain, longer = p.points(kind).flatten(1), measured.points(kind, rescale="norm").flatten(1)
        assert longer.norm(dim=1).tolist() == pytest.approx([usual] * 4)
        assert torch.allclose(torch.cosine_similarity(plain, longer), torch.ones(4))
    assert (p.centroids.flatten(1).norm(dim=1) < usual).all()  # which is why
    assert torch.equal(measured.points("centroid", rescale="none"), p.centroids)
    nought = dataclasses.replace(measured, centroids=torch.zeros_like(p.centroids))
    assert torch.equal(nought.points("centroid", rescale="norm"), nought.centroids)
    with pytest.raises(InputError, match=r"class 7 'seven' lack the median norm .*run `dq cluster` again"):
        p.points("centroid", rescale="norm")


def test_latent_stats_of_four_points() -> None:
    # two cells of two points on a line: -5, -3 | 3, 5
    z = torch.tensor([[-5.0], [-3.0], [3.0], [5.0]])
    s = latent_stats(z, torch.tensor([0, 0, 1, 1]), torch.tensor([[-4.0], [4.0]]))
    expected = {"explained_latents": 64 / 68, "w2_latents": 1, "median_norm": 4, "centroid_norm": 4}
    assert s == pytest.approx(expected)
    crossed = latent_stats(z, torch.tensor([0, 1, 0, 1]), torch.tensor([[-1.0], [1.0]]))
    assert crossed == pytest.approx(expected | {"explained_latents": 1 / 17, "w2_latents": 4, "centroid_norm": 1})
    # the points need not be the means of their cells
    off = latent_stats(z, torch.tensor([0, 0, 1, 1]), torch.tensor([[-5.0], [5.0]]))
    assert off == pytest.approx(expected | {"w2_latents": 2**0.5, "centroid_norm": 5})


def test_latents_given_as_points_make_the_same_prototypes() -> None:
    z, _, p = make()
    x = z.flatten(1).float()
    q = make_prototypes(7, "seven", z, torch.arange(1000, 1040), kmeans(x, 4), points=x)
    torch.testing.assert_close(q.centroids, p.centroids, rtol=1e-5, atol=1e-6)
    assert torch.equal(q.medoid_rows, p.medoid_rows)


def test_save_and_load_give_the_same_and_the_same_bytes(tmp_path) -> None:
    _, _, p = make()
    p.save(tmp_path / "a.safetensors")
    p.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    q = Prototypes.load(tmp_path / "a.safetensors")
    assert (q.label, q.name, q.stats) == (7, "seven", {"n": 40})
    for name in ("centroids", "counts", "sse", "medoids", "medoid_rows"):
        assert torch.equal(getattr(p, name), getattr(q, name))
