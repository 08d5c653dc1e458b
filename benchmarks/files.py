"""What fast checksums and threads give where files are checked and sets are written.

    python benchmarks/files.py [--csv results/files.csv]

Every ratio is the time of the first way over that of the second, the median over rounds in which both take turns:
BLAKE2 against XXH3 of 64 MB; PNG files of noise in one thread against all cores, coded and decoded; exact transport of
16 problems in one thread against all cores. Other work on the machine makes ratios of threads less.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from dq.cluster.transport import uniform_w2
from dq.core.devices import cores_per_process
from dq.core.files import _checksum, _integrity, write_text
from dq.core.threads import thread_map
from dq.distilled.parquet import _pixels, _png
from dq.evaluation.results import to_csv


def ways() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Pairs of functions that do the same work."""
    g = torch.Generator().manual_seed(0)
    tensors = {"latents": torch.randn(2**24, generator=g)}
    images = torch.randint(0, 256, (64, 3, 128, 128), dtype=torch.uint8, generator=g)
    cells = [{"bytes": _png(image)} for image in images]
    problems = [(torch.randn(1300, 16, generator=g), torch.randn(50, 16, generator=g)) for _ in range(16)]

    def mapped(function: Callable[..., object], items: Iterable[Any], threads: int | None) -> Callable[[], object]:
        return lambda: list(thread_map(function, items, threads=threads))

    return {
        "checksum": (lambda: _checksum(tensors, {}), lambda: _integrity(tensors, {})),
        "PNG coded": (mapped(_png, images, 1), mapped(_png, images, None)),
        "PNG decoded": (mapped(_pixels, cells, 1), mapped(_pixels, cells, None)),
        "exact transport": (
            mapped(lambda p: uniform_w2(*p), problems, 1),
            mapped(lambda p: uniform_w2(*p), problems, None),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, pair in ways().items():
        ratios = []
        for _ in range(args.rounds + 1):  # the first round warms up
            seconds = []
            for work in pair:
                began = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - began)
            ratios.append(seconds[0] / seconds[1])
        low, high = min(ratios[1:]), max(ratios[1:])
        row = {"work": name, "ratio": round(statistics.median(ratios[1:]), 2), "least": round(low, 2)}
        rows.append({**row, "largest": round(high, 2), "rounds": args.rounds})
        print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if args.csv:
        head = f"# python {' '.join(sys.argv)}  ({platform.machine()}, {cores_per_process()} cores)\n"
        write_text(args.csv, head + to_csv(rows))


if __name__ == "__main__":
    main()
