"""FRePo's meta-step in chunks, in one pass, and as a plain loop.

    python benchmarks/frepo.py [--sizes 10 100 500] [--real 256] [--rounds 5] [--csv results/frepo_step.csv]

A meta-step computes the features of a real batch without a graph, the regression, and the gradient of the distilled
images and labels. With chunks the images pass the network twice forward and once backward, in one pass once forward:
4/3 of the time if a pass back costs two passes forward. It does not: networks get no gradients of weights here, so
that a pass back costs one, and chunks cost 3/2 of the gradient's part in theory and (B + 3n) / (B + 2n) of a step with
B real images. Both are reported. Memory is the bytes that autograd saves for the pass back (`saved_tensors_hooks`),
each storage once, without parameters: of the network alone, and of all, features of the real batch included, which
chunks leave as they are. The plain loop is one function with `torch.linalg.solve` and autograd through all of
it, in float32 up to the features and float64 after them, as the package has it.

Everything is measured in turns within rounds, in seconds of the processor (a busy machine interrupts), and ratios are
medians over the rounds.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq.data.regression_labels import centered_targets, first_labels
from dq.networks.online_pool import OnlinePool, PoolSettings
from dq.refine.ridge import RIDGE, MetaGradient, Objective, meta_gradient


class PlainConv(nn.Module):
    """FRePo's ConvNet of depth 3, without its head."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        sizes = (3, width, 2 * width, 4 * width)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm2d(a) for a in sizes[1:-1])

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            if i:
                x = self.norms[i - 1](x)
            x = F.avg_pool2d(F.relu(conv(x)), 2)
        return x.flatten(1)


def plain_step(net: nn.Module, images: Tensor, labels: Tensor, x_real: Tensor, y_real: Tensor):
    """Loss and gradients of a meta-step."""
    x, y = images.clone().requires_grad_(), labels.clone().requires_grad_()
    with torch.no_grad():
        f_real = net(x_real).double()
    f = net(x).double()
    k = f @ f.T
    k = k + RIDGE * k.trace() / len(k) * torch.eye(len(k), dtype=k.dtype)
    prediction = f_real @ f.T @ torch.linalg.solve(k, y.double())
    krr = 0.5 * (prediction - y_real).square().sum(1).mean()
    top = y.topk(2, 1).values
    margin = (top[:, 0] - top[:, 1]).clamp(max=1 / y.shape[1]).mean()
    dx, dy = torch.autograd.grad(krr - margin, [x, y])
    return krr.detach(), dx, dy


