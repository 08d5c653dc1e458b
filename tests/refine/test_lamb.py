"""LAMB on one tensor."""

from __future__ import annotations

import pytest
import torch

from dq.refine.lamb import Lamb, cosine_lr


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_step_has_lr_times_the_norm_of_the_tensor_whatever_the_loss(scale: float) -> None:
    lamb = Lamb.of(drawn(4, 3, 2, 2))
    for i in range(5):
        before = lamb.value.clone()
        lamb.step(scale * drawn(4, 3, 2, 2, seed=i + 1), 0.01)
        assert float((lamb.value - before).norm()) == pytest.approx(0.01 * float(before.norm()), rel=1e-4)


def test_the_first_steps_equal_the_formula() -> None:
    start, g1, g2 = drawn(6), drawn(6, seed=1), drawn(6, seed=2)
    lamb = Lamb.of(start)
    lamb.step(g1, 0.1)
    u = g1 / (g1.abs() + 1e-6)
    p = start - 0.1 * start.norm() / u.norm() * u
    torch.testing.assert_close(lamb.value, p)
    lamb.step(g2, 0.1)
    m = (0.9 * 0.1 * g1 + 0.1 * g2) / (1 - 0.9**2)
    v = (0.999 * 0.001 * g1**2 + 0.001 * g2**2) / (1 - 0.999**2)
    u = m / (v.sqrt() + 1e-6)
    torch.testing.assert_close(lamb.value, p - 0.1 * p.norm() / u.norm() * u, rtol=1e-4, atol=1e-5)


def test_norms_of_zero_make_the_ratio_one() -> None:
    lamb = Lamb.of(torch.zeros(3))
    lamb.step(torch.tensor([1.0, -1.0, 2.0]), 0.1)
    torch.testing.assert_close(lamb.value, torch.tensor([-0.1, 0.1, -0.1]))
    still = Lamb.of(torch.ones(3))
    still.step(torch.zeros(3), 0.1)
    assert torch.equal(still.value, torch.ones(3))


def test_the_schedule_is_a_cosine_down_to_its_floor() -> None:
    assert cosine_lr(0, 100, 3e-4, 0.1) == pytest.approx(3e-4)
    assert cosine_lr(50, 100, 3e-4, 0.1) == pytest.approx(3e-4 * 0.55)
    assert cosine_lr(100, 100, 3e-4, 0.1) == pytest.approx(3e-5)
