"""Write the tables of docs/scale.md from the files in `results/scale/`.

    python pipelines/scale_table.py [--check]

Everything between `<!-- table NAME -->` and `<!-- end -->` is replaced. `--check` changes nothing and fails if the
page does not say what the files say. A file of speeds is made on the machine to plan for:

    dq run --config configs/scale.yaml --data PATH_TO_CIFAR10 --dry-run --save_speeds results/scale/speeds_NAME.json
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

from dq.config import RunConfig, load_config
from dq.estimate import seconds_of
from dq.evaluation.trainings import format_bytes
from dq.headway import duration
from dq.plan import like_source
from dq.settings import apply_settings
from dq.speeds import Speeds, planned_stages

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "scale"
PAGE = ROOT / "docs" / "scale.md"
SETS = (("cifar10", 10), ("imagenet-1k", 10), ("imagenet-1k", 50), ("imagenet-21k", 10))
PROCESSES = (1, 16)
STAGES = ("encode", "cluster", "generate")
WANTED = {"cpu": "CPU", "gpu": "GPU"}  # files of speeds: speeds_cpu.json, ...


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(r) + " |" for r in lines)


def planned(config: RunConfig, name: str, ipc: int, speeds: Speeds, processes: int) -> tuple[list[str], float]:
    """Durations of the stages and their sum, and bytes in all."""
    asked = apply_settings(config, {"ipc": [ipc], "evaluate.students": []})
    plans = planned_stages(asked, like_source(name), speeds, processes)
    overlap = bool(speeds.facts["overlap"])
    times = {p.stage: seconds_of(p, speeds.seconds, overlap=overlap) or 0.0 for p in plans}
    cells = [duration(times[stage]) for stage in STAGES]
    return [*cells, duration(sum(times.values()))], sum(p.bytes or 0.0 for p in plans)


def plans() -> str:
    config = load_config(ROOT / "configs" / "scale.yaml")
    rows = []
    for key, device in WANTED.items():
        file = RESULTS / f"speeds_{key}.json"
        speeds = Speeds.load(file) if file.is_file() else None
        on = device if speeds is None else f"{speeds.facts['device']}, {speeds.facts['threads']} thread(s)"
        for name, ipc in SETS:
            for processes in PROCESSES:
                first = [name, str(ipc), on, str(processes)]
                if speeds is None:
                    rows.append([*first, *["not measured"] * 5])
                else:
                    cells, size = planned(config, name, ipc, speeds, processes)
                    rows.append([*first, *cells, format_bytes(size)])
    return table(["set", "IPC", "device", "processes", *STAGES, "all", "disk"], rows)


def speeds() -> str:
    found = Speeds.load(RESULTS / "speeds_cpu.json")
    rows = [
        [name, f"{1000 * s.seconds:.3g}", f"{1000 * s.least:.3g} to {1000 * s.most:.3g}", str(s.batch)]
        for name, s in found.speeds.items()
    ]
    return table(["operation", "ms each", "of three repeats", "batch"], rows)


def check() -> str:
    with open(RESULTS / "estimate_check.csv", newline="") as f:
        rows = list(csv.DictReader(line for line in f if not line.startswith("#")))
    body = [[r["stage"], r["estimated_s"], r["measured_s"], r["ratio"]] for r in rows]
    return table(["stage", "estimated, s", "measured, s", "measured / estimated"], body)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page is not up to date")
    args = parser.parse_args()
    text = PAGE.read_text()
    made = {"plans": plans, "speeds": speeds, "check": check}

    def replaced(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{made[match[1]]()}\n<!-- end -->"

    new = re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)
    if args.check and new != text:
        print(f"{PAGE} does not say what the files say; run {Path(__file__).name}", file=sys.stderr)
        return 1
    if not args.check:
        PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