def saved_bytes(call: Callable[[], object], without: set[int]) -> int:
    """The most bytes that autograd holds for passes back during a call, each storage once.

    Args:
        call: the function that saves tensors.
        without: addresses of storages that are there anyway.
    """
    held: dict[int, int] = {}
    counts: dict[int, int] = {}
    now = peak = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, peak
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.key = storage.data_ptr()
            if self.key not in without:
                counts[self.key] = counts.get(self.key, 0) + 1
                if counts[self.key] == 1:
                    held[self.key] = storage.nbytes()
                    now += storage.nbytes()
                    peak = max(peak, now)

        def __del__(self) -> None:
            nonlocal now
            if self.key not in without:
                counts[self.key] -= 1
                if counts[self.key] == 0:
                    now -= held[self.key]

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        call()
    return peak


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 500])
    parser.add_argument("--real", type=int, default=1024, help="images of the real batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=8, help="into which the images are divided")
    parser.add_argument("--net", default="frepoconv3")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def difference(plain: tuple[Tensor, Tensor, Tensor], ours: MetaGradient) -> float:
    """Largest relative difference of loss and gradients."""
    krr, dx, dy = plain
    assert ours.images is not None
    gaps = [abs(float(krr) / float(ours.krr) - 1), float((dx - ours.images).norm() / ours.images.norm())]
    return max(*gaps, float((dy - ours.labels).norm() / ours.labels.norm()))


def ratio(seconds: dict[str, list[float]], above: tuple[str, ...], below: tuple[str, ...]) -> float:
    """Median over rounds of the ratio of two sums of parts of a step."""
    sums = [[sum(parts) for parts in zip(*(seconds[k] for k in keys), strict=True)] for keys in (above, below)]
    return round(statistics.median(a / b for a, b in zip(*sums, strict=True)), 3)


def measure(
    args: argparse.Namespace,
    n: int,
    pool: OnlinePool,
    plain: PlainConv,
    real: tuple[Tensor, Tensor],
    g: torch.Generator,
) -> dict[str, object]:
    """The row of a set of n images; `real` are whitened images and centered targets."""
    (x_real, y_real), net = real, pool.members[0].net
    images = 0.44 * torch.randn(n, 3, 32, 32, generator=g)
    labels = first_labels(centered_targets(torch.arange(n) % 10, 10))
    chunk = max(2, n // args.chunks)
    seconds: dict[str, list[float]] = {}
    with pool.features(0) as features:
        anyway = {p.untyped_storage().data_ptr() for p in (*net.parameters(), *net.buffers())}

        def real_features() -> Tensor:
            with torch.no_grad():
                return features(x_real)

        f_real = real_features()

        def gradient(size: int | None) -> MetaGradient:
            return meta_gradient(features, images, labels, f_real, y_real, Objective(chunk=size))

        calls: dict[str, Callable[[], object]] = {
            "real": real_features,
            "one pass": lambda: gradient(None),
            "chunks": lambda: gradient(chunk),
            "plain": lambda: plain_step(plain, images, labels, x_real, y_real),
        }
        result: dict[str, Any] = {name: call() for name, call in calls.items()}
        for _ in range(args.rounds):
            for name, call in calls.items():
                began = time.process_time()
                call()
                seconds.setdefault(name, []).append(time.process_time() - began)
        peak = {name: saved_bytes(calls[name], anyway) for name in ("one pass", "chunks")}
        network = [saved_bytes(lambda m=m: features(images[:m].requires_grad_()), anyway) for m in (n, chunk)]
    return {
        "n": n,
        "real_batch": args.real,
        "chunk": chunk,
        "net": args.net,
        "rounds": args.rounds,
        "real_s": round(statistics.median(seconds["real"]), 3),
        "one_pass_s": round(statistics.median(seconds["one pass"]), 3),
        "chunked_over_one_pass": ratio(seconds, ("chunks",), ("one pass",)),
        "chunked_step_over_one_pass_step": ratio(seconds, ("chunks", "real"), ("one pass", "real")),
        "saved_bytes_one_pass": peak["one pass"],
        "saved_bytes_chunked": peak["chunks"],
        "network_activation_ratio": round(network[1] / network[0], 4),
        "saved_bytes_ratio": round(peak["chunks"] / peak["one pass"], 4),
        "step_over_plain_step": ratio(seconds, ("one pass", "real"), ("plain",)),
        "largest_relative_difference": f"{difference(result['plain'], result['one pass']):.1e}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    args = arguments()
    pool = OnlinePool((args.net,), 10, 32, PoolSettings(size=1), seed=0)
    convolutions = (m for m in pool.members[0].net.modules() if isinstance(m, nn.Conv2d))
    plain = PlainConv(32 if args.net.endswith("w32") else 128).eval().requires_grad_(False)
    # batch norm of fresh networks is the same in both
    for a, b in zip(plain.convs, convolutions, strict=True):
        a.load_state_dict(b.state_dict())
    g = torch.Generator().manual_seed(0)
    x_real = 0.44 * torch.randn(args.real, 3, 32, 32, generator=g)  # as large as whitened images of CIFAR-10
    y_real = centered_targets(torch.randint(10, (args.real,), generator=g), 10)
    records = []
    for n in args.sizes:
        records.append(measure(args, n, pool, plain, (x_real, y_real), g))
        print(", ".join(f"{k} {v}" for k, v in records[-1].items()), flush=True)
        if args.csv:
            with open(args.csv, "w", newline="") as f:
                writer = csv.DictWriter(f, fieldnames=list(records[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(records)
    if any(float(str(r["largest_relative_difference"])) > 1e-3 for r in records):
        sys.exit("the losses or gradients differ from those of the plain loop by more than rounding")


if __name__ == "__main__":
    main()
