"""Tests that count what the device does need the fake one."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not config.getoption("--fake-cuda"):
                item.add_marker(pytest.mark.skip(reason="needs the fake device; run with: make test-fake-gpu"))


@pytest.fixture
def device_log():
    """Counters of the device, at zero."""
    from fake_cuda.tensor import LOG

    LOG.clear()
    return LOG
