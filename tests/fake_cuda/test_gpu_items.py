"""The items of `pipelines/gpu_session.py` on the fake device: they use the device, and mix nothing up."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_cuda.device_log import DeviceLog

PIPELINES = Path(__file__).parents[2] / "pipelines"
# start processes, which have no such device, or read what it does not have
ELSEWHERE = ("gpu_tests", "verbs", "estimates", "students_side_by_side", "profile_train", "profile_draw", "memory")
QUICK = ("ceilings", "kmeans", "patches")
sys.path.insert(0, str(PIPELINES))
from gpu_session import CEILINGS, ITEMS  # noqa: E402


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(i, id=i.name, marks=[] if i.name in QUICK else [pytest.mark.slow])
        for i in (CEILINGS, *ITEMS)
        if i.name not in ELSEWHERE
    ],
)
def test_an_item_works_on_the_device(item: Any, device_log: DeviceLog, tmp_path: Path) -> None:
    from gpu_measure import Session

    ceilings = dict.fromkeys(("copy", "gemm_float32", "gemm_tf32", "gemm_bf16", "conv_tf32", "conv_bf16"), 1e9)
    session = Session(torch.device("cuda"), True, tmp_path, item.name, ceilings=ceilings)
    getattr(importlib.import_module(item.module), item.name)(session)
    assert device_log.counts().launches > 20, "it did not work on the device"
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert {r["card"] for r in rows} == {"Fake CUDA"}
    for row in rows:
        for what, gap in row.get("parity", {}).items():
            assert gap < (0.05 if "bfloat16" in what else 1e-4), what
