"""Copy accuracies, quantization numbers, picture and provenance of a run to `results/`.

    python pipelines/collect_results.py runs/cifar10-ddoq results/cifar10_ddoq --command "dq run --config ..."

Writes accuracy.csv, comparisons.csv, trainings.jsonl (one record per training, with all settings), run.json and, for
a run, quantization.csv (mean over classes per ipc, engine and space), checks.csv (accuracies on held-out train images
at checks of a refinement) and images.png. A folder of `dq evaluate --distilled` works too.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shlex
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dq.core.errors import InputError, RunError
from dq.core.files import read_json, suggest_folder, write_json

ABSOLUTE = re.compile(r"(?<!\S)/(?:[^/\s]+/)*(?=[^/\s]+$)")  # the folders of an absolute path at the end of a text
MEANS = ("distortion", "explained", "w2_mass", "w2_uniform", "ess_mass", "ess_sqrt")


def quantization_rows(metrics: Path) -> list[dict[str, object]]:
    """One row per ipc, engine and space: means over classes, and gains in W2."""
    groups: dict[tuple[int, str, str], dict[int, dict]] = {}
    for line in metrics.read_text().splitlines():
        event = json.loads(line)
        if event["stage"] == "quantization":
            key = (event["ipc"], event["engine"], event.get("space", "latents"))
            groups.setdefault(key, {})[event["class"]] = event
    rows = []
    for (ipc, engine, space), classes in sorted(groups.items()):
        mean = {k: statistics.mean(e[k] for e in classes.values()) for k in MEANS}
        # the mean of the classes' own reductions, as the paper averages them
        saved = statistics.mean(1 - e["w2_mass"] / e["w2_uniform"] for e in classes.values())
        row = {"ipc": ipc, "engine": engine, "space": space, "classes": len(classes), "w2_reduction": round(saved, 4)}
        rows.append({**row, **{k: round(v, 4) for k, v in mean.items()}})
    return rows


def check_rows(run: Path) -> list[dict[str, object]]:
    """One row per refined folder and check.

    It has the set, its first images, steps and the accuracy on held-out images.
    """
    rows = []
    refined = read_json(run / "images" / "refined.json") if (run / "images" / "refined.json").exists() else {}
    sets = {r["folder"]: name.partition("/")[2] for name, r in refined.items() if isinstance(r, dict)}
    for path in sorted((run / "images").glob("*/summary.json")):
        summary, settings = read_json(path), read_json(path.with_name("manifest.json"))["settings"]
        for steps, accuracy in summary.get("checks", []):
            representative = summary["from"].split("-")[1]
            drawn = "nearest real" if representative == "real" else f"drawn from each {representative}"
            origin = {"drawn": drawn, "real": "random real"}.get(settings.get("start", "drawn"), settings.get("start"))
            rows.append(
                {
                    "set": sets.get(path.parent.name, ""),
                    "stage": summary["method"],
                    "start": origin,
                    "images": summary["images"],
                }
            )
            rows[-1] |= {"steps": steps, "accuracy": accuracy}
    return rows


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """Rows with the names of the first as head."""
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def without_places(value: Any) -> Any:
    """Plain data with absolute paths cut to their names, also behind words."""
    if isinstance(value, dict):
        return {k: without_places(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_places(v) for v in value]
    return ABSOLUTE.sub("", value) if isinstance(value, str) else value


def command_line(script: str, argv: Sequence[str] | None = None) -> str:
    """The command that a result file names, without absolute paths.

    Args:
        script: file of the script.
        argv: its arguments; None: those of this process.
    """
    words = ["=".join(without_places(w.split("=", 1))) for w in (sys.argv[1:] if argv is None else argv)]
    return f"# python pipelines/{shlex.join([Path(script).name, *words])}"


def check_evaluated(run: Path) -> None:
    """Refuse a folder that is no run or has no accuracies."""
    if not run.is_dir():
        raise InputError(f"there is no folder {run}{suggest_folder(run)}; give the output_dir of a run")
    for name in ("summary.csv", "trainings.jsonl"):
        if not (run / "eval" / name).is_file():
            raise InputError(f"there is no {run / 'eval' / name} to collect; evaluate the run first, by `dq evaluate`")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--command", required=True, help="the command that made the run")
    parser.add_argument("--picture", default="figures/grid-ipc10-ddoq.png")
    args = parser.parse_args()
    check_evaluated(args.run)
    settings = next((p for p in (args.run / "config.yaml", args.run / "eval" / "config.yaml") if p.is_file()), None)
    if settings is None:
        raise InputError(f"{args.run} has no config.yaml; give the output_dir of a run or of `dq evaluate`")
    args.results.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.run / "eval" / "summary.csv", args.results / "accuracy.csv")
    for name in ("comparisons.csv", "ddr.csv"):
        if (args.run / "eval" / name).is_file():
            shutil.copyfile(args.run / "eval" / name, args.results / name)
    lines = (args.run / "eval" / "trainings.jsonl").read_text().splitlines()
    with open(args.results / "trainings.jsonl", "w") as f:
        f.writelines(json.dumps(without_places(json.loads(line))) + "\n" for line in lines)
    plain = without_places(yaml.safe_load(settings.read_text()))
    (args.results / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100))
    facts = {"command": args.command}
    if (args.run / "metrics.jsonl").is_file():
        if quantization := quantization_rows(args.run / "metrics.jsonl"):  # none where images were only selected
            write_csv(args.results / "quantization.csv", quantization)
        if checks := check_rows(args.run):
            write_csv(args.results / "checks.csv", checks)
        if (args.run / args.picture).is_file():
            shutil.copyfile(args.run / args.picture, args.results / "images.png")
        facts |= without_places(read_json(args.run / "provenance.json"))
    write_json(args.results / "run.json", facts, checksum=False)
    print(args.results)


if __name__ == "__main__":
    try:
        main()
    except (InputError, RunError) as e:
        sys.exit(f"collect_results: {e}")
