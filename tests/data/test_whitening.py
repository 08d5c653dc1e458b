"""ZCA: its defining equations, on images small enough to invert their covariance."""

from __future__ import annotations

import pytest
import torch

from dq.core.errors import InputError
from dq.data import zca
from dq.data.zca import CHUNK, fit_whitening, fit_zca, interleaved, same_whitening, stride_of


def correlated(n: int, side: int = 4, seed: int = 0) -> torch.Tensor:
    """Images (n, 3, side, side) in [0, 1] whose pixels share a brightness and a slope."""
    g = torch.Generator().manual_seed(seed)
    slope = torch.linspace(-0.2, 0.2, side)
    x = 0.5 + 0.15 * torch.randn(n, 1, 1, 1, generator=g) + slope * torch.randn(n, 3, 1, 1, generator=g)
    return (x + 0.05 * torch.randn(n, 3, side, side, generator=g)).clamp(0, 1)


def covariance(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).double().T.cov(correction=0)


def test_whitened_train_images_have_identity_covariance() -> None:
    x = correlated(600)
    assert (covariance(x) - torch.eye(48)).abs().max() > 0.9  # they did not have it before
    z = fit_zca(x, eps=1e-9)(x)
    assert z.shape == x.shape
    assert z.dtype == torch.float32
    # sums of squares are taken in float32, the least eigenvalue is about 0.05^2: 600 * 6e-8 / 600 / 0.0025
    torch.testing.assert_close(covariance(z), torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-3)
    torch.testing.assert_close(z.mean(0), torch.zeros(3, 4, 4), rtol=0, atol=1e-4)


