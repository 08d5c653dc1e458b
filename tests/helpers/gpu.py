"""Marks of tests for a CUDA device, and the device in float32 without rounding to TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

FAKE = "Fake CUDA"  # name of the device of `tests/fake_cuda`


def is_real() -> bool:
    """Whether there is a CUDA device with kernels, memory and streams."""
    return torch.cuda.is_available() and torch.cuda.get_device_name() != FAKE


def needs_real_gpu(what: str) -> pytest.MarkDecorator:
    """Skip where the device is not there or the fake one, which lacks `what`."""
    return pytest.mark.skipif(not is_real(), reason=f"needs a real GPU for {what}; run with: make test-gpu")


@contextlib.contextmanager
def float32_convolutions() -> Iterator[None]:
    """Convolutions of float32 without TF32, which cuDNN uses by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
