"""FRePo's network, and the pool of networks that are trained on a changing set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dq.core.errors import InputError
from dq.networks.online_pool import OnlinePool, PoolSettings
from dq.networks.zoo import make_net


def pool(nets: tuple[str, ...] = ("frepoconv3w32",), *, seed: int = 5, **settings: Any) -> OnlinePool:
    return OnlinePool(nets, 3, 8, PoolSettings(**{"size": 2, "max_online": 4, **settings}), seed=seed)


def task(n: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 8, 8, generator=g), torch.randn(n, 3, generator=g)


def weights(p: OnlinePool, i: int) -> Tensor:
    return torch.cat([v.flatten() for v in p.members[i].net.state_dict().values()])


def test_the_networks_features_have_the_published_sizes() -> None:
    for name, side, size in (
        ("frepoconv3", 32, 8192),
        ("frepoconv3", 28, 8192),
        ("frepoconv4", 64, 16384),
        ("frepoconv3w32", 8, 128),
    ):
        net = make_net(name, 10, side, seed=0)
        assert net.classifier.in_features == size
        assert net(torch.zeros(2, 3, side, side)).shape == (2, 10)
    net = make_net("frepoconv3", 10, 32, seed=0)
    kinds = [type(m).__name__ for m in net.features]
    assert kinds == ["Conv2d", "ReLU", "AvgPool2d", *["BatchNorm2d", "Conv2d", "ReLU", "AvgPool2d"] * 2]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in make_net("frepoconv3-none", 10, 32, seed=0).modules())


def test_weights_start_from_a_truncated_normal_law_of_variance_one_over_fan_in() -> None:
    net = make_net("frepoconv3", 10, 32, seed=0)
    w, fan_in = net.features[8].weight.detach(), 256 * 9
    assert float(w.std()) == pytest.approx(fan_in**-0.5, rel=0.01)
    assert float(w.abs().max()) <= 2 * fan_in**-0.5 / 0.8796 + 1e-6
    assert float(net.features[8].bias.detach().abs().max()) == 0


def test_a_network_is_replaced_after_its_steps_and_the_resets_are_spread() -> None:
    p = pool()
    assert [m.counter for m in p.members] == [0, 2]
    x, y = task()
    losses = [p.advance(0, x, y, step) for step in range(6)]
    # counters 0 to 4 train, 5 > max_online is replaced: max_online + 2 uses
    assert [loss is None for loss in losses] == [False] * 5 + [True]
    assert losses[4] < losses[0]
    assert (p.members[0].counter, p.members[0].generation) == (0, 1)
    first = pool()
    assert not torch.equal(weights(p, 0), weights(first, 0))
    assert p.advance(0, x, y, 6) is not None


def test_features_are_of_evaluation_mode_and_leave_the_network_as_it_was() -> None:
    p = pool()
    x, y = task()
    p.advance(0, x, y, 0)
    before = weights(p, 0)
    with p.features(0) as features:
        f = features(x)
        assert torch.allclose(features(x[:2]), f[:2], atol=1e-6)
        assert not f.requires_grad
        assert features(x.requires_grad_(True)).requires_grad
    assert f.shape == (6, 128)
    assert torch.equal(weights(p, 0), before)
    assert all(q.requires_grad for q in p.members[0].net.parameters())
    # one step makes nine tenths of the running statistics
    norm = next(m for m in p.members[0].net.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.momentum == 0.9


@pytest.mark.parametrize("nets", [("frepoconv3w32",), ("frepoconv3w32", "convnet3w32-bn"), ("alexnet",)])
def test_a_restored_pool_goes_on_bit_for_bit(nets: tuple[str, ...]) -> None:
    x, y = task()
    whole, stopped = pool(nets), pool(nets)
    for step in range(12):
        whole.advance(whole.pick(step), x, y, step)
    for step in range(7):
        stopped.advance(stopped.pick(step), x, y, step)
    state = stopped.state()
    resumed = pool(nets)
    resumed.restore(*state)
    for step in range(7, 12):
        resumed.advance(resumed.pick(step), x, y, step)
    assert [m.counter for m in resumed.members] == [m.counter for m in whole.members]
    for i in range(2):
        assert torch.equal(weights(resumed, i), weights(whole, i))


def test_a_training_step_takes_a_random_part_of_a_large_set() -> None:
    x, y = task()
    part = pool(batch_size=4)
    seen: list[int] = []
    part.members[0].net.register_forward_pre_hook(lambda net, args: seen.append(len(args[0])))
    part.advance(0, x, y, 0)
    assert seen == [4]


def test_picks_are_seeded_and_use_all_networks() -> None:
    picks = [pool().pick(step) for step in range(20)]
    assert picks == [pool().pick(step) for step in range(20)]
    assert set(picks) == {0, 1}
    assert picks != [pool(seed=6).pick(step) for step in range(20)]


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(InputError, match="set nets and pool_size"):
        pool(())
