"""Compare what `--dry-run` expected of a run with what it took.

    dq run --config FILE --dry-run --save_speeds SPEEDS.json ...
    dq run --config FILE ...
    python pipelines/estimate_check.py SPEEDS.json RUN_FOLDER > results/scale/estimate_check.csv

One line per stage: seconds expected, seconds taken, and their ratio. The run must not have been resumed, since a
resumed stage does less than all of its work. A second at most.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from dq.config import load_config
from dq.data import load_source
from dq.speeds import Speeds, expected_seconds


def main(speeds_file: str, folder: str) -> None:
    run = Path(folder)
    config = load_config(run / "config.yaml")
    facts, speeds = json.loads((run / "provenance.json").read_text()), Speeds.load(speeds_file)
    expected = expected_seconds(config, load_source(config.source), facts["processes"], speeds)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = {r["stage"]: r["seconds"] for r in records if "seconds" in r}
    counts = facts["source"]["train_counts"]
    print(
        f"# {len(counts)} classes, {sum(counts)} images of {config.codec.resolution} px, ipc {list(config.ipc)}, "
        f"{facts['processes']} process(es), {facts['hardware']['device']}, {facts['hardware']['threads']} thread(s)"
    )
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["stage", "estimated_s", "measured_s", "ratio"])
    rows = [(stage, expected[stage], seconds) for stage, seconds in measured.items() if expected.get(stage)]
    rows.append(("all", sum(r[1] for r in rows), sum(r[2] for r in rows)))
    for stage, guess, seconds in rows:
        out.writerow([stage, f"{guess:.3g}", f"{seconds:.3g}", f"{seconds / guess:.3g}"])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
