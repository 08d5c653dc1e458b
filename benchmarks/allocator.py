"""Time and peak memory of training steps on a CPU with freed memory reused.

The baseline is glibc's defaults.

    python benchmarks/allocator.py [--csv results/allocator.csv]

Every row is the median of three pairs of child processes, in turn: user and system time, page faults, and peak
resident memory of 15 steps of a ConvNet-3 at 32 px, and of encoding as much with the codec of the CIFAR-10 prior. The
time should be at most that of the defaults.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch

STEPS = 15
BATCH = 256
ROOT = Path(__file__).parents[1]


def child(work: str, keep: bool) -> None:
    """Do the work once to warm up and `STEPS` times, then print what it took."""
    from dq.core.memory import keep_freed_memory
    from dq.networks.zoo import make_net

    torch.set_num_threads(1)
    if keep and not keep_freed_memory():
        sys.exit("this system has no mallopt, or the environment sets its thresholds")
    torch.manual_seed(0)
    x = torch.rand(BATCH, 3, 32, 32)
    if work == "encode":
        from diffusers import AutoencoderTiny

        codec = AutoencoderTiny.from_pretrained(ROOT / "checkpoints" / "cifar10" / "vae").eval()

        def step() -> None:
            with torch.no_grad():
                codec.encode(x)

    else:
        net = make_net(work, 10, 32, seed=0)

        def step() -> None:
            torch.nn.functional.cross_entropy(net(x), torch.zeros(BATCH, dtype=torch.int64)).backward()

    step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(STEPS):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "user_s": after.ru_utime - before.ru_utime,
                "system_s": after.ru_stime - before.ru_stime,
                "faults": after.ru_minflt - before.ru_minflt,
                "peak_mb": after.ru_maxrss / 1024,
            }
        )
    )


def measure(work: str) -> dict[str, object]:
    """Medians of three pairs of processes, and the ratios of kept to default."""
    runs: dict[str, list[dict[str, float]]] = {"default": [], "kept": []}
    for _ in range(3):
        for name, results in runs.items():
            command = [sys.executable, __file__, "--child", work, *["--keep"] * (name == "kept")]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    row: dict[str, object] = {"work": work, "batch": BATCH, "torch": torch.__version__, "system": platform.platform()}
    medians = {n: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for n, rs in runs.items()}
    for name, values in medians.items():
        row |= {f"{k}_{name}": round(v, 2) for k, v in values.items()}
    total = {n: v["user_s"] + v["system_s"] for n, v in medians.items()}
    row["time_ratio"] = round(total["default"] / total["kept"], 2)
    row["memory_ratio"] = round(medians["kept"]["peak_mb"] / medians["default"]["peak_mb"], 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", choices=["convnet3w32", "encode"])
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.keep)
        return
    rows = [measure(work) for work in ("convnet3w32", "encode")]
    for row in rows:
        print(f"{row['work']}: defaults take {row['time_ratio']} x the time, kept {row['memory_ratio']} x the memory")
    if args.csv:
        with open(args.csv, "w", newline="") as f:
            f.write("# python benchmarks/allocator.py --csv results/allocator.csv\n")
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