@pytest.mark.parametrize("eps", [0.1, 1e-3])
def test_the_matrix_is_the_inverse_root_of_the_damped_covariance(eps: float) -> None:
    """It is the only symmetric positive definite W with W (C + eps I) W = I."""
    x = correlated(300)
    w = fit_zca(x, eps=eps).matrix.double()
    damped = covariance(x) + eps * torch.eye(48)
    torch.testing.assert_close(w @ damped @ w, torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(w, w.T, rtol=0, atol=1e-5)
    assert torch.linalg.eigvalsh((w + w.T) / 2).min() > 0


def test_images_are_centered_then_multiplied() -> None:
    x, other = correlated(300), correlated(5, seed=1)
    zca = fit_zca(x)
    torch.testing.assert_close(zca.mean, x.mean(0).flatten())
    expected = torch.stack([zca.matrix @ (image.flatten() - zca.mean) for image in other]).view_as(other)
    torch.testing.assert_close(zca(other), expected, rtol=1e-5, atol=1e-5)
    bytes_ = (other * 255).round().to(torch.uint8)
    assert torch.equal(zca(bytes_), zca(bytes_.float() / 255))


def test_the_default_is_the_released_one() -> None:
    x = correlated(50)
    assert torch.equal(fit_zca(x).matrix, fit_zca(x, eps=0.1).matrix)


def test_chunks_types_and_constant_pixels_do_not_matter() -> None:
    x = correlated(CHUNK + 300, side=2)
    x[:, 1] = 0.25
    bytes_ = (x * 255).round().to(torch.uint8)
    a, b = fit_zca(bytes_), fit_zca(bytes_.float() / 255)
    assert torch.equal(a.matrix, b.matrix)
    damped = covariance(bytes_.float() / 255) + 0.1 * torch.eye(12)
    torch.testing.assert_close(
        a.matrix.double() @ damped @ a.matrix.double(), torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-4
    )
    assert torch.isfinite(a(bytes_)).all()
    assert a(bytes_)[:, 1].abs().max() < 1e-3  # a constant channel stays empty


def test_frepo_whitening_inverts_and_has_the_released_spectrum() -> None:
    x = correlated(400)
    w = fit_whitening(x)
    torch.testing.assert_close(w.invert(w(x)), x, atol=1e-5, rtol=0)
    outside = 3 * torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(w(w.invert(outside)), outside, atol=1e-4, rtol=1e-4)
    standard = (x - x.mean((0, 2, 3)).view(-1, 1, 1)) / x.std((0, 2, 3), correction=0).view(-1, 1, 1)
    values = torch.linalg.eigvalsh(covariance(standard))
    expected = values / (values + 0.1 * values.mean())
    torch.testing.assert_close(torch.linalg.eigvalsh(covariance(w(x))), expected, atol=1e-3, rtol=1e-3)


def test_frepo_whitening_of_fewer_images_than_pixels_leaves_the_other_directions_alone() -> None:
    x = correlated(10)
    w = fit_whitening(x)
    values = torch.linalg.eigvalsh(w.matrix.double())
    assert int((values - 1).abs().lt(1e-4).sum()) >= 48 - 10
    torch.testing.assert_close(w.invert(w(x)), x, atol=1e-5, rtol=0)


def standardized(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean((0, 2, 3)).view(-1, 1, 1)) / x.std((0, 2, 3), correction=0).view(-1, 1, 1)


def test_larger_images_are_whitened_as_four_interleaved_ones_by_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zca, "WHOLE_SIDE", 4)
    x = correlated(300, side=8)
    w = fit_whitening(x)
    assert w.matrix.shape == (48, 48)
    assert w.center.shape == (192,)
    assert w.summary()["interleaved"] == 4
    # plain ZCA of each sub-image around its own mean, with the mean of the four covariances
    z, subs = w(x), [(i, j) for i in range(2) for j in range(2)]
    parts = {(i, j): standardized(x)[:, :, i::2, j::2] for i, j in subs}
    mean_covariance = sum(covariance(p) for p in parts.values()) / 4
    values, vectors = torch.linalg.eigh(mean_covariance)
    matrix = (vectors * (values + 0.1 * values.mean()).rsqrt()) @ vectors.T
    for (i, j), part in parts.items():
        flat = part.flatten(1).double()
        expected = ((flat - flat.mean(0)) @ matrix).view_as(part).float()
        torch.testing.assert_close(z[:, :, i::2, j::2], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(w.invert(z), x, atol=1e-5, rtol=0)
    outside = 3 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(w(w.invert(outside)), outside, atol=1e-4, rtol=1e-4)
    # as released, scalings beyond the number of images, not of interleaved ones, are 1
    few = torch.linalg.eigvalsh(fit_whitening(x[:10]).matrix.double())
    assert int((few - 1).abs().lt(1e-4).sum()) >= 48 - 10


def test_images_of_at_most_64_px_are_whitened_whole() -> None:
    assert [stride_of(side) for side in (8, 32, 64, 66, 128)] == [1, 1, 1, 2, 2]
    x = correlated(300, side=8)
    assert torch.equal(interleaved(x), x)
    w = fit_whitening(x)
    assert w.matrix.shape == (192, 192)
    assert "interleaved" not in w.summary()
    plain = fit_whitening(x, zca=False)
    assert torch.equal(w(x), ((plain(x).flatten(1) - w.center) @ w.matrix).view_as(x))
    with pytest.raises(InputError, match=r"images of 75 px .* divisible by 2; set source\.image_size to 74"):
        stride_of(75)


def test_gray_images_are_standardized_alone() -> None:
    x = correlated(50)
    gray = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    w = fit_whitening(gray)
    assert w.matrix is None
    assert float(w(gray).mean()) == pytest.approx(0, abs=1e-4)
    assert float(w(gray).std(correction=0)) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(w.invert(w(gray)), gray, atol=1e-6, rtol=0)
    assert fit_whitening(gray, zca=True).matrix is not None
    white = torch.full((3, 3, 4, 4), 255, dtype=torch.uint8)
    assert torch.isfinite(fit_whitening(white)(white)).all()


def test_a_whitening_fitted_on_other_images_is_told_apart() -> None:
    x = correlated(400)
    own = fit_whitening(x).summary()
    assert same_whitening(own, fit_whitening(x[:390]).summary())
    assert not same_whitening(own, fit_whitening(x * 0.5).summary())
    assert not same_whitening(own, fit_whitening(x, zca=False).summary())
    assert not same_whitening(own, fit_whitening(correlated(400, side=5)).summary())
