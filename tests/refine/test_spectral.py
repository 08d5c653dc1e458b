"""Spectral matching: its formula against complex numbers, limits, the network of frequencies, experts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from refined import refined
from small_experts import NET, experts_in
from torch import Tensor

from dq.config.condensation import SpectralMatching
from dq.core.errors import InputError
from dq.networks.trajectories import Experts, open_experts
from dq.refine.method import Batch, RealImages, Resources, Session
from dq.refine.spectral_matching import (
    Frequencies,
    SpectralMethod,
    characteristic,
    distance,
    draw_network,
    features_at,
    refine,
)

CPU = torch.device("cpu")


def samples(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_distance_is_the_formula_in_complex_numbers() -> None:
    real, learned, t = samples(7, 3), samples(4, 3, seed=1), samples(5, 3, seed=2)
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    terms = []
    for row in t.numpy():
        r = np.mean([np.exp(1j * row @ f) for f in real.numpy()])
        s = sum(p * np.exp(1j * row @ f) for p, f in zip(shares.numpy(), learned.numpy(), strict=True))
        squared = 0.3 * (abs(r) - abs(s)) ** 2 + 2 * 0.7 * (abs(r) * abs(s) - (r * np.conj(s)).real)
        terms.append(np.sqrt(squared))
    phi_r, phi_s = characteristic(real, t), characteristic(learned, t, shares)
    assert float(distance(phi_r, phi_s, 0.3, 0.7)) == pytest.approx(300 * float(np.mean(terms)), rel=1e-9)


def test_equal_sets_in_any_order_are_at_no_distance() -> None:
    f, t = samples(6, 3).float(), samples(50, 3, seed=1).float()
    same = distance(characteristic(f, t), characteristic(f[[5, 3, 1, 0, 2, 4]], t), 0.5, 0.5)
    other = distance(characteristic(f, t), characteristic(samples(6, 3, seed=2).float(), t), 0.5, 0.5)
    assert float(same) < 1e-3 < 10 < float(other)


def test_amplitude_does_not_see_a_shift_and_phase_does_not_see_a_share() -> None:
    f, t = samples(6, 3), samples(50, 3, seed=1)
    phi, shifted = characteristic(f, t), characteristic(f + samples(3, seed=3), t)
    assert float(distance(phi, shifted, 1, 0)) == pytest.approx(0, abs=1e-3)
    phases = (phi.abs().square() * 2 * (1 - (phi.angle() - shifted.angle()).cos())).sqrt()
    assert float(distance(phi, shifted, 0, 1)) == pytest.approx(300 * float(phases.mean()), rel=1e-6)
    assert float(distance(phi, 0.4 * phi, 0, 1)) == pytest.approx(0, abs=1e-3)
    of_amplitude = 300 * 0.5 * 0.6 * float(phi.abs().mean())
    assert float(distance(phi, 0.4 * phi, 0.25, 1)) == pytest.approx(of_amplitude, rel=1e-6)


def test_gradients_are_those_of_finite_differences() -> None:
    real, shares = samples(5, 3), torch.tensor([0.25, 0.75], dtype=torch.float64)

    def loss(learned: Tensor, t: Tensor) -> Tensor:
        return distance(characteristic(real, t), characteristic(learned, t, shares), 0.4, 0.6)

    points = [v.requires_grad_(True) for v in (samples(2, 3, seed=1), samples(4, 3, seed=2))]
    assert torch.autograd.gradcheck(loss, points)
    equal = real.clone().requires_grad_(True)  # where the root has no derivative
    distance(characteristic(real, points[1]), characteristic(equal, points[1]), 0.4, 0.6).backward()
    assert torch.isfinite(equal.grad).all()


def test_the_network_of_frequencies_learns_to_enlarge_the_loss() -> None:
    # sets that differ in the first coordinate alone
    real, learned = samples(200, 4).float(), samples(200, 4).float() + torch.tensor([1.0, 0, 0, 0])
    config = SpectralMatching(frequencies=64, sampler="network", sampler_lr=2e-3)
    frequencies, carried, losses = Frequencies(config, 4, 0, CPU), {}, []
    for step in range(60):
        drawn = frequencies.draw(step, carried)
        assert drawn.shape == (64, 4)
        assert float(drawn.detach().abs().max()) <= 1
        t = drawn.detach().requires_grad_(True)
        loss = distance(characteristic(real, t), characteristic(learned, t), 0.5, 0.5)
        frequencies.learn(drawn, torch.autograd.grad(loss, t)[0], carried)
        losses.append(loss.item())
    assert np.mean(losses[-5:]) > 1.1 * np.mean(losses[:5])
    plain = Frequencies(dataclasses.replace(config, sampler="gaussian"), 4, 0, CPU)
    assert not plain.draw(3, {}).requires_grad
    assert torch.equal(plain.draw(3, {}), plain.draw(3, {}))
    assert not torch.equal(plain.draw(3, {}), plain.draw(4, {}))


# --- experts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(toy_source: Any, accelerator: Any, tmp_path_factory: pytest.TempPathFactory) -> Experts:
    folder = tmp_path_factory.mktemp("experts")
    return open_experts(experts_in(folder, toy_source, accelerator, epochs=2))


def test_networks_lie_between_the_ends_of_an_expert(experts: Experts) -> None:
    config = SpectralMatching(net=NET, experts=str(experts.folder))
    shares = set()
    for seed in range(8):
        net = draw_network(config, 3, 8, experts, seed)
        theta = torch.cat([p.flatten() for p in net.parameters()])
        fits = []
        for i in range(experts.number):
            first, last = (experts.parameters(i, e) for e in (0, experts.epochs))
            share = (theta - first) @ (last - first) / (last - first).square().sum()
            fits.append((float((theta - torch.lerp(first, last, share)).norm()), i, round(float(share), 3)))
        rest, i, share = min(fits)
        assert rest < 1e-4
        assert 0 <= share <= 1
        shares.add((i, share))
    assert len({i for i, _ in shares}) == 2
    assert len(shares) == 8
    lengths = features_at(draw_network(config, 3, 8, experts, 0), torch.rand(5, 3, 8, 8)).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(5))


def test_experts_bring_their_preprocessing_and_held_out_images(
    experts: Experts, toy_source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    y = torch.from_numpy(toy_source.train.labels).long()
    real = RealImages((255 * torch.rand(len(y), 3, 8, 8)).byte(), y)
    config = SpectralMatching(
        net=NET,
        experts=str(experts.folder),
        steps=2,
        frequencies=8,
        real_batch=4,
        checks=1,
        check_nets=1,
        check_epochs=1,
    )
    held: list[int] = []
    monkeypatch.setattr(
        "dq.refine.class_matching.classic_accuracy", lambda x, y, h, **more: held.append(len(h.real.labels)) or 0.5
    )
    method, labels = SpectralMethod(), torch.arange(3)
    assert method.needs(config).experts == str(experts.folder)
    batch = Batch(torch.rand(3, 3, 8, 8), labels)
    r = method.run(batch, config, Resources(8, 3, real=real, experts=experts), Session())
    assert r.facts["whitening"]["recipe"] == "mtt"
    assert held == [int(experts.held_out_rows(y).sum())]
    assert "held_out" in config.unread()
    for settings, given, message in (
        ({"experts": None}, experts, "experts"),
        ({}, None, "experts"),
        ({"net": "convnet2w8"}, experts, "are convnet2w4, but spectral has net=convnet2w8; train others, or set net="),
    ):
        with pytest.raises(InputError, match=message):
            refined(
                refine, batch.images, labels, dataclasses.replace(config, **settings), real, classes=3, experts=given
            )
    with pytest.raises(InputError, match=r"3 classes .* 8 px, .* 4 classes .* 8 px"):
        refined(refine, batch.images, labels, config, real, classes=4, experts=experts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frequencies": 0}, "frequencies must be a whole number of at least 1, not 0"),
        ({"amplitude": -1.0}, "amplitude must be a number of at least 0, not -1"),
        ({"amplitude": 0.0, "phase": 0.0}, "amplitude and phase are both 0"),
        ({"frequencies": 1, "sampler": "network"}, "standardizes over frequencies"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SpectralMatching(**settings)
