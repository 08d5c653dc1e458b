"""Tests of device code, on the CUDA device that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cuda.build import missing

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def on_fake_device(*arguments: str) -> None:
    """Run tests in a process of their own: the device cannot be taken back."""
    command = [sys.executable, "-m", "pytest", "--fake-cuda", "-q", "-p", "no:randomly", "-p", "no:xdist", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all("needs a real GPU" in line for line in skipped), skipped


@pytest.mark.slow
def test_device_code_on_the_fake_device() -> None:
    on_fake_device("-m", "gpu and not slow", "tests/fake_cuda")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_verb_on_the_fake_device() -> None:
    on_fake_device("-m", "gpu and slow", "tests/fake_cuda")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_tests_for_a_gpu_on_the_fake_device() -> None:
    others = {str(p) for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text()} - {__file__}
    assert len(others) >= 3
    on_fake_device("-m", "gpu", *sorted(others))
