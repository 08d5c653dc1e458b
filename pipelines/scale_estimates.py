"""Estimates of docs/how-to/many-machines.md from measured speeds, and their check against a run.

    dq run --config configs/cifar10_scale.yaml --ipc 10,50 --data DIR --dry-run --save_speeds FILE
    python pipelines/scale_estimates.py --config configs/cifar10_scale.yaml --speeds FILE
    python pipelines/scale_estimates.py --config FILE --speeds FILE --data DIR --run DIR     # the check, of that run

The first form writes results/scale/estimates.csv for sets and numbers of processes; the second writes the stages of a
finished run, whose latents were not in the cache before, to results/scale/estimate_check.csv. `--csv` names another
file.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from dq.config.overrides import apply_settings
from dq.config.schema import RunConfig, load_config
from dq.core.errors import InputError, RunError
from dq.core.files import read_jsonl
from dq.data.load import load_source
from dq.run.planning.costs import seconds_of
from dq.run.planning.plan import like_source
from dq.run.planning.timings import Speeds, planned_stages

RESULTS = Path(__file__).parents[1] / "results" / "scale"
CASES = (("cifar10", 10), ("imagenet-1k", 10), ("imagenet-1k", 50), ("imagenet-21k", 10))
PROCESSES = (1, 16, 128)


def estimates(config: RunConfig, speeds: Speeds) -> list[dict[str, object]]:
    rows = []
    overlap = bool(speeds.facts.get("overlap"))
    for name, ipc in CASES:
        source = like_source(name)
        for processes in PROCESSES:
            for p in planned_stages(apply_settings(config, {"ipc": [ipc]}), source, speeds, processes):
                seconds = seconds_of(p, speeds.seconds, overlap=overlap)
                row = {"set": name, "ipc": ipc, "processes": processes, "stage": p.stage, "units": p.units}
                rows.append(
                    row | {"seconds": "" if seconds is None else round(seconds, 1), "bytes": round(p.bytes or 0)}
                )
    return rows


def check(config: RunConfig, speeds: Speeds, run: Path) -> list[dict[str, object]]:
    """Seconds of the stages of a run beside their estimates.

    Label and assemble are one stage here.
    """
    if not (run / "metrics.jsonl").is_file():
        raise InputError(f"there is no {run / 'metrics.jsonl'}; give the folder of a finished run as --run")
    source = load_source(config.source)
    events = read_jsonl(run / "metrics.jsonl")
    names = {"features": "cluster"}
    took: dict[str, float] = {}
    for e in events:
        if "seconds" in e:
            stage = names.get(e["stage"], e["stage"])
            took[stage] = took.get(stage, 0.0) + e["seconds"]
    rows = []
    for p in planned_stages(config, source, speeds, 1):
        seconds = seconds_of(p, speeds.seconds, overlap=bool(speeds.facts.get("overlap")))
        if seconds is not None and p.stage in took:
            ratio = took[p.stage] / seconds if seconds else ""
            row = {"set": Path(config.source.path).name, "stage": p.stage, "units": p.units}
            rows.append(row | {"estimated_s": round(seconds, 1), "took_s": round(took[p.stage], 1)})
            rows[-1]["took_by_estimated"] = round(ratio, 2) if ratio else ""
    if not rows:
        raise InputError(f"no stage of the run {run} has both an estimate and a time; give the speeds of its config")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--speeds", required=True)
    parser.add_argument("--data")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    parser.add_argument("--csv", type=Path, help="the file to write")
    args = parser.parse_args()
    settings = [*args.set, *([f"source.path={args.data}"] if args.data else [])]
    config, speeds = apply_settings(load_config(args.config), settings), Speeds.load(args.speeds)
    rows = check(config, speeds, args.run) if args.run else estimates(config, speeds)
    path = args.csv or RESULTS / ("estimate_check.csv" if args.run else "estimates.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(path)


if __name__ == "__main__":
    try:
        main()
    except (InputError, RunError) as e:
        sys.exit(f"scale_estimates: {e}")
