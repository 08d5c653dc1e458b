"""Muon with AdamW as one optimizer: the same steps as torch's own, on kernels of any layout, and its state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dq.config.students import StudentConfig
from dq.core import devices
from dq.core.errors import InputError
from dq.networks.optimizers import MuonAdamW, as_matrix, make_optimizer, muon_groups, orthogonalize
from dq.networks.zoo import make_net

SETTINGS = {"lr": 0.01, "weight_decay": 0.1}
NAMES = ["0.weight", "3.weight"]


def layers() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 2), nn.Flatten(), nn.Linear(54, 4)
        )


def gradients(net: nn.Module, step: int) -> None:
    x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(step))
    net(x).square().sum().backward()


def optimizer(net: nn.Module, dtype: str | None = "bfloat16") -> MuonAdamW:
    hidden, rest = muon_groups(net, convolutions=True)
    others = [{"params": list(rest.values()), "weight_decay": 0.1}]
    return MuonAdamW(list(hidden.values()), others, dtype=dtype, **SETTINGS)


def trained(net: nn.Module, own: torch.optim.Optimizer, steps: range) -> nn.Module:
    for step in steps:
        own.zero_grad()
        gradients(net, step)
        own.step()
    return net


def test_hidden_matrices_are_kernels_and_linear_weights_but_the_last() -> None:
    hidden, rest = muon_groups(layers(), convolutions=True)
    assert list(hidden) == NAMES
    assert set(rest) == {"0.bias", "1.weight", "1.bias", "3.bias", "5.weight", "5.bias"}
    assert list(muon_groups(layers())[0]) == []
    assert list(muon_groups(layers()[:4], convolutions=True)[0]) == NAMES[:1]  # the last layer is the output


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (1, 5), (5, 5)])
def test_a_matrix_takes_the_steps_of_torchs_muon(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(*shape, generator=g), torch.randn(3, *shape, generator=g)
    ours, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    bias = nn.Parameter(torch.zeros(6))
    both = MuonAdamW([ours], [{"params": [bias]}], dtype="bfloat16", **SETTINGS)
    alone = torch.optim.Muon([other], adjust_lr_fn="match_rms_adamw", **SETTINGS)
    for step in range(3):
        ours.grad, other.grad = gradient[step].clone(), gradient[step].clone()
        both.step()
        alone.step()
        assert torch.equal(ours, other)
    assert not torch.equal(ours, start)
    assert bias.equal(torch.zeros(6))  # no gradient, no step


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_orthogonalization_in_float32_is_that_in_bfloat16_without_its_rounding(shape: tuple[int, int]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    exact = orthogonalize(x, torch.float64)
    rounded = orthogonalize(x, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert (orthogonalize(x, torch.float32).double() - exact).norm() < 1e-5 * exact.norm()
    assert 1e-4 * exact.norm() < (rounded.double() - exact).norm() < 0.03 * exact.norm()
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(exact, u * s @ v)
    assert orthogonalize(torch.zeros(3, 2), torch.float32).equal(torch.zeros(3, 2))


def test_the_dtype_follows_the_machine_at_the_start_and_the_state_later(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = {dtype: layers() for dtype in ("bfloat16", "float32")}
    states = {}
    for dtype, net in nets.items():
        monkeypatch.setattr(devices, "has_native_bfloat16", lambda device, native=dtype == "bfloat16": native)
        own = optimizer(net, None)
        assert own.param_groups[0]["dtype"] == dtype
        trained(net, own, range(2))
        states[dtype] = own.state_dict()
    assert optimizer(layers()).param_groups[0]["dtype"] == "bfloat16"  # as told, also where it is emulated
    a, b = (net[0].weight.detach() - layers()[0].weight.detach() for net in nets.values())
    assert 0 < (a - b).norm() < 0.03 * a.norm()

    moved = optimizer(layers(), None)
    moved.load_state_dict(copy.deepcopy(states["bfloat16"]))
    assert moved.param_groups[0]["dtype"] == "bfloat16"
    del states["bfloat16"]["param_groups"][0]["dtype"]  # as states were before
    moved = optimizer(layers(), None)
    moved.load_state_dict(states["bfloat16"])
    assert moved.param_groups[0]["dtype"] == "bfloat16"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_are_matrices_in_the_order_of_their_memory(layout: torch.memory_format) -> None:
    net = layers().to(memory_format=layout)  # type: ignore[call-overload]
    kernel = net[0].weight
    start = kernel.detach().clone()
    assert as_matrix(kernel.detach(), kernel).data_ptr() == kernel.data_ptr()
    own = optimizer(net)
    gradients(net, 0)
    flat = nn.Parameter(as_matrix(start, kernel).clone())
    flat.grad = as_matrix(kernel.grad, kernel).clone()
    torch.optim.Muon([flat], adjust_lr_fn="match_rms_adamw", **SETTINGS).step()
    own.step()
    assert torch.equal(as_matrix(kernel.detach(), kernel), flat)
    moved = (start * (1 - 0.01 * 0.1) - kernel.detach()) / (0.01 * 0.2 * 27**0.5)
    singular = torch.linalg.svdvals(moved.flatten(1))
    assert singular.min() > 0.4  # five Newton-Schulz steps leave singular values between about 0.5 and 1.5
    assert singular.max() < 1.6


def test_the_others_take_the_steps_of_adamw() -> None:
    net, other = layers(), layers()
    own = optimizer(net)
    adamw = torch.optim.AdamW(list(muon_groups(other, convolutions=True)[1].values()), **SETTINGS)
    gradients(net, 0)
    gradients(other, 0)
    own.step()
    adamw.step()
    for name, p in muon_groups(other, convolutions=True)[1].items():
        assert torch.equal(net.state_dict()[name], p), name


def test_a_state_goes_on_bit_for_bit_and_a_rate_reaches_both() -> None:
    whole = layers()
    trained(whole, optimizer(whole), range(6))
    begun = layers()
    own = optimizer(begun)
    trained(begun, own, range(3))
    resumed = copy.deepcopy(begun)
    again = optimizer(resumed)
    again.load_state_dict(copy.deepcopy(own.state_dict()))
    trained(resumed, again, range(3, 6))
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True)
    )
    for group in again.param_groups:
        group["lr"] = 0.0
    before: list[Tensor] = [p.detach().clone() for p in resumed.parameters()]
    trained(resumed, again, range(6, 7))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), before, strict=True))


def test_a_student_has_every_parameter_in_one_group() -> None:
    net = make_net("convnet3", 4, 8, seed=0)
    own = make_optimizer(net, StudentConfig(optimizer="muon", weight_decay=0.2))
    decays = {id(p): g["weight_decay"] for g in own.param_groups for p in g["params"]}
    kernels = [p for p in net.parameters() if p.ndim == 4]
    assert isinstance(own, MuonAdamW)
    assert [id(p) for p in own.hidden] == [id(p) for p in kernels]
    others = [p for p in net.parameters() if p.ndim != 4]
    assert {decays[id(p)] for p in others if p.ndim == 2} == {0.2}
    assert {decays[id(p)] for p in others if p.ndim == 1} == {0.0}
    assert sum(len(g["params"]) for g in own.param_groups) == len(list(net.parameters()))
    with pytest.raises(InputError, match="optimizer=muon needs a network with hidden matrices"):
        MuonAdamW([], [{"params": others}], **SETTINGS)
