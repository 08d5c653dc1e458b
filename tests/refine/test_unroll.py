"""Gradients of the distance between trajectories: exact and TESLA's, masks, start epochs, batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from dq.networks.flat_parameters import FlatNet
from dq.refine.unroll import (
    GRADIENTS,
    Segment,
    Student,
    draw_batches,
    exact_gradient,
    last_start,
    matching_loss,
    tesla_gradient,
)

NET = FlatNet("convnet2w4", 3, 8)


def problem(
    steps: int, lr: float, *, dtype: torch.dtype = torch.float64, kind: str = "none", size: int = 6, **selection: Any
) -> tuple[Student, Tensor, Tensor, Tensor, Segment]:
    """A student, its images, labels and step size, and an expert's segment."""
    net = FlatNet("convnet2w4", 3, 8)
    net.net.to(dtype)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 8, 8, generator=g, dtype=torch.float64).to(dtype)
    y = torch.randn(6, 3, generator=g, dtype=torch.float64).to(dtype)
    start = net.initial(1).to(dtype)
    target = start + 0.02 * torch.randn(net.size, generator=g, dtype=torch.float64).to(dtype)
    student = Student(net, draw_batches(6, size, steps, 3), 4, kind)
    return student, x, y, torch.tensor(lr, dtype=dtype), Segment(start, target, **selection)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def test_the_exact_gradient_is_that_of_finite_differences() -> None:
    p = problem(3, 0.05, size=4, share=0.25)
    g = exact_gradient(*p)
    student, x, y, lr, segment = p
    generator = torch.Generator().manual_seed(5)
    for name, value, slope in (("x", x, g.images), ("y", y, g.labels), ("lr", lr, g.step_size)):
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        h = 1e-5
        ends = []
        for sign in (1, -1):
            moved = {"x": x, "y": y, "lr": lr} | {name: value + sign * h * direction}
            ends.append(exact_gradient(student, moved["x"], moved["y"], moved["lr"], segment).loss)
        assert float((ends[0] - ends[1]) / (2 * h)) == pytest.approx(float((slope * direction).sum()), rel=1e-4)


def test_a_student_that_arrives_has_no_loss() -> None:
    student, x, y, lr, segment = problem(4, 0.05)
    start = segment.start
    theta = start.requires_grad_(True)
    for i in range(4):
        (g,) = torch.autograd.grad(student.loss(theta, i, x, y), theta)
        theta = (theta - lr * g).detach().requires_grad_(True)
    for gradient in GRADIENTS.values():
        g = gradient(student, x, y, lr, Segment(start, theta.detach()))
        assert float(g.loss) < 1e-20
        assert float(g.images.abs().max()) < 1e-9
        assert gradient(student, x, y, lr * 0, Segment(start, theta.detach())).loss == pytest.approx(1.0)


@pytest.mark.parametrize(("share", "select"), [(0.0, "depth"), (0.5, "depth"), (0.5, "loss")])
def test_tesla_has_the_exact_loss_and_for_one_step_the_exact_gradient(share: float, select: str) -> None:
    for steps, kind in ((1, "none"), (1, "crop_flip"), (5, "crop_flip")):
        p = problem(steps, 0.05, kind=kind, size=4, share=share, select=select)
        exact, tesla = (f(*p) for f in (exact_gradient, tesla_gradient))
        torch.testing.assert_close(tesla.loss, exact.loss, rtol=1e-10, atol=0)
        if steps == 1:
            for a, b in zip(tesla, exact, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-10)
        else:
            assert not torch.allclose(tesla.images, exact.images, rtol=1e-3)


def test_both_see_the_same_augmented_images() -> None:
    p = problem(4, 0.05, dtype=torch.float32, kind="dsa", size=2)
    exact, tesla = exact_gradient(*p), tesla_gradient(*p)
    torch.testing.assert_close(tesla.loss, exact.loss, rtol=1e-4, atol=0)
    other = dataclasses.replace(p[0], seed=5)
    assert abs(float(exact_gradient(other, *p[1:]).loss - exact.loss)) > 1e-4


def test_tesla_points_where_the_exact_gradient_does_and_less_so_with_more_steps() -> None:
    cosines = []
    for steps in (5, 40):
        p = problem(steps, 0.01)
        cosines.append(cosine(exact_gradient(*p).images, tesla_gradient(*p).images))
    assert cosines[0] > 0.95
    assert cosines[1] < cosines[0]


def test_tesla_s_gradient_of_the_step_size_is_that_of_its_formula() -> None:
    student, x, y, lr, segment = problem(5, 0.05, share=0.25)
    start = segment.start
    theta, total = start, torch.zeros_like(start)
    for i in range(5):
        theta = theta.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(student.loss(theta, i, x, y), theta)
        theta, total = theta - lr * g, total + g
    free = lr.clone().requires_grad_(True)
    loss, _ = matching_loss(start - free * total, segment)
    (slope,) = torch.autograd.grad(loss, free)
    torch.testing.assert_close(tesla_gradient(student, x, y, lr, segment).step_size, slope)


def test_the_mask_leaves_shallow_parameters_out_of_both_sums() -> None:
    g = torch.Generator().manual_seed(0)
    end, start, target = (torch.randn(20, generator=g).requires_grad_(True) for _ in range(3))
    loss, denominator = matching_loss(end, Segment(start, target, 0.25))
    plain = (end - target)[5:].square().sum() / (start - target)[5:].square().sum()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(denominator, (start - target)[5:].square().sum())
    (slope,) = torch.autograd.grad(loss, end)
    assert (slope[:5] == 0).all()
    assert (slope[5:] != 0).all()
    whole, _ = matching_loss(end, Segment(start, target))
    torch.testing.assert_close(whole, (end - target).square().sum() / (start - target).square().sum())


def test_the_smallest_errors_are_left_out_by_loss() -> None:
    errors = torch.tensor([3.0, 0.0, 2.0, 1.0])
    assert Segment(errors, errors, 0.5, "loss").mask(errors).tolist() == [1, 0, 1, 0]
    assert Segment(errors, errors, 0.5, "depth").mask(errors).tolist() == [0, 0, 1, 1]
    assert Segment(errors, errors, 0.0, "loss").mask(errors).tolist() == [1, 1, 1, 1]


def test_the_range_of_start_epochs_grows_to_its_end() -> None:
    bounds = [last_start(step, first=10, last=20, every=100) for step in range(1500)]
    assert bounds == sorted(bounds)
    assert (bounds[0], bounds[99], bounds[100], bounds[999], bounds[1000]) == (10, 10, 11, 19, 20)
    assert max(bounds) == 20
    assert last_start(0, first=10, last=20, every=0) == 20


def test_batches_of_a_student_pass_through_all_images_before_any_comes_again() -> None:
    batches = draw_batches(10, 4, 7, seed=1)
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2, 4]
    assert sorted(torch.cat(batches[:3]).tolist()) == sorted(torch.cat(batches[3:6]).tolist()) == list(range(10))
    assert [b.tolist() for b in batches] == [b.tolist() for b in draw_batches(10, 4, 7, seed=1)]
    assert [len(b) for b in draw_batches(3, 100, 2, seed=1)] == [3, 3]
