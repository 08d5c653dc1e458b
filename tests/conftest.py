"""Millimetre-sized models and data, made in code; nothing is downloaded."""

from __future__ import annotations

import os
import socket
import sys
from types import SimpleNamespace

# before any library reads them
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

import pytest
import torch

torch.set_num_threads(1)  # tiny models: a second thread costs more than it gives


def free_port() -> str:
    """A port that nothing listens on, for a launcher; suites that run side by side must not share one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def torchrun(processes: int = 2) -> list[str]:
    """The beginning of a command line that starts so many processes of what follows."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [*launcher, "--master_port", free_port()]


def tiny_kl(latent_channels: int = 4, seed: int = 0, **config):
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=latent_channels,
            norm_num_groups=4,
            layers_per_block=1,
            **config,
        ).eval()


def tiny_dit(
    classes: int = 3, in_channels: int = 4, out_channels: int | None = None, sample_size: int = 4, seed: int = 0
):
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=in_channels,
            out_channels=out_channels or in_channels,
            num_layers=2,
            sample_size=sample_size,
            patch_size=2,
            num_embeds_ada_norm=classes,
        ).eval()
        # the output layer of a fresh DiT need not depend on class or time; make it so
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        return model


def toy_splits():
    """Three classes of 8 px images that differ in colour, 9 + 8 + 7 train and 4 test images each."""
    g = torch.Generator().manual_seed(0)

    def make(counts: list[int]):
        images, labels = [], []
        for c, n in enumerate(counts):
            base = torch.zeros(3, 1, 1)
            base[c] = 0.7
            images.append((base + 0.3 * torch.rand(n, 3, 8, 8, generator=g)).clamp(0, 1))
            labels += [c] * n
        return torch.cat(images), torch.tensor(labels)

    return {"train": make([9, 8, 7]), "test": make([4, 4, 4])}


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

    folder = tmp_path_factory.mktemp("made")
    prior = prior_in(folder / "prior")
    before = torch.get_rng_state()
    vae = train_codec(toy_source, CODEC, prior, accelerator=accelerator)
    codec = load_codec(vae)
    cache = encoded(toy_source, folder / "cache", codec)
    assert train_denoiser(cache, codec, prior, class_names=NAMES, accelerator=accelerator) == folder / "prior"
    assert torch.equal(before, torch.get_rng_state())  # nothing drew from the global generator
    return SimpleNamespace(folder=folder / "prior", prior=prior, vae=vae, codec=codec, cache=cache)
