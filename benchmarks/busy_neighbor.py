"""A training step of a small DiT on an idle machine and beside a busy process.

OpenMP threads spin while they wait, or sleep (`OMP_WAIT_POLICY=passive`, as dq sets it).

    python benchmarks/busy_neighbor.py [--steps 6] [--rounds 3] [--threads N] [--csv FILE]

Every measurement is a process of its own, in turn within a round. Printed are medians over rounds and their ratios;
beside a busy process, spinning threads should take several times as long as sleeping ones. On the CPU alone.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
POLICIES = {"spinning": "active", "default": None, "passive": "passive"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="of OpenMP; default: all cores of this process")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure(args.steps))
        return
    from dq.core.devices import available_cores

    threads = args.threads or available_cores()
    measured: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for load in ("idle", "busy"):
            for name, policy in POLICIES.items():
                measured.setdefault((load, name), []).append(step(args.steps, policy, threads, busy=load == "busy"))
    rows = []
    for (load, name), seconds in measured.items():
        against = statistics.median(measured[(load, "passive")])
        middle = statistics.median(seconds)
        rows.append(
            {
                "machine": load,
                "waiting threads": name,
                "ms per step": round(1000 * middle),
                "least": round(1000 * min(seconds)),
                "most": round(1000 * max(seconds)),
                "times passive": round(middle / against, 2),
            }
        )
        print(", ".join(f"{k} {v}" for k, v in rows[-1].items()))
    if args.csv:
        with open(args.csv, "w", newline="") as f:
            f.write(f"# python benchmarks/busy_neighbor.py ({platform.machine()}, {threads} threads)\n")
            writer = csv.DictWriter(f, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def step(steps: int, policy: str | None, threads: int, *, busy: bool) -> float:
    """Seconds of a training step in a new process with an OpenMP wait policy."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    env |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    if policy is not None:
        env["OMP_WAIT_POLICY"] = policy
    neighbor = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        command = [sys.executable, __file__, "--measure", "--steps", str(steps)]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        if neighbor is not None:
            neighbor.kill()
            neighbor.wait()
    return float(done.stdout)


def measure(steps: int) -> float:
    """Median seconds of training steps of a DiT of 3 M parameters.

    A batch has 32 latents of 4 x 8 x 8.
    """
    import torch  # before dq, so that the policy is the one of the environment alone

    from dq.config.prior import PriorConfig, TrainDenoiserConfig
    from dq.diffusion.prior.denoiser_loss import DenoiserLoss
    from dq.diffusion.prior.train_denoiser import new_denoiser

    prior = PriorConfig(denoiser=TrainDenoiserConfig(size="3M"))
    objective = DenoiserLoss(new_denoiser(prior, (4, 8, 8), 10)).train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4, fused=True)
    g = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(32, 4, 8, 8, generator=g) for _ in range(2))
    level, labels = torch.rand(32, generator=g), torch.arange(32) % 10
    seconds = []
    for _ in range(steps + 2):  # the first two warm up
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        objective(latents=z, noise=noise, level=level, labels=labels)["loss"].mean().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
