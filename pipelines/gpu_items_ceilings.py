"""What a card can do at most: products, convolutions, copies, launches, waits; and how fast its host decodes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from gpu_measure import Session, timed_in_turn
from PIL import Image

from dq.core.devices import available_cores, tf32_products
from dq.data.images import read_images
from dq.data.source import Split


def ceilings(s: Session) -> None:
    """FLOP/s and bytes/s of the card, microseconds of a launch and of a wait, images/s of decoding."""
    rates: dict[str, float] = {}
    for name, amount, call in [*_products(s), *_convolutions(s), *_copies(s)]:
        timing = timed_in_turn(s, {name: call})[name]
        rates[name] = amount / timing.facts["median_s"]
    launch, wait = _launch(s)
    numbers = {"us_per_launch": 1e6 * launch, "us_per_wait": 1e6 * wait, "host_cores": available_cores()}
    s.write("ceilings", ceilings=rates, numbers=numbers)
    s.write("decoding of JPEG on the host", numbers=dict(_decoding(s)))


Measured = Iterator[tuple[str, float, Callable[[], object]]]


def _products(s: Session) -> Measured:
    for name, dtype, side in (
        ("gemm_bf16", torch.bfloat16, s.size(8192, 64)),
        ("gemm_tf32", torch.float32, s.size(8192, 64)),
        ("gemm_float32", torch.float32, s.size(4096, 64)),
    ):
        a, b = (torch.randn(side, side).to(s.device, dtype) for _ in range(2))

        def product(a: torch.Tensor = a, b: torch.Tensor = b, tf32: bool = name == "gemm_tf32") -> None:
            if tf32:
                with tf32_products():
                    a @ b
            else:
                a @ b

        yield name, 2.0 * side**3, product


def _convolutions(s: Session) -> Measured:
    """3 x 3 of 256 channels at 56 px, as in the middle of a ResNet and of an autoencoder."""
    batch, channels, side = s.size((64, 256, 56), (1, 8, 8))
    flops = 2.0 * batch * side**2 * channels**2 * 9
    for name, dtype in (("conv_bf16", torch.bfloat16), ("conv_tf32", torch.float32)):
        x = torch.randn(batch, channels, side, side).to(s.device, dtype, memory_format=torch.channels_last)
        w = torch.randn(channels, channels, 3, 3).to(s.device, dtype, memory_format=torch.channels_last)
        yield name, flops, lambda x=x, w=w: F.conv2d(x, w, padding=1)


def _copies(s: Session) -> Measured:
    """Bytes read and written by a copy on the device, and bytes sent to it."""
    numbers = s.size(1 << 28, 1 << 10)
    x = torch.zeros(numbers, device=s.device)
    yield "copy", 8.0 * numbers, x.clone
    host = torch.zeros(numbers // 4)
    yield "pageable", float(numbers), lambda: host.to(s.device, copy=True)
    if s.device.type == "cuda":
        pinned = host.pin_memory()
        yield "pinned", float(numbers), lambda: pinned.to(s.device, non_blocking=True)


def _launch(s: Session) -> tuple[float, float]:
    """Seconds in which the host starts a small kernel, and in which it reads a number."""
    calls = s.size(2000, 20)
    x = torch.zeros(1, device=s.device)

    def launches() -> float:
        began = time.perf_counter()
        for _ in range(calls):
            x.add_(1)
        return (time.perf_counter() - began) / calls

    def waits() -> float:
        began = time.perf_counter()
        for _ in range(calls):
            x.add_(1).item()
        return (time.perf_counter() - began) / calls

    timings = timed_in_turn(s, {"launch": launches, "wait": waits})
    return timings["launch"].facts["median_s"], timings["wait"].facts["median_s"]


def _decoding(s: Session) -> Iterator[tuple[str, float]]:
    """Images per second of 500 x 375 px brought to 256 px, by threads."""
    noise = np.random.default_rng(s.seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(s.size((500, 375), (40, 30)), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    images = s.size(400, 8)
    split = Split(np.zeros(images, np.int64), lambda row: buffer.getvalue(), "train")
    side = s.size(256, 16)
    for threads in s.size((1, 2, 4, 8, 16), (1, 2)):
        calls = {"read": lambda n=threads: read_images(split, range(images), side, "crop", threads=n)}
        seconds = timed_in_turn(s, calls, repeats=1)["read"].facts["median_s"]
        yield f"images_per_s_of_{threads}_threads", images / seconds


if __name__ == "__main__":
    raise SystemExit("gpu_items_ceilings is a module of gpu_session.py; run that")
