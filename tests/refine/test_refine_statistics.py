"""Batch norm statistics as a distance: against plain autograd, against known answers, and by depth."""

from __future__ import annotations

import pytest
import torch
from tiny_teachers import TinyNet, drawn, images_of, teacher_of
from torch import nn

from dq.config.refinement import DepthConfig
from dq.core.errors import InputError
from dq.networks.zoo import make_net
from dq.refine.batch_statistics import InputSums, StatisticsDistance
from dq.refine.matching import StatMatcher, layer_weights, pad_drop, trace_layers
from dq.refine.moments import Moments


class OwnNorm(nn.BatchNorm2d):
    """A subclass that also activates, as timm's do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(min=-1)


def layers_of(net: nn.Module, side: int = 16):
    return trace_layers(net, lambda: net(torch.zeros(1, 3, side, side)))


def plain_distance(net: nn.Module, x: torch.Tensor, weights, norm: str = "l2", copies=None):
    """The formula by hooks and autograd; `copies` repeats images."""
    seen = {}
    handles = [
        m.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, (m, args[0])))
        for name, m in net.named_modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    net(x if copies is None else x.repeat_interleave(copies, 0))
    for h in handles:
        h.remove()
    total = 0.0
    for weight, (m, f) in zip(weights, seen.values(), strict=True):
        parts = [m.running_var - f.var((0, 2, 3), unbiased=False), m.running_mean - f.mean((0, 2, 3))]
        total = total + weight * sum(p.norm() if norm == "l2" else p.square().sum() for p in parts)
    return total


@pytest.mark.parametrize("norm", ["l2", "squared"])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, OwnNorm])
def test_distance_and_gradient_are_those_of_plain_autograd(norm, kind):
    net = drawn(TinyNet(norm=kind))
    x = images_of(torch.arange(6) % 4)
    weights = torch.tensor([10.0, 1.0, 0.5])
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with StatMatcher(layers_of(net), weights, norm=norm) as matcher:
        logits = net(a)
        own = matcher.distance()
    expected = plain_distance(net, b, weights.tolist(), norm)
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, net(x), rtol=1e-5, atol=1e-6)
    # both ways back at once: through the statistics and through the logits
    (own + logits.square().sum()).backward()
    (expected + net(b).square().sum()).backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["l2", "squared"])
def test_one_vector_of_all_layers_has_the_distances_of_each_in_float64(norm):
    """Rounding alone, of layers of different widths and of inputs far from 0."""
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(7, c, s, s, generator=g, dtype=torch.float64) * 2 + 30 for c, s in ((3, 8), (17, 4), (1, 2))]
    x = [t.float().requires_grad_() for t in inputs]
    centers = [t.detach().mean((0, 2, 3)) + 0.1 for t in x]
    targets = [Moments(c + 0.3, torch.rand(len(c), generator=g) + 3) for c in centers]
    distances = StatisticsDistance.of(targets, centers, norm)
    sums = [InputSums.apply(t, c, None) for t, c in zip(x, centers, strict=True)]
    own = distances(sums, tuple(t[:, 0].numel() for t in x))
    exact = [t.detach().double().requires_grad_() for t in x]
    expected = []
    for t, target in zip(exact, targets, strict=True):
        parts = target.var.double() - t.var((0, 2, 3), unbiased=False), target.mean.double() - t.mean((0, 2, 3))
        expected.append(sum(p.norm() if norm == "l2" else p.square().sum() for p in parts))
    expected = torch.stack(expected)
    torch.testing.assert_close(own.double(), expected, rtol=2e-6, atol=0)
    scale = torch.tensor([10.0, 1.0, 2.0])
    (own * scale).sum().backward()
    (expected * scale).sum().backward()
    for a, b in zip(x, exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-6)


def test_a_distance_of_zero_has_no_gradient():
    x = torch.ones(2, 3, 4, 4, requires_grad=True)
    zero = Moments(torch.ones(3), torch.zeros(3))
    distances = StatisticsDistance.of([zero], [torch.ones(3)], "l2")
    value = distances([InputSums.apply(x, torch.ones(3), None)], (32,))
    value.sum().backward()
    assert value.tolist() == [0.0]
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_weights_of_images_are_repetitions():
    net = drawn(TinyNet())
    x = images_of(torch.arange(3))
    copies = torch.tensor([3, 1, 2])
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with StatMatcher(layers_of(net), torch.ones(3), image_weights=copies.float()) as matcher:
        net(a)
        own = matcher.distance()
    expected = plain_distance(net, b, [1.0, 1.0, 1.0], copies=copies)
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    own.backward()
    expected.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_distance_vanishes_where_the_statistics_are_those_of_the_batch():
    net = TinyNet()
    drawn(net)
    x = images_of(torch.arange(8) % 4)
    results = []
    handles = [
        m.register_forward_pre_hook(lambda m, args: results.append((m, args[0])))
        for m in net.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    for i in range(3):  # a layer's statistics change the inputs of the next
        results.clear()
        net(x)
        m, f = results[i]
        m.running_mean.copy_(f.mean((0, 2, 3)).detach())
        m.running_var.copy_(f.var((0, 2, 3), unbiased=False).detach())
    for h in handles:
        h.remove()
    with StatMatcher(layers_of(net), torch.tensor([10.0, 1.0, 1.0])) as matcher:
        net(x)
        assert matcher.distance().item() < 1e-5
        net(x + 0.1)
        assert matcher.distance().item() > 0.1


def test_statistics_are_in_float32_whatever_the_teacher_computes_in():
    net = drawn(TinyNet())
    x = (images_of(torch.arange(4)) * 300).requires_grad_()  # squares of features overflow float16
    with StatMatcher(layers_of(net), torch.ones(3)) as matcher:
        with torch.autocast("cpu", torch.float16):
            assert net(x).dtype == torch.float16
        distance = matcher.distance()
    assert distance.dtype == torch.float32
    assert torch.isfinite(distance)
    assert distance.item() > 65504


def test_the_network_is_as_before_behind_the_matcher():
    net = drawn(TinyNet())
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"), StatMatcher(layers_of(net), torch.ones(3)):
        net(torch.rand(2, 3, 16, 16))
        raise RuntimeError("stop")
    assert all("forward" not in m.__dict__ for m in net.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())


def test_training_mode_is_refused():
    net = drawn(TinyNet())
    layers = layers_of(net)
    net.bn2.train()
    with pytest.raises(InputError, match=r"'bn2' is in training mode"), StatMatcher(layers, torch.ones(3)):
        pass


def test_layers_stand_in_the_order_of_calls():
    layers = layers_of(TinyNet().eval())
    assert [a.name for a in layers] == ["bn1", "bn2", "late"]
    assert [a.params for a in layers] == [3 * 8 * 9, 8 * 16 * 9, 16 * 16 * 9]


def test_depth_of_resnet18_is_that_of_the_literature():
    net = make_net("resnet18", 10, 32, seed=0).eval()
    layers = layers_of(net, 32)
    assert len(layers) == 20
    assert sum(a.channels for a in layers) == 4800
    ends = [0, 4, 9, 14]  # stem and stages 1 to 3
    channels = torch.tensor([a.channels for a in layers]).cumsum(0)[ends] / 4800
    assert (100 * channels).tolist() == pytest.approx([1.3, 6.7, 20, 46.7], abs=0.05)
    params = torch.tensor([a.params for a in layers]).cumsum(0)[ends] / sum(a.params for a in layers)
    assert (100 * params).tolist() == pytest.approx([0.0, 1.4, 6.1, 24.9], abs=0.1)
    for share, first in ((0.25, 5), (0.5, 10), (0.75, 15)):
        _, kept = layer_weights(layers, DepthConfig(drop=share))
        assert kept.nonzero()[0] == first
    # a quarter of the parameters ends before stage 4, a quarter of the channels within stage 3
    assert layer_weights(layers, DepthConfig(drop=0.25, unit="param"))[1].nonzero()[0] == 15
    assert layer_weights(layers, DepthConfig(drop=0.2, unit="channel"))[1].nonzero()[0] == 10


def test_weights_of_layers():
    layers = layers_of(TinyNet().eval())

    def kept(first: float = 10.0, **depth) -> list[float]:
        return layer_weights(layers, DepthConfig(**depth), first_weight=first)[1].tolist()

    assert kept() == [10, 1, 1]
    assert kept(first=1.0) == [1, 1, 1]
    assert kept(drop=0.34) == [0, 1, 1]
    assert kept(drop=0.34, renorm="count") == [0, 1.5, 1.5]
    assert kept(drop=0.34, keep="shallow") == [10, 0, 0]
    assert kept(ramp=1.0) == pytest.approx([10 / 3, 2 / 3, 1])
    assert layer_weights(layers, DepthConfig(drop=None), drop=0.67)[1].tolist() == [0, 0, 1]
    with pytest.raises(InputError, match="none of 3 layers"):
        layer_weights(layers, DepthConfig(drop=0.3, keep="shallow"))
    with pytest.raises(InputError, match=r"drop must be a number in \[0, 1\) or \'auto\'"):
        DepthConfig(drop=1.0)
    with pytest.raises(InputError, match="keep=shallow keeps what drop leaves out"):
        DepthConfig(keep="shallow")


def test_nothing_is_dropped_at_zero_whatever_the_unit():
    """A norm before the first convolution stands behind no weight."""

    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv, self.late = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.late(self.conv(self.norm(x)))

    layers = layers_of(Before().eval())
    assert [a.params for a in layers] == [0, 12]
    for unit in ("layer", "channel", "param"):
        assert layer_weights(layers, DepthConfig(unit=unit))[1].tolist() == [10, 1]


def test_a_norm_without_running_statistics_is_refused():
    with pytest.raises(InputError, match="'bn1' of a teacher keeps no running statistics"):
        layers_of(TinyNet(norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False)).eval())


@pytest.mark.parametrize(
    ("ipc", "size", "drop"), [(1, 5000, 0), (10, 5000, 0.25), (500, 5000, 0.5), (1000, 5000, 0.75), (50, 100, 0.5)]
)
def test_pads_rule(ipc, size, drop):
    assert pad_drop(ipc, size) == drop


def test_a_norm_that_is_called_twice_is_refused():
    class Twice(TinyNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + super().forward(x)

    with pytest.raises(InputError, match="'bn1' twice"):
        layers_of(Twice().eval())


def test_score_has_a_row_per_teacher_and_a_column_per_layer():
    from dq.refine.teddy import score

    nets = [
        drawn(TinyNet(), 0),
        drawn(TinyNet(), 1),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.LazyLinear(4)),
    ]
    nets[2](torch.zeros(1, 3, 16, 16))
    x = images_of(torch.arange(8) % 4)
    result = score(x, [teacher_of(n.eval()) for n in nets])
    assert result.shape == (3, 3)
    assert torch.isfinite(result[:2]).all()
    assert torch.isnan(result[2]).all()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.25, 0.2, 0.3)))
    expected = plain_distance(nets[0], (x - mean) / std, [0, 1, 0])
    torch.testing.assert_close(result[0, 1], expected)


def test_norms_of_timm_that_also_activate_are_read_at_their_inputs():
    pytest.importorskip("timm")
    net = make_net("timm:efficientnet_lite0", 4, 64, seed=0).eval().requires_grad_(False)
    layers = layers_of(net, 64)
    assert any(type(a.norm) is not nn.BatchNorm2d for a in layers)
    x = images_of(torch.arange(3), 64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with StatMatcher(layers, torch.ones(len(layers))) as matcher:
        logits = net(a)
        own = matcher.distance()
    expected = plain_distance(net, b, [1.0] * len(layers))
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, net(x))
    own.backward()
    expected.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-4)
