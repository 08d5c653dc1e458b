"""Accuracy of one student on one set with labels in several compact storages.

    python pipelines/label_storage.py SET --data DIR --teacher NET=PATH --csv FILE
    accelerate launch --multi_gpu --num_processes 8 pipelines/label_storage.py ...    # the same on many processes

SET is anything that `dq evaluate --distilled` reads. Prints a table of bytes and accuracies; all files lie in
--output_dir, and the same command continues. Three seeds on CIFAR-10 at ten images per class take half an hour on two
CPU cores.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from dq.config.students import EvaluateConfig
from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError, RunError
from dq.core.processes import make_accelerator
from dq.data.load import load_source
from dq.distilled.external import load_set
from dq.evaluation.evaluate import evaluate_sets

SEED = {"views": "seed"}  # crops and mixes are drawn again at replay
# how logits are kept, and which share of the epochs is labeled
WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "all logits, 16 bits, views stored": ({}, 1),
    "all logits, 8 bits, views by seed": ({"bits": 8, **SEED}, 1),
    "all logits, 8 bits, views by seed, a quarter of the epochs": ({"bits": 8, **SEED}, 1 / 4),
    "top 2, 8 bits, views by seed": ({"top_k": 2, "bits": 8, **SEED}, 1),
    "top 2, 8 bits, views by seed, half of the epochs": ({"top_k": 2, "bits": 8, **SEED}, 1 / 2),
    "top 1, 8 bits, views by seed": ({"top_k": 1, "bits": 8, **SEED}, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True, metavar="NET=PATH")
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--protocol", default="fadrm")
    parser.add_argument("--dataset")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/label-storage"))
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()

    if args.epochs < 4:
        parser.error(f"--epochs is at least 4, of which a quarter is labeled, not {args.epochs}")
    net, equals, path = args.teacher.partition("=")
    if not (net and equals and path):
        raise InputError(f"--teacher is NET=PATH, such as resnet20=runs/teachers/resnet20, not {args.teacher!r}")
    source = load_source(args.data)
    accelerator = make_accelerator()
    small = load_set(args.set, source.class_names)
    student = {"protocol": args.protocol, "net": args.student, "dtype": args.dtype, "tests": 1, "epochs": args.epochs}
    if args.dataset:
        student["dataset"] = args.dataset
    rows = evaluate_sets(
        {"small": small},
        source,
        config=EvaluateConfig(
            seeds=args.seeds,
            baselines=(),
            students=tuple(
                {**student, "relabel": {**relabel, "epochs": round(share * args.epochs)}}
                for relabel, share in WAYS.values()
            ),
        ),
        teachers=(TeacherConfig(net=net, path=path),),
        folder=args.output_dir,
        cache_dir=args.output_dir / "cache",
        accelerator=accelerator,
    )
    if not accelerator.is_main_process:
        return
    records = []
    for name, row in zip(WAYS, rows, strict=True):
        views = row.images * args.epochs
        records.append({"kept": name, "views": views, "classes": len(source.class_names), **row.record()})
        print(f"{name}: {row.label_bytes} bytes, {100 * row.record()['last_mean']:.1f} %")
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=list(records[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)


if __name__ == "__main__":
    try:
        main()
    except (InputError, RunError) as e:
        sys.exit(f"label_storage: {e}")
