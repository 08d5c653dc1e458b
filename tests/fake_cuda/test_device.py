"""The fake device: what it refuses, what it counts, and that the code for CUDA in torch is the one that runs."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fake_cuda.device_log import LAUNCH, TO_DEVICE, WAIT, Counts, DeviceLog
from fake_cuda.rules import DeviceMixError
from fake_cuda.tensor import LOG, FakeCudaTensor

DEVICE = torch.device("cuda")


def ramp(*shape: int) -> torch.Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)


def test_torch_believes_in_the_device() -> None:
    assert torch.cuda.is_available()
    assert torch.accelerator.current_accelerator() == DEVICE
    x = ramp(2, 3).to(DEVICE)
    assert (x.device, x.is_cuda, x.shape, x.stride()) == (torch.device("cuda:0"), True, (2, 3), (3, 1))
    torch.testing.assert_close(x.cpu(), ramp(2, 3), rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda d: torch.zeros(3, device=d),
        lambda d: torch.full((2, 2), 7, device=d),
        lambda d: torch.arange(2, 9, 3, device=d),
        lambda d: torch.linspace(0, 1, 5, device=d),
        lambda d: torch.eye(3, device=d),
        lambda d: torch.tensor([[1.0, 2.0]], device=d),
        lambda d: torch.tril_indices(3, 3, device=d),
        lambda d: torch.ones(2, device=d).new_full((3,), 2.0),
        lambda d: torch.full_like(torch.zeros(2), 3.0, device=d),
    ],
)
def test_what_is_made_on_the_device_has_the_values_of_the_cpu(make) -> None:
    assert isinstance(make(DEVICE), FakeCudaTensor)
    torch.testing.assert_close(make(DEVICE).cpu(), make("cpu"), rtol=0, atol=0)


def test_threads_see_the_device() -> None:
    made: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: made.extend([torch.ones(2).to(DEVICE), torch.zeros(2, device=DEVICE)]))
    thread.start()
    thread.join()
    assert [t.device.type for t in made] == ["cuda", "cuda"]


# --- mixing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        lambda d, h: d + h,
        lambda d, h: h + d,
        lambda d, h: d.add_(h),
        lambda d, h: h.add_(d),
        lambda d, h: h.mul_(d.sum()),
        lambda d, h: d @ h,
        lambda d, h: torch.cat([d, h]),
        lambda d, h: torch.where(h > 1, d, 0),
        lambda d, h: d.masked_fill(h > 1, 0),
        lambda d, h: h[d.long()[0] - 1],
        lambda d, h: d.index_select(0, torch.tensor([0])),
        lambda d, h: d.index_put_((torch.tensor([0]),), h[:1]),
        lambda d, h: d.gather(0, torch.zeros(1, 2, dtype=torch.int64)),
        lambda d, h: torch.equal(d, h),
        lambda d, h: cross_entropy(d, torch.tensor([0, 1])),
        lambda d, h: nn.Linear(2, 2)(d),
        lambda d, h: torch._foreach_add_([d], [h]),
        lambda d, h: torch.randn(2, device=DEVICE, generator=torch.Generator()),
        lambda d, h: d.normal_(generator=torch.Generator()),
    ],
)
def test_host_and_device_do_not_mix(mix) -> None:
    with pytest.raises(DeviceMixError, match=r"tests/fake_cuda/test_device\.py:\d+ in <lambda>"):
        mix(ramp(2, 2).to(DEVICE), ramp(2, 2))


@pytest.mark.parametrize(
    "mix",
    [
        lambda d: d * torch.tensor(2.0),
        lambda d: torch.tensor(2.0) - d,
        lambda d: torch.where(d > 2, d, torch.tensor(0.0)),
        lambda d: d.clone().masked_fill_(d > 2, torch.tensor(5.0)),
        lambda d: d[torch.tensor([1, 0])],
        lambda d: d.clone().index_put_((torch.tensor([0]),), torch.tensor(1.0)),
        lambda d: d.clone().copy_(torch.ones(2, 2)),
        lambda d: torch.ones(2, 2).copy_(d),
    ],
)
def test_numbers_and_indices_of_the_host_are_taken(mix) -> None:
    torch.testing.assert_close(mix(ramp(2, 2).to(DEVICE)).cpu(), mix(ramp(2, 2)), rtol=0, atol=0)


def test_numpy_does_not_read_the_device() -> None:
    x = ramp(2).to(DEVICE)
    for read in (x.numpy, lambda: __import__("numpy").asarray(x)):
        with pytest.raises(TypeError, match=r"Tensor\.cpu"):
            read()


# --- counts -------------------------------------------------------------------------------------------------------


def test_launches_are_counted_and_views_are_not(device_log: DeviceLog) -> None:
    x = ramp(2, 3).to(DEVICE)
    assert device_log.counts() == Counts(launches=0, waits=0, to_device=1, to_host=0)
    y = (x.t()[1:].unsqueeze(0) * 2).relu_()  # one product, one relu
    y.permute(0, 2, 1).reshape(-1)  # a view, since the memory lies in this order
    x.t().reshape(-1)  # a copy on the device
    assert device_log.counts() == Counts(launches=3, waits=0, to_device=1, to_host=0)
    assert {line.partition(":")[0] for line in device_log.lines(LAUNCH)} == {"tests/fake_cuda/test_device.py"}
    torch.zeros(3, device=DEVICE)  # memory, and a kernel that fills it
    assert device_log.counts().launches == 4


@pytest.mark.parametrize(
    ("read", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: float(x.sum()), 1),
        (lambda x: bool((x > 2).any()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.to("cpu", non_blocking=True), 0),
        (lambda x: x[x > 2], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: torch.unique(x), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.masked_fill(x > 2, 0.0), 0),
        (lambda x: x.argmax(1), 0),
        (lambda x: torch.cuda.synchronize(), 1),
        (lambda x: torch.accelerator.synchronize(), 1),
        (lambda x: torch.linalg.inv(x), 1),
        (lambda x: x.repeat_interleave(2), 0),
        (lambda x: torch.tensor([1, 2], device=DEVICE).repeat_interleave(torch.tensor([1, 2], device=DEVICE)), 1),
    ],
)
def test_waits_of_the_host_are_counted(device_log: DeviceLog, read, waits: int) -> None:
    x = ramp(2, 2).to(DEVICE)
    device_log.clear()
    read(x)
    assert device_log.counts().waits == waits, device_log.operations(WAIT)


def test_copies_say_where_they_come_from(device_log: DeviceLog) -> None:
    x = ramp(4, 2)
    x.to(DEVICE)
    x.pin_memory()[:2].to(DEVICE, non_blocking=True)
    x.to(DEVICE)[torch.tensor([1])]
    copies = [text.partition(" at ")[0] for text in device_log.operations(TO_DEVICE)]
    pageable, pinned = "(4, 2) float32 from pageable memory", "(2, 2) float32 from pinned memory"
    assert copies == [pageable, pinned, pageable, "an index"]


def test_lines_of_dq_are_named(device_log: DeviceLog) -> None:
    from dq.data.augment import brightness

    brightness(torch.zeros(1, 3, 2, 2, device=DEVICE), torch.ones(1, device=DEVICE))
    assert [line.split(":")[0] for line in device_log.lines(LAUNCH) if "in brightness" in line] == [
        "dq/data/augment.py"
    ]


# --- what torch does with a CUDA device ---------------------------------------------------------------------------


def net_and_data() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return net, torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def step(net: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int = 3) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    return [p.detach().cpu() for p in net.parameters()]


def test_training_equals_the_cpu_bit_for_bit() -> None:
    net, x, y = net_and_data()
    on_device = step(copy.deepcopy(net).to(DEVICE), x.to(DEVICE), y.to(DEVICE))
    for a, b in zip(step(net, x, y), on_device, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_backward_pass_is_counted_at_its_call(device_log: DeviceLog) -> None:
    x = ramp(3).to(DEVICE).requires_grad_()
    loss = (x * x).sum()
    device_log.clear()
    loss.backward()
    assert device_log.counts().launches >= 3
    (line,) = {line for line in device_log.lines(LAUNCH) if line.endswith("(backward)")}
    assert "in test_the_backward_pass_is_counted_at_its_call" in line


def test_the_gradient_of_silu_is_one_kernel(device_log: DeviceLog) -> None:
    x = ramp(3).to(DEVICE).requires_grad_()
    y = nn.functional.silu(x)
    grad = torch.ones_like(y)
    device_log.clear()
    y.backward(grad)
    assert [line.split()[0] for line in device_log.operations(LAUNCH)] == ["silu_backward"]
    host = ramp(3).requires_grad_()
    nn.functional.silu(host).sum().backward()
    torch.testing.assert_close(x.grad.cpu(), host.grad)


def test_the_autograd_of_cuda_accumulates_and_copies() -> None:
    x = ramp(2, 2).to(DEVICE).requires_grad_()
    (grad,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    grad.sum().backward()
    torch.testing.assert_close(x.grad.cpu(), 6 * ramp(2, 2))
    twin = copy.deepcopy(nn.Parameter(x.detach()))
    assert isinstance(twin, nn.Parameter)
    assert twin.device.type == "cuda"
    assert twin.data_ptr() != x.data_ptr()


def test_inference_mode_is_that_of_torch() -> None:
    x = ramp(4).to(DEVICE)
    with torch.inference_mode():
        y = x.view(2, 2)
        z = y * 2
        w = z.view(4)
    assert [t.is_inference() for t in (x, y, z, w, w.view(2, 2))] == [False, False, True, True, True]
    weight = nn.Parameter(y[0])
    (weight * y[1]).sum().backward()
    torch.testing.assert_close(weight.grad.cpu(), torch.tensor([3.0, 4.0]))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        weight * z[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_cuda_casts(dtype: torch.dtype) -> None:
    net, x, y = net_and_data()
    net.to(DEVICE)
    with torch.autocast("cuda", dtype):
        out = net(x.to(DEVICE))
        assert out.dtype == dtype
        loss = cross_entropy(out, y.to(DEVICE))
    assert loss.dtype == torch.float32  # the loss is on autocast's list of float32 operations
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_the_gradient_scaler_skips_a_step_that_overflows() -> None:
    w = nn.Parameter(ramp(2).to(DEVICE))
    optimizer = torch.optim.SGD([w], 0.5)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    for factor in (1.0, float("inf")):
        optimizer.zero_grad()
        scaler.scale((w * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0  # halved by the second step, which changed nothing
    torch.testing.assert_close(w.detach().cpu(), ramp(2) - 0.5)


def test_optimizers_take_lists_of_parameters(device_log: DeviceLog) -> None:
    def launches(layers: int) -> int:
        parameters = [nn.Parameter(ramp(2).to(DEVICE)) for _ in range(layers)]
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
        optimizer.step()
        device_log.clear()
        optimizer.step()
        return device_log.counts().launches

    assert launches(1) == launches(9)


def test_draws_of_the_device_leave_the_generator_of_the_cpu_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    torch.cuda.manual_seed(5)
    first = torch.randn(4, device=DEVICE).cpu(), nn.functional.dropout(torch.ones(9, device=DEVICE)).cpu()
    assert torch.equal(before, torch.get_rng_state())
    torch.cuda.manual_seed(5)
    again = torch.randn(4, device=DEVICE).cpu(), nn.functional.dropout(torch.ones(9, device=DEVICE)).cpu()
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len(torch.unique(first[0])) == 4


def test_growing_in_place_is_refused() -> None:
    x = torch.empty(0, device=DEVICE)
    with pytest.raises(NotImplementedError, match="changes a shape in place"):
        torch.add(ramp(2).to(DEVICE), 1, out=x)


def test_views_in_place_are_followed(device_log: DeviceLog) -> None:
    x = ramp(1, 2, 3).to(DEVICE)
    assert x.squeeze_(0).t_().unsqueeze_(1).shape == (3, 1, 2)
    assert x.stride() == x.host.stride()
    assert device_log.counts().launches == 0
    torch.testing.assert_close(x.quantile(0.5).cpu(), torch.tensor(3.5))


def test_the_report_names_the_lines(device_log: DeviceLog) -> None:
    float(ramp(3).to(DEVICE).sum())
    assert LOG is device_log
    report = device_log.report()
    assert "Counts(launches=1, waits=1, to_device=1, to_host=0)" in report
    assert "in test_the_report_names_the_lines" in report
