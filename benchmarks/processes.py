"""Throughput of several processes with one thread each against one process with one thread, on the same work.

    python benchmarks/processes.py [--processes 2] [--repeats 3] [--out results/processes.csv]

The work is that of `dq encode` and `dq generate` with the CIFAR-10 prior of the repository on scikit-learn's digits,
shown to the codec at 64 px. Times are those of the stages, without the start of the processes; one and several take
turns. With as many cores as processes the ratio should be near their number.
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


def measure(processes: int, ipc: int) -> dict[str, float]:
    """Seconds of each stage."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(settings(folder, ipc)))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
        start = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m", "dq.cli"]
        for verb in ("encode", "cluster", "generate"):
            command = [sys.executable, *start, verb, "--config", str(file), "--cpu", "--quiet"]
            subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        events = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {stage: next(e["seconds"] for e in events if e["stage"] == stage) for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ipc", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    runs = [(measure(1, args.ipc), measure(args.processes, args.ipc)) for _ in range(args.repeats)]
    units = {"encode": 1347, "generate": 10 * args.ipc}
    rows = []
    for stage in STAGES:
        ratios = [one[stage] / several[stage] for one, several in runs]
        row = {"stage": stage, "images": units[stage], "processes": args.processes, "repeats": args.repeats}
        row |= {"ratio": round(statistics.median(ratios), 3), "least": round(min(ratios), 3)}
        row |= {"largest": round(max(ratios), 3)}
        row |= {"images_per_s_one": round(units[stage] / statistics.median(one[stage] for one, _ in runs), 2)}
        row |= {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
        rows.append(row)
        print(f"{stage}: {row['ratio']} times the throughput ({row['least']} to {row['largest']})")
    if args.out:
        with open(args.out, "w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
