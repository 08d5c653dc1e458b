"""Faults planted in functions of dq are reported, with the line they are met at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_teachers import TinyNet, drawn, images_of, teacher_of
from torch import Tensor

from dq.config.refinement import FADRM
from dq.refine import fadrm, optimize
from dq.refine.method import Batch
from fake_cuda.device_log import WAIT, DeviceLog
from fake_cuda.rules import DeviceMixError

LABELS = torch.arange(4)
SETTINGS = FADRM(sizes=(16, 16), steps=(2, 2), lr=0.01, batch_size=4, jitter=2)


def refine() -> Any:
    teacher = teacher_of(drawn(TinyNet()).to("cuda"))
    return fadrm.refine(Batch(images_of(LABELS, seed=5), LABELS), SETTINGS, [teacher])


def test_a_tensor_left_on_the_host_is_reported_where_it_meets_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    resample = optimize.resample

    def left_behind(x: Tensor, size: int) -> Tensor:
        return resample(x, size).cpu()

    monkeypatch.setattr(optimize, "resample", left_behind)
    with pytest.raises(
        DeviceMixError, match=r"same device: aten\.\w+\.\w+ got .*dq/refine/optimize\.py:\d+ in"
    ) as error:
        refine()
    assert "cpu (4, 3, 16, 16)" in str(error.value)
    assert "cuda (1, 3, 1, 1)" in str(error.value)


def test_a_sum_of_host_and_device_in_a_function_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    look = optimize.StepViews.apply
    monkeypatch.setattr(optimize.StepViews, "apply", lambda *args: look(*args) + torch.zeros(1, 3, 1, 1))
    with pytest.raises(
        DeviceMixError, match=r"aten\.add\.Tensor got cuda \(4, 3, 16, 16\), cpu \(1, 3, 1, 1\)"
    ) as error:
        refine()
    assert "dq/refine/optimize.py" in str(error.value)
    assert "in __call__" in str(error.value)


def test_a_wait_within_a_step_is_counted_at_its_line(monkeypatch: pytest.MonkeyPatch, device_log: DeviceLog) -> None:
    refine()
    before = device_log.counts().waits
    look = optimize.StepViews.apply

    def reading(views: Any, x: Tensor, step: int) -> Tensor:
        assert float(x.detach().mean()) < 100
        return look(views, x, step)

    monkeypatch.setattr(optimize.StepViews, "apply", reading)
    device_log.clear()
    refine()
    assert device_log.counts().waits - before == sum(SETTINGS.steps or ())
    assert any("dq/refine/optimize.py" in line and "__call__" in line for line in device_log.lines(WAIT))
