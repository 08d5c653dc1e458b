"""Copy a Parquet data set with a stratified part of train as its test split.

Settings are chosen on it.

    python pipelines/hold_out.py DATA OUT --images 5000 --seed 0

Writes OUT/train-00000-of-00001.parquet and OUT/test-00000-of-00001.parquet with the rows of DATA's train files; its
test files are not read. Whatever is compared on OUT has seen no test image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dq.data.coresets import random_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label_column", default="label")
    args = parser.parse_args()
    files = sorted(args.data.rglob("train*.parquet"))
    if not files:
        raise SystemExit(f"there is no train*.parquet below {args.data}")
    rows = pa.concat_tables([pq.read_table(f) for f in files])
    if args.label_column not in rows.column_names:
        names = ", ".join(rows.column_names)
        raise SystemExit(f"{args.data} has no column {args.label_column!r} but {names}; give --label_column")
    labels = rows[args.label_column].to_numpy()
    classes, counts = np.unique(labels, return_counts=True)
    per_class = args.images // len(classes)
    if not 0 < per_class < counts.min():
        raise SystemExit(f"classes have from {counts.min()} rows on, of which {per_class} cannot be held out")
    mask = np.zeros(len(labels), bool)
    mask[random_rows(labels, per_class, args.seed)] = True
    args.out.mkdir(parents=True, exist_ok=True)
    for split, keep in (("train", ~mask), ("test", mask)):
        pq.write_table(rows.filter(pa.array(keep)), args.out / f"{split}-00000-of-00001.parquet")
        print(f"{split}: {keep.sum()} rows")


if __name__ == "__main__":
    main()
