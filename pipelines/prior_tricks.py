"""Options of denoiser training at equal CPU time, each against a base.

    python pipelines/prior_tricks.py --config configs/fashion_prior.yaml --data DIR --seconds 240 \\
        --csv results/prior_tricks.csv --set codec.path=DIR teachers.0.path=DIR

Two short trainings give the CPU seconds of a step of a variant, and these the number of steps that fit into
`--seconds`. Then `dq train-denoiser` and `dq prior-report` run as anywhere, on one thread, and one row per variant is
written. The same command continues. Fashion-MNIST on one core: about seven minutes a variant.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from collect_results import command_line

from dq.core.errors import InputError, RunError
from dq.core.files import read_json, write_json, write_text
from dq.evaluation.results import to_csv

BASE = {"patch_size": 2, "lr": 0.0005, "compile": "false", "optimizer": "adamw", "contrastive": 0, "time_shift": 1,
        "intermediate_head": 0, "early": 0, "warmup_steps": 100}  # fmt: skip
# changes of the training, changes of its sampling
VARIANTS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "base": ({}, {}),
    "contrastive": ({"contrastive": 0.05}, {}),
    "rate 0.002": ({"lr": 0.002}, {}),
    "muon": ({"optimizer": "muon"}, {}),
    "muon, rate 0.002": ({"optimizer": "muon", "lr": 0.002}, {}),
    "time shift": ({"time_shift": "auto"}, {}),
    "head": ({"intermediate_head": 0.5}, {}),
    "head, internal guidance": ({"intermediate_head": 0.5}, {"internal_guidance": 1.5}),
    "patch 1": ({"patch_size": 1}, {}),
    "muon, patch 1": ({"optimizer": "muon", "patch_size": 1}, {}),
}
MEASURES = ("accuracy", "frechet", "coverage")


def dq(verb: str, args: argparse.Namespace, settings: dict[str, object]) -> float:
    """Run a verb of `dq`; CPU seconds that it took."""
    command = [sys.executable, "-m", "dq.cli", verb, "--config", args.config, "--data", args.data, "--set", *args.set]
    command += [f"{k}={v}" for k, v in settings.items()]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(done.returncode)  # dq has said why
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def seconds_per_step(steps: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds of a step by the difference of two trainings.

    Raises:
        InputError: if the longer one took no more time.
    """
    if seconds[1] <= seconds[0]:
        raise InputError(
            f"trainings of {steps[0]} and {steps[1]} steps took {seconds[0]:.2f} and {seconds[1]:.2f} s, which "
            "gives no time of a step; give more steps as --calibration"
        )
    return (seconds[1] - seconds[0]) / (steps[1] - steps[0])


def trained(args: argparse.Namespace, training: dict[str, object]) -> tuple[Path, float]:
    """Folder of the prior of these settings, and CPU seconds of one step.

    It is trained for `args.seconds`.
    """
    name = "-".join(f"{k}={v}" for k, v in training.items()) or "base"
    folder, record = args.work / name, args.work / f"{name}.json"
    settings = {f"prior.denoiser.{k}": v for k, v in (BASE | training).items()}
    if not record.is_file():
        seconds = []
        for steps in args.calibration:
            probe = args.work / "probe"
            shutil.rmtree(probe, ignore_errors=True)  # also one that was broken off, whose rest would be too fast
            changes = {"prior.output_dir": probe, "prior.denoiser.steps": steps}
            seconds.append(dq("train-denoiser", args, settings | changes))
        write_json(record, seconds_per_step(args.calibration, seconds))
    step = float(read_json(record))
    steps = round(args.seconds / step)
    if not steps:
        raise InputError(f"a step of {name} takes {step:.3g} s, more than --seconds {args.seconds:g}; give more")
    changes = {"prior.output_dir": folder, "prior.denoiser.steps": steps, "prior.denoiser.save_every": steps}
    dq("train-denoiser", args, settings | changes)
    return folder, step


def measured(args: argparse.Namespace, name: str) -> dict[str, object]:
    """The row of a variant."""
    training, sampling = VARIANTS[name]
    folder, step = trained(args, training)
    report = args.work / f"report {name}"
    settings: dict[str, object] = {f"generate.{k}": v for k, v in sampling.items()}
    settings |= {"generate.model": folder, "output_dir": report, "prior_report.guidance": "[1, 2]"}
    settings |= {"prior_report.num_inference_steps": args.steps, "prior_report.data": "''"}
    dq("prior-report", args, settings)
    record = read_json(folder / "transformer" / "training.json")
    row: dict[str, object] = {"variant": name, "cpu_s": args.seconds, "s_per_step": round(step, 4)}
    row |= {"steps": record["settings"]["steps"], "held_out_loss": round(record["held_out_loss"], 4)}
    row["changes"] = " ".join(f"{k}={v}" for k, v in (training | sampling).items())
    with (report / "prior_quality.csv").open() as f:
        for r in csv.DictReader(f):
            if r["guidance"]:
                row |= {f"{m}_{float(r['guidance']):g}": float(r[m]) for m in MEASURES}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seconds", type=float, default=240, help="CPU time of every training")
    parser.add_argument("--steps", type=int, default=15, help="of sampling")
    parser.add_argument(
        "--calibration",
        type=int,
        nargs=2,
        default=[5, 25],
        metavar="STEPS",
        help="lengths of the two trainings by whose difference a step is timed (default: 5 25)",
    )
    parser.add_argument("--work", type=Path, default=Path("runs/prior-tricks"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--csv", type=Path, default=Path("results/prior_tricks.csv"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings for dq")
    args = parser.parse_args()
    if not 0 < args.calibration[0] < args.calibration[1]:
        parser.error(f"--calibration needs two rising numbers of steps, not {' '.join(map(str, args.calibration))}")
    # latents are encoded before anything is timed
    dq("train-denoiser", args, {"prior.output_dir": args.work / "encoded", "prior.denoiser.steps": 1})
    rows = []
    for name in args.variants:
        rows.append(measured(args, name))
        write_text(args.csv, f"{command_line(__file__)}\n" + to_csv(rows))
        print(rows[-1], flush=True)


if __name__ == "__main__":
    try:
        main()
    except (InputError, RunError) as e:
        sys.exit(f"prior_tricks: {e}")
