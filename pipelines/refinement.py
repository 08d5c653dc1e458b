"""Comparison of FADRM, FADRM+ and Teddy from a distilled set and from real patches.

Images are labeled by one teacher, by several architectures, and by a pool of weak teachers.

    torchrun --nproc_per_node 2 pipelines/refinement.py --config configs/cifar10_refine.yaml --data DIR
    python pipelines/refinement.py ... --collect results/cifar10_refine

The configuration holds the methods with their stages. Every labeler below trains the students of the configuration
with soft labels on the sets that it is asked about; `hard` trains the first of them without a teacher. Everything
continues where it was killed. `--collect` writes `accuracy.csv`, `differences.csv` (paired, with 95 % intervals),
`refinement.csv` (teachers before and after), `blocks.png`, and every training.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from collect_results import without_places

from dq.config.overrides import apply_settings
from dq.config.reader import to_dict
from dq.config.schema import RunConfig, load_config
from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError, RunError
from dq.core.files import read_json, write_json
from dq.core.locks import locked
from dq.core.processes import make_accelerator
from dq.data.load import load_source
from dq.diffusion.generator import LatentGenerator
from dq.distilled.set import DistilledSet
from dq.evaluation.evaluate import evaluate_sets
from dq.evaluation.statistics import holm, mean_std, paired_difference
from dq.run.folder import open_run
from dq.run.report import write_report
from dq.run.stages.assemble import assemble
from dq.run.stages.cluster import cluster
from dq.run.stages.encode import encode
from dq.run.stages.generate import generate
from dq.run.stages.label import label
from dq.run.stages.refine import refine

# evaluation -> who labels, which sets, which baselines beside them
SETS = {
    "one": (
        "one",
        ["ddoq", "fadrm", "fadrm-deep", "fadrm-retrieve", "fadrm-released", "patches-fadrm", "teddy"],
        ["random", "patches"],
    ),
    "plus": ("plus", ["ddoq", "fadrm", "fadrm-plus", "patches-fadrm-plus"], ["patches"]),
    "pool": ("pool", ["ddoq", "teddy"], []),
    "hard": (
        "hard",
        ["ddoq", "fadrm", "fadrm-released", "fadrm-plus", "patches-fadrm", "patches-fadrm-plus", "teddy"],
        ["random", "patches"],
    ),
    # larger students, of which MobileNetV2 was no teacher
    "one-large": ("one", ["ddoq", "fadrm"], []),
    "plus-large": ("plus", ["ddoq", "fadrm-plus"], []),
}
LARGE, LARGE_SEEDS = ("resnet20", "mobilenetv2"), 3
# what is compared: (set, labeler) against (set, labeler)
QUESTIONS = {
    "FADRM refines DDOQ": (("fadrm", "one"), ("ddoq", "one")),
    "FADRM by the released recipe": (("fadrm-released", "one"), ("ddoq", "one")),
    "statistics of the deep half, against all": (("fadrm-deep", "one"), ("fadrm", "one")),
    "anchors retrieved among patches, against the start": (("fadrm-retrieve", "one"), ("fadrm", "one")),
    "FADRM+ refines DDOQ, same labels": (("fadrm-plus", "plus"), ("ddoq", "plus")),
    "FADRM+ against FADRM": (("fadrm-plus", "plus"), ("fadrm", "one")),
    "FADRM+ against FADRM, same labels": (("fadrm-plus", "plus"), ("fadrm", "plus")),
    "labels of three architectures alone": (("ddoq", "plus"), ("ddoq", "one")),
    "FADRM refines patches": (("patches-fadrm", "one"), ("patches", "one")),
    "FADRM+ refines patches, same labels": (("patches-fadrm-plus", "plus"), ("patches", "plus")),
    "FADRM from DDOQ against from patches": (("fadrm", "one"), ("patches-fadrm", "one")),
    "FADRM+ from DDOQ against from patches": (("fadrm-plus", "plus"), ("patches-fadrm-plus", "plus")),
    "FADRM from DDOQ against random": (("fadrm", "one"), ("random", "one")),
    "Teddy, labels only": (("ddoq", "pool"), ("ddoq", "one")),
    "Teddy, refinement only": (("teddy", "one"), ("ddoq", "one")),
    "Teddy, both": (("teddy", "pool"), ("ddoq", "one")),
    "FADRM, hard labels": (("fadrm", "hard"), ("ddoq", "hard")),
    "FADRM+, hard labels": (("fadrm-plus", "hard"), ("ddoq", "hard")),
    "FADRM refines patches, hard labels": (("patches-fadrm", "hard"), ("patches", "hard")),
    "FADRM+ refines patches, hard labels": (("patches-fadrm-plus", "hard"), ("patches", "hard")),
    "Teddy, hard labels": (("teddy", "hard"), ("ddoq", "hard")),
}


def labelers(config: RunConfig) -> dict[str, tuple[TeacherConfig, ...]]:
    """Teachers that label the images of a method.

    They are the run's teacher, those of FADRM+, or the pool with its fully trained network and the run's teacher as
    strong members.
    """

    def teachers(method: str) -> tuple[TeacherConfig, ...]:
        settings = config.methods.get(method)
        stages = None if settings is None else config.refine if settings.refine is None else settings.refine
        if not stages:
            raise InputError(
                f"the configuration has no methods.{method} with a stage of refine, whose teachers label; "
                "start from configs/cifar10_refine.yaml"
            )
        return stages[0].teachers

    return {"one": config.teachers, "plus": teachers("fadrm-plus"), "pool": (*teachers("teddy"), *config.teachers)}


def evaluate(config: RunConfig, source: Any, accelerator: Any, only: list[str]) -> None:
    """Train the students of every labeler on its sets."""
    base = Path(config.output_dir)
    hard = {k: v for k, v in config.evaluate.students[0].items() if k in ("net", "epochs", "tests")}
    for name, (labeler, methods, baselines) in SETS.items():
        if only and name not in only:
            continue
        sets = {
            m: DistilledSet.load(base / "main" / "dataset", f"ipc{ipc}-{m}")
            for ipc in config.ipc
            for m in methods
            if m in config.methods
        }
        students = config.evaluate.students
        seeds = config.evaluate.seeds
        if name == "hard":
            students = ({**hard, "labels": "hard", "augment": "dsa", "batch_size": 32},)
        if name.endswith("large"):
            students, seeds = tuple({**students[0], "net": net} for net in LARGE), min(seeds, LARGE_SEEDS)
        evaluate_sets(
            sets,
            source,
            config=dataclasses.replace(config.evaluate, baselines=tuple(baselines), students=students, seeds=seeds),
            # the patches are cut by the run's teacher, whoever labels
            teachers=labelers(config).get(labeler, config.teachers),
            image_size=config.image_size,
            folder=base / name,
            cache_dir=Path(config.cache_dir),
            accelerator=accelerator,
        )
        accelerator.print(base / name / "eval" / "summary.csv")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def collect(config: RunConfig, out: Path, test_images: int) -> None:
    """Write what the evaluations found."""
    base = Path(config.output_dir)
    values: dict[tuple[str, str, str, str], dict[int, float]] = {}
    trainings = []
    for name, (labeler, _, _) in SETS.items():
        file = base / name / "eval" / "trainings.jsonl"
        if not file.is_file():
            continue
        for line in file.read_text().splitlines():
            r = json.loads(line)
            values.setdefault((r["set"], labeler, r["student"], str(r["ipc"])), {})[r["seed"]] = r["last"]
            trainings.append({"labeled_by": labeler, **without_places(r)})
    if not values:
        raise InputError(f"there is no evaluation in {base} to collect; give the same command without --collect first")
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for (method, name, student, ipc), numbers in values.items():
        mean, std = mean_std(list(numbers.values()))
        row = {"set": method, "labels": name, "student": student, "ipc": ipc, "seeds": len(numbers)}
        rows.append({**row, "mean": round(mean, 5), "std": None if std is None else round(std, 5)})
    write_csv(out / "accuracy.csv", rows)
    differences = []
    students = list(dict.fromkeys((k[2], k[3]) for k in values))
    for question, (a, b) in QUESTIONS.items():
        for student, ipc in students:
            one, two = values.get((*a, student, ipc)), values.get((*b, student, ipc))
            if one and two and one.keys() == two.keys():
                seeds = sorted(one)
                d = paired_difference([one[s] for s in seeds], [two[s] for s in seeds], test_images=test_images)
                row = {"question": question, "student": student, "ipc": ipc, "pairs": d.pairs}
                row |= {k: round(getattr(d, k), 5) for k in ("mean", "low", "high")}
                differences.append({**row, "verdict": d.verdict, "p_value": d.p_value})
    corrected = iter(holm([r["p_value"] for r in differences if r["p_value"] is not None]))
    differences = [{**r, "p_holm": None if r["p_value"] is None else next(corrected)} for r in differences]
    if differences:
        write_csv(out / "differences.csv", differences)
    steps = []
    for method in config.methods:
        for ipc in config.ipc:
            s = DistilledSet.load(base / "main" / "dataset", f"ipc{ipc}-{method}")
            for stage in s.provenance.get("refine", []):
                before, after = stage["summary"]["before"], stage["summary"]["after"]
                row = {"set": method, "ipc": ipc, "stage": stage["summary"]["method"]}
                for group in ("teachers", "validation_teachers"):
                    for when, numbers in (("before", before), ("after", after)):
                        n = max(1, len(numbers[group]))
                        row[f"{group}_{when}"] = round(sum(t["accuracy"] for t in numbers[group]) / n, 4)
                for key in ("variation", "anchor_distance"):
                    row[f"{key}_before"], row[f"{key}_after"] = before[key], after[key]
                steps.append(row)
    write_csv(out / "refinement.csv", steps)
    shown = read_json(base / "main" / "images" / "refined.json")[f"{config.ipc[0]}/fadrm"]["folder"]
    shutil.copyfile(base / "main" / "figures" / f"{shown}-blocks.png", out / "blocks.png")
    (out / "trainings.jsonl").write_text("".join(json.dumps(t) + "\n" for t in trainings))
    plain = without_places(to_dict(config))
    (out / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100))
    made = read_json(base / "main" / "provenance.json")
    command = f"torchrun --nproc_per_node {made['processes']} pipelines/refinement.py --config config.yaml --data DIR"
    write_json(out / "run.json", {"command": command, **without_places(made)}, checksum=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--data")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--methods", nargs="+", help="only these methods, for a part of the work")
    parser.add_argument(
        "--evaluations", nargs="*", choices=list(SETS), help="only these evaluations; none: no evaluation"
    )
    parser.add_argument("--collect", type=Path, metavar="DIR")
    args = parser.parse_args()
    settings = [*args.set, *([f"source.path={args.data}"] if args.data else [])]
    config = apply_settings(load_config(args.config), settings)
    labelers(config)  # refuses a configuration without them before anything is made
    source = load_source(config.source)
    if args.collect:
        collect(config, args.collect, len(source.test))
        print(args.collect)
        return
    unknown = [m for m in args.methods or () if m not in config.methods]
    if unknown:
        raise InputError(f"there is no method {unknown[0]!r} in the configuration; it has {', '.join(config.methods)}")
    accelerator = make_accelerator()
    methods = {k: v for k, v in config.methods.items() if not args.methods or k in args.methods}
    one = dataclasses.replace(config, output_dir=str(Path(config.output_dir) / "main"), methods=methods)
    with locked(one.output_dir, accelerator):
        run = open_run(one, source, accelerator)
        pipe = LatentGenerator.from_settings(one.codec, one.generate)
        cache = encode(run, pipe.vae)
        cluster(run, cache)
        generate(run, pipe, cache)
        refine(run)
        label(run)
        assemble(run)
        if run.main:
            print(write_report(run))
        accelerator.wait_for_everyone()
    if args.evaluations is None or args.evaluations:
        evaluate(config, source, accelerator, args.evaluations or [])


if __name__ == "__main__":
    try:
        main()
    except (InputError, RunError) as e:
        sys.exit(f"refinement: {e}")
