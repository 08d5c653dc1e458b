"""Lazy against plain greedy facility location: seconds and their ratio, picks compared, in one run.

    python benchmarks/facility.py [--ipc 50] [--rounds 3] [--csv results/facility.csv]

Features are rectified Gaussian mixtures of 40 modes, at the sizes of a CIFAR class and of ten of them. Plain greedy
evaluation computes the gain of every candidate at every pick from the same matrix of similarities. Both include the
normalization and the matrix; they take turns within rounds, in seconds of the processor (a busy machine interrupts),
and numbers are medians over the rounds.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dq.core.progress import progress
from dq.data.coresets import facility_location, facility_rows

SIZES = [(5000, 64), (5000, 512), (1300, 512)]  # images of a class and numbers of a feature
BLOCK = 512  # candidates whose gains plain evaluation computes at once


def mixture(n: int, d: int, modes: int = 40, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(modes, d, generator=g)
    return (centers[torch.randint(modes, (n,), generator=g)] + torch.randn(n, d, generator=g)).relu()


def plain_greedy(features: Tensor, k: int) -> np.ndarray:
    x = torch.nn.functional.normalize(features.double(), dim=1)
    similarity = (x @ x.T).clamp(min=0).float().numpy()
    cover, picks = np.zeros(len(x), np.float32), []
    for _ in range(k):
        blocks = np.array_split(similarity, -(-len(x) // BLOCK))
        gains = np.concatenate([np.maximum(rows - cover, 0).sum(1, dtype=np.float64) for rows in blocks])
        gains[picks] = -1
        picks.append(int(gains.argmax()))
        cover = np.maximum(cover, similarity[picks[-1]])
    return np.array(picks)


def timed(call) -> tuple[float, np.ndarray]:
    began = time.process_time()
    result = call()
    return time.process_time() - began, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ipc", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows = []
    for n, d in progress(SIZES, desc="facility", unit="size"):
        x = mixture(n, d)
        lazy, plain, equal = [], [], True
        for _ in range(args.rounds):
            seconds, picks = timed(lambda x=x: facility_location(x, args.ipc))
            lazy.append(seconds)
            seconds, reference = timed(lambda x=x: plain_greedy(x, args.ipc))
            plain.append(seconds)
            equal = equal and np.array_equal(picks, reference)
        a, b = statistics.median(lazy), statistics.median(plain)
        rows.append([f"class {n}x{d}", args.ipc, f"{a:.3f}", f"{b:.3f}", f"{a / b:.3f}", equal, args.rounds])
    x, labels = torch.cat([mixture(5000, 64, seed=s) for s in range(10)]), np.repeat(np.arange(10), 5000)
    whole = [timed(lambda: facility_rows(x, labels, args.ipc))[0] for _ in range(args.rounds)]
    rows.append(["10 classes 5000x64", args.ipc, f"{statistics.median(whole):.3f}", "", "", "", args.rounds])
    head = ["data", "ipc", "lazy_seconds", "plain_seconds", "ratio", "equal_picks", "rounds"]
    if args.csv:
        with open(args.csv, "w", newline="") as f:
            threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
            options = " ".join(sys.argv[1:])
            machine = f"{platform.machine()}, {threads}, torch {torch.__version__}"
            f.write(f"# OMP_NUM_THREADS=1 python benchmarks/facility.py {options}  ({machine})\n")
            csv.writer(f, lineterminator="\n").writerows([head, *rows])
    csv.writer(sys.stdout).writerows([head, *rows])


if __name__ == "__main__":
    main()
