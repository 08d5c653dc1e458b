"""Quality of a prior's samples against the number of steps, by `dq prior-report`.

    python pipelines/sampling_steps.py --config configs/fashion_prior.yaml --data DIR --teacher DIR \\
        --prior checkpoints/fashion-mnist --csv results/sampling_steps.csv

Noise and seeds are the same for every number of steps, so that rows differ by the sampler alone. The same command
continues.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

from collect_results import command_line

from dq.core.errors import InputError, RunError
from dq.core.files import suggest_folder, write_text
from dq.evaluation.results import to_csv

MEASURES = ("accuracy", "frechet", "kernel", "density", "coverage")


def report(args: argparse.Namespace, prior: Path, steps: int) -> list[dict[str, object]]:
    """Rows of the samples of a number of steps, and of what they are compared with."""
    folder = args.work / f"steps-{steps}"
    settings: dict[str, object] = {
        "output_dir": folder,
        "cache_dir": args.work / "cache",
        "codec.path": prior / "vae",
        "generate.model": prior,
        "teachers": f"[{{net: {args.net}, path: {args.teacher}}}]",
        "prior_report.num_inference_steps": steps,
        "prior_report.per_class": args.per_class,
        "prior_report.guidance": f"[{args.guidance:g}]",
        **{f"prior_report.{name}": "''" for name in ("data", "license", "command")},
    }
    command = [sys.executable, "-m", "dq.cli", "prior-report", "--config", args.config, "--data", args.data, "--set"]
    command += [f"{k}={v}" for k, v in settings.items()]
    done = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(done.returncode)  # dq has said why
    with (folder / "prior_quality.csv").open() as f:
        records = list(csv.DictReader(f))
    rows: list[dict[str, object]] = []
    for r in records:
        if r["row"] in ("real train", "codec") or r["guidance"]:
            calls = steps * (2 if args.guidance > 1 else 1) if r["guidance"] else ""
            name = {"row": r["row"], "steps": steps if r["guidance"] else "", "model_calls": calls}
            facts = {k: r[k] for k in ("images", "scheduler", "teacher", "guidance")}
            rows.append({**name, **{m: float(r[m]) for m in MEASURES}, **facts})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--prior", type=Path, required=True)
    parser.add_argument("--teacher", required=True, help="folder of the network that gives the features")
    parser.add_argument("--net", default="convnet3w32-bn", help="its name")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 15, 20])
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--per_class", type=int, default=50)
    parser.add_argument("--work", type=Path, default=Path("runs/sampling-steps"))
    parser.add_argument("--csv", type=Path, default=Path("results/sampling_steps.csv"))
    args = parser.parse_args()
    if not args.prior.is_dir():
        raise InputError(
            f"there is no folder {args.prior}{suggest_folder(args.prior)}; give that of a prior as --prior"
        )
    prior = args.work / "prior"  # a copy, since a report is also written into the prior's folder
    shutil.copytree(args.prior, prior, dirs_exist_ok=True)
    rows: list[dict[str, object]] = []
    for steps in args.steps:
        new = report(args, prior, steps)
        rows += new if not rows else [r for r in new if r["steps"]]
        write_text(args.csv, f"{command_line(__file__)}\n" + to_csv(rows))
        print(rows[-1], flush=True)


if __name__ == "__main__":
    try:
        main()
    except (InputError, RunError) as e:
        sys.exit(f"sampling_steps: {e}")
