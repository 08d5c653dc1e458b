"""Kernel ridge regression on features: the solution, its fallbacks, and the gradient of its loss."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dq.core.errors import RunError
from dq.data.regression_labels import centered_targets
from dq.refine.ridge import (
    Objective,
    duplicates,
    krr_loss,
    label_margin,
    meta_gradient,
    predict,
    solve_ridge,
    temperature_cross_entropy,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit_ridge(f: Tensor, y: Tensor, queries: Tensor, ridge: float, w: Tensor) -> Tensor:
    """min_W sum_i w_i |f_i W - y_i|^2 + ridge s |W|^2 by its normal equations in feature space."""
    scale = (w * f.square().sum(1)).sum() / w.sum()
    inner = f.T @ (w[:, None] * f) + ridge * scale * torch.eye(f.shape[1], dtype=f.dtype)
    return queries @ torch.linalg.solve(inner, f.T @ (w[:, None] * y))


@pytest.mark.parametrize(("n", "d"), [(4, 9), (9, 4)])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_equals_explicit_ridge_regression(n: int, d: int, weighted: bool) -> None:
    f, y, queries = drawn(n, d), drawn(n, 3, seed=1), drawn(5, d, seed=2)
    w = drawn(n, seed=3).abs() + 0.1 if weighted else torch.ones(n, dtype=torch.float64)
    solution = solve_ridge(f, y, ridge=1e-2, weights=w if weighted else None)
    torch.testing.assert_close(predict(solution, f, queries), explicit_ridge(f, y, queries, 1e-2, w))
    assert solution.ridge == 1e-2


def test_an_image_of_weight_two_is_the_image_given_twice() -> None:
    f, y, queries = drawn(4, 6), drawn(4, 3, seed=1), drawn(5, 6, seed=2)
    weighted = solve_ridge(f, y, ridge=1e-2, weights=torch.tensor([2.0, 1, 1, 1]))
    f2, y2 = torch.cat([f[:1], f]), torch.cat([y[:1], y])
    repeated = solve_ridge(f2, y2, ridge=1e-2)
    torch.testing.assert_close(predict(weighted, f, queries), predict(repeated, f2, queries))


def test_copies_and_more_images_than_features_are_solved_as_in_exact_arithmetic() -> None:
    f, y = drawn(6, 4).float(), drawn(6, 3, seed=1).float()
    f, y = torch.cat([f, f, f + 1e-5]), torch.cat([y, y, y])
    solution = solve_ridge(f, y)
    assert solution.ridge == 1e-6
    expected = explicit_ridge(f.double(), y.double(), f.double(), 1e-6, torch.ones(len(f), dtype=torch.float64))
    torch.testing.assert_close(predict(solution, f, f), expected, atol=1e-6, rtol=1e-5)


def test_a_singular_kernel_takes_a_larger_ridge_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    f, y = drawn(5, 3), drawn(5, 2, seed=1)
    with caplog.at_level(logging.WARNING, "dq"):
        solution = solve_ridge(torch.cat([f, f]), torch.cat([y, y]), ridge=0.0)
    assert 0 < solution.ridge <= 1e-3
    assert "a ridge of 0 leaves a singular kernel" in caplog.text
    assert torch.isfinite(predict(solution, torch.cat([f, f]), f)).all()


def test_features_that_are_all_zero_predict_zero_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    f = torch.zeros(4, 3, requires_grad=True)
    with caplog.at_level(logging.WARNING, "dq"):
        solution = solve_ridge(f, drawn(4, 2))
    assert "eigenvalues are clipped" in caplog.text
    prediction = predict(solution, f, drawn(5, 3))
    assert (prediction == 0).all()
    (gradient,) = torch.autograd.grad(prediction.square().sum() + prediction.sum(), [f])
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("what", ["features", "labels"])
def test_numbers_that_are_not_finite_are_refused(what: str) -> None:
    f, y = drawn(4, 3), drawn(4, 2)
    (f if what == "features" else y)[1, 0] = float("nan")
    with pytest.raises(RunError, match="not finite numbers; lower the learning rate"):
        solve_ridge(f, y)


def test_the_label_margin_is_flat_beyond_one_over_the_classes() -> None:
    y = torch.tensor([[0.9, 0.1, 0.0], [0.3, 0.2, 0.1]])
    assert float(label_margin(y)) == pytest.approx((1 / 3 + 0.1) / 2)


def test_cross_entropy_is_that_of_the_scaled_predictions_and_the_classes() -> None:
    predictions = torch.tensor([[0.4, 0.1, -0.2], [0.0, 0.3, 0.0]])
    targets = centered_targets(torch.tensor([0, 2]), 3)
    odds = torch.tensor([[4.0, 1.0, -2.0], [0.0, 3.0, 0.0]]).exp()
    expected = -(odds[[0, 1], [0, 2]] / odds.sum(1)).log().mean()
    torch.testing.assert_close(temperature_cross_entropy(predictions, targets, 0.1), expected)


def test_copies_are_found() -> None:
    f = drawn(6, 5)
    f[3] = f[1]
    f[5] = f[0] + 1e-6 * drawn(5, seed=4)
    assert duplicates(f).tolist() == [False, False, False, True, False, True]
    assert duplicates(torch.ones(3, 2)).tolist() == [False, True, True]


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.Softplus(), nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers).to(dtype).eval()


def problem(n: int = 5) -> dict[str, Tensor]:
    f = net()
    return {
        "images": drawn(n, 1, 4, 4),
        "labels": drawn(n, 3, seed=1) / 4,
        "real_features": f(drawn(7, 1, 4, 4, seed=2)).detach(),
        "real_targets": drawn(7, 3, seed=3),
    }


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("outer_loss", [krr_loss, functools.partial(temperature_cross_entropy, temperature=0.3)])
def test_gradients_equal_finite_differences(flip: bool, weighted: bool, outer_loss: Any) -> None:
    f, p = net(), problem(3)
    weights = torch.tensor([0.5, 1.0, 2.0]) if weighted else None
    objective = Objective(flip=flip, ridge=1e-3, weights=weights, outer_loss=outer_loss)

    def loss(images: Tensor, labels: Tensor) -> float:
        g = meta_gradient(f, images, labels, p["real_features"], p["real_targets"], objective)
        return float(g.krr - g.margin)

    g = meta_gradient(f, **p, objective=objective)
    for name, gradient in (("images", g.images), ("labels", g.labels)):
        direction = drawn(*p[name].shape, seed=5)
        h = 1e-6
        ends = [
            loss(**{k: p[k] + s * h * direction if k == name else p[k] for k in ("images", "labels")}) for s in (1, -1)
        ]
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunks_give_the_gradient_of_one_pass(flip: bool, chunk: int) -> None:
    f, p = net(), problem()
    one, parts = (meta_gradient(f, **p, objective=Objective(flip=flip, chunk=c)) for c in (None, chunk))
    torch.testing.assert_close(parts.images, one.images, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(parts.labels, one.labels)
    assert float(parts.krr) == pytest.approx(float(one.krr))


def test_chunks_hold_the_activations_of_one_chunk() -> None:
    f, p = net(), problem(6)
    with_graph: list[int] = []

    def features(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            with_graph.append(len(x))
        return f(x)

    meta_gradient(features, **p, objective=Objective(chunk=2))
    assert with_graph == [2, 2, 2]
    with_graph.clear()
    g = meta_gradient(features, **p, objective=Objective(learn_images=False))
    assert g.images is None
    assert with_graph == []


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("chunk", [None, 2])
def test_the_gradient_of_latents_is_that_of_the_composition(flip: bool, chunk: int | None) -> None:
    f, p = net(), problem()
    torch.manual_seed(1)
    decoder = nn.Sequential(nn.ConvTranspose2d(2, 1, 2, stride=2), nn.Tanh()).double()
    z = p["images"] = drawn(5, 2, 2, 2, seed=6)
    g = meta_gradient(f, **p, objective=Objective(flip=flip, chunk=chunk, render=decoder, ridge=1e-3))
    leaf, y = z.clone().requires_grad_(True), p["labels"].clone().requires_grad_(True)
    x = decoder(leaf)
    support, labels = (torch.cat([f(x), f(x.flip(-1))]), torch.cat([y, y])) if flip else (f(x), y)
    w = torch.ones(len(support), dtype=torch.float64)
    predictions = explicit_ridge(support, labels, p["real_features"], 1e-3, w)
    loss = 0.5 * (predictions - p["real_targets"]).square().sum(1).mean() - label_margin(y)
    dz, dy = torch.autograd.grad(loss, [leaf, y])
    torch.testing.assert_close(g.images, dz, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(g.labels, dy, rtol=1e-8, atol=1e-11)
    assert float(dz.abs().min()) > 0


def test_copies_do_not_stop_a_step() -> None:
    f, p = net(torch.float32), problem()
    p = {k: v.float() for k, v in p.items()}
    p["images"][3] = p["images"][1]
    p["images"][4] = p["images"][1]
    g = meta_gradient(f, **p)
    assert torch.isfinite(g.images).all()
    assert g.ridge == 1e-6


def test_a_linear_feature_learns_one_image_per_class_as_good_as_all_data() -> None:
    # with linear features, C images are enough for the full-data ridge regression (Chen et al., NeurIPS 2024)
    x, w = drawn(60, 6), drawn(6, 3, seed=1)
    y = x @ w + 0.5 * drawn(60, 3, seed=2)
    best = explicit_ridge(x, y, x, 1e-9, torch.ones(60, dtype=torch.float64))
    target = float(0.5 * (best - y).square().sum(1).mean())
    images, labels = drawn(3, 6, seed=4), torch.eye(3, dtype=torch.float64)
    moments = [torch.zeros_like(images), torch.zeros_like(labels)]
    for _ in range(400):
        g = meta_gradient(lambda z: z, images, labels, x, y, Objective(margin_weight=0.0))
        for v, p, d in zip(moments, (images, labels), (g.images, g.labels), strict=True):
            v.mul_(0.9).add_(d)
            p.sub_(0.05 * v)
    assert float(g.krr) == pytest.approx(target, rel=1e-3)
