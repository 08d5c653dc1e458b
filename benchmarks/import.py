"""Time of `import dq` against `import torch` alone, in fresh interpreters.

    python benchmarks/import.py

Prints the medians and their ratio, which should stay below 0.2.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def seconds(module: str, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        times.append(time.perf_counter() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    seconds("torch", 1)  # fill the disk cache
    torch_times, dq_times = [], []
    for _ in range(7):  # taken in turn, so that a busy moment hits both
        torch_times += seconds("torch", 1)
        dq_times += seconds("dq", 1)
    a, b = statistics.median(torch_times), statistics.median(dq_times)
    print(f"import torch {a:.2f} s, import dq {b:.2f} s, ratio {b / a:.2f}")


if __name__ == "__main__":
    main()
