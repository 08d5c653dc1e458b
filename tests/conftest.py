"""Millimetre-sized models and data, made in code; nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

# before any library reads them
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

import filelock
import hypothesis
import pytest
import torch
from models import toy_splits
from toy_world import make_world

from dq.core import devices

# the same examples in every run; pytest --hypothesis-profile=default draws others
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=150,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # the machine may be busy
)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fake-cuda", action="store_true", help="run on a CUDA device that is not there, see tests/fake_cuda"
    )
    parser.addoption("--device-report", type=int, metavar="N", help="with --fake-cuda: print the N lines that do most")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--fake-cuda"):
        return
    from fake_cuda.build import missing
    from fake_cuda.install import install

    if missing():
        raise pytest.UsageError(missing())
    install()  # before test modules are imported, which ask whether there is a device


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device, real or fake."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; run with: make test-gpu"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    top = config.getoption("--device-report")
    if top and config.getoption("--fake-cuda"):
        from fake_cuda.tensor import LOG

        terminalreporter.write_line(LOG.report(top))


torch.set_num_threads(1)  # tiny models: a second thread costs more than it gives
# the same numbers on every CPU: `dtype: auto` is float32 in the tests, also where bfloat16 is native
devices.CPU_BFLOAT16 = ()


@pytest.fixture(scope="session")
def toy_images():
    return toy_splits()


@pytest.fixture(scope="session")
def toy_source(toy_images):
    from dq.data.load import load_source

    return load_source(toy_images, class_names=["red", "green", "blue"])


@pytest.fixture(scope="session")
def accelerator():
    from dq.core.processes import make_accelerator

    return make_accelerator(cpu=True)


@pytest.fixture(scope="session")
def made(toy_source, accelerator, tmp_path_factory):
    """A prior trained without interruption, and what it was made from."""
    from small_prior import CODEC, NAMES, encoded, prior_in

    from dq.diffusion.codec import load_codec
    from dq.diffusion.prior.train_codec import train_codec
    from dq.diffusion.prior.train_denoiser import train_denoiser

    # workers of xdist share one: the second finds a finished training
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made"
    prior = prior_in(folder / "prior")
    before = torch.get_rng_state()
    with filelock.FileLock(f"{folder}.lock"):
        vae = train_codec(toy_source, CODEC, prior, accelerator=accelerator)
        codec = load_codec(vae)
        cache = encoded(toy_source, folder / "cache", codec)
        assert train_denoiser(cache, codec, prior, class_names=NAMES, accelerator=accelerator) == folder / "prior"
    assert torch.equal(before, torch.get_rng_state())  # nothing drew from the global generator
    return SimpleNamespace(folder=folder / "prior", prior=prior, vae=vae, codec=codec, cache=cache)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images by class, a codec, a DiT pipeline and trained teachers; tests may add files beside."""
    return make_world(tmp_path_factory.mktemp("world"))
