"""Copies to a device: many tensors by one copy for each dtype."""

from __future__ import annotations

import torch

from dq.core.transfer import to_device, to_device_together

META = torch.device("meta")


def tensors() -> list[torch.Tensor]:
    return [torch.ones(2, 3), torch.arange(4), torch.rand(1, 5).expand(2, -1), torch.zeros(0, dtype=torch.bool)]


def test_on_the_cpu_tensors_are_the_same_objects() -> None:
    given = tensors()
    assert all(a is b for a, b in zip(to_device_together(given, torch.device("cpu")), given, strict=True))
    assert to_device(given[0], torch.device("cpu")) is given[0]


def test_shapes_and_dtypes_stay_and_one_dtype_shares_memory() -> None:
    given = tensors()
    moved = to_device_together(given, META)
    assert [(t.shape, t.dtype, t.device.type) for t in moved] == [(t.shape, t.dtype, "meta") for t in given]
    assert moved[0]._base is moved[2]._base is not None
    assert moved[1]._base is not moved[0]._base
