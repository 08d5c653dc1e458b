"""Throughput of several processes of one thread each against one process.

    python benchmarks/processes.py [--processes 2] [--repeats 3] [--out results/processes.csv]

The work is that of `dq encode` and `dq generate` with the CIFAR-10 prior of the repository on scikit-learn's digits,
shown to the codec at 64 px. Times are those of the stages, without the start of the processes. Three things take
turns: one process; several that share the work; and as many runs of one process beside each other, which know nothing
of each other. These show what the machine has to give: cores that share memory, caches and clock are slower together.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).parents[1]
STAGES = ("encode", "generate")
DIGITS = 1347  # images of train


def settings(folder: Path, ipc: int) -> dict:
    prior = str(ROOT / "checkpoints" / "cifar10")
    digits = {str(i): str(i) for i in range(10)}
    walk = {"mode": "dit", "model": prior, "num_inference_steps": 25, "class_map": digits, "batch_size": 8}
    return {
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "source": {"path": "sklearn:digits", "preprocess": "squash"},
        "codec": {"path": prior, "resolution": 64},
        "generate": walk,
        "ipc": [ipc],
        "methods": {"ddoq": {}},
    }


def measure(processes: int, ipc: int, runs: int = 1) -> dict[str, float]:
    """Seconds of each stage; the mean of several runs at once in folders of their own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "dq.cli"]
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(i) for i in range(runs)]
        for folder in folders:
            folder.mkdir()
            (folder / "config.yaml").write_text(yaml.safe_dump(settings(folder, ipc)))
        for verb in ("encode", "cluster", "generate"):
            flags = ["--cpu", "--quiet"]
            commands = [[*torchrun, verb, "--config", str(folder / "config.yaml"), *flags] for folder in folders]
            started = [subprocess.Popen(c, env=env, stdout=subprocess.DEVNULL) for c in commands]
            codes = [p.wait() for p in started]
            if any(codes):
                sys.exit(f"`dq {verb}` failed; its message is above")
        records = [(folder / "run" / "metrics.jsonl").read_text().splitlines() for folder in folders]
        events = [json.loads(line) for lines in records for line in lines]
    return {stage: statistics.mean(e["seconds"] for e in events if e["stage"] == stage) for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ipc", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    n = args.processes
    turns = [(measure(1, args.ipc), measure(n, args.ipc), measure(1, args.ipc, n)) for _ in range(args.repeats)]
    units = {"encode": DIGITS, "generate": 10 * args.ipc}
    rows = []
    for stage in STAGES:
        ratios = [one[stage] / shared[stage] for one, shared, _ in turns]
        apart = [n * one[stage] / beside[stage] for one, _, beside in turns]
        row = {"stage": stage, "images": units[stage], "processes": n, "repeats": args.repeats}
        row |= {"ratio": round(statistics.median(ratios), 3), "least": round(min(ratios), 3)}
        row |= {"largest": round(max(ratios), 3), "unrelated_runs": round(statistics.median(apart), 3)}
        row |= {"images_per_s_one": round(units[stage] / statistics.median(one[stage] for one, _, _ in turns), 2)}
        row |= {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
        rows.append(row)
        print(
            f"{stage}: {row['ratio']} times the throughput ({row['least']} to {row['largest']}); "
            f"{n} unrelated runs beside each other {row['unrelated_runs']}"
        )
    if args.out:
        with open(args.out, "w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
