r"""Agreement of difficulty scores between seeds, and examples of easy and hard images.

    python pipelines/difficulty.py --data cifar10 --per_class 1000 --set net=convnet3w32 runs=8 epochs=30 \
        batch_size=128 lr=0.02 --csv results/difficulty.csv --picture results/difficulty.jpg --classes cat ship

For every score: Spearman's correlation within classes between two runs, between the means of two disjoint halves of
the runs, and with EL2N, both averaged over all runs. `--per_class` takes the first images of every class alone, for
machines without a GPU. Runs are kept in `--cache_dir`, and a killed call goes on from there. The picture has the
twenty easiest and the twenty hardest images of the named classes by `score`, the first of each row at its end of the
order.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import platform
import sys
from pathlib import Path

import numpy as np
import torch
from collect_results import command_line
from torch import Tensor

from dq.config.overrides import apply_settings
from dq.config.pruning import DifficultyConfig
from dq.config.schema import SourceConfig
from dq.core.errors import InputError, RunError
from dq.core.seeds import digest_of
from dq.data.images import read_images
from dq.data.load import load_source
from dq.data.source import ImageSource
from dq.networks.difficulty import DifficultyCache, make_difficulty, rank_agreement

SCORES = ("el2n", "grand_last", "uncertainty", "loss", "forgetting", "cad")
SHOWN = 20  # images of a row of the picture


def first_images(source: ImageSource, per_class: int) -> ImageSource:
    """The source with the first `per_class` train images of every class alone."""
    split = source.train
    rows = np.sort(np.concatenate([source.rows_of_class(c)[:per_class] for c in range(len(source.class_names))]))
    part = dataclasses.replace(split, labels=split.labels[rows], read=lambda i: split.read(int(rows[i])))
    fingerprint = digest_of([source.fingerprint, "first", per_class])
    return dataclasses.replace(source, splits={**source.splits, split.name: part}, fingerprint=fingerprint)


def agreement(cache: DifficultyCache, source: ImageSource, runs: int) -> list[dict[str, object]]:
    """One record per score."""
    records: list[dict[str, object]] = []
    el2n, rows = cache.runs("el2n", runs)
    labels = torch.from_numpy(source.train.labels)[rows]
    for score in SCORES:
        try:
            values = cache.runs(score, runs)[0]
        except InputError:  # cad of one epoch
            continue
        halves = torch.stack([values[0::2].mean(0), values[1::2].mean(0)])
        both = torch.stack([values.mean(0), el2n.mean(0)])
        numbers = {"two_runs": values, "two_halves": halves, "with_el2n": both}
        records.append({"score": score, **{k: f"{rank_agreement(v, labels):.3f}" for k, v in numbers.items()}})
    return records


def picture(source: ImageSource, orders: list[Tensor], classes: list[str], side: int) -> np.ndarray:
    """Two rows a class, the easiest and the hardest images, (H, W, 3) uint8."""
    lines = []
    for name in classes:
        order = orders[source.class_names.index(name)]
        for rows in (order[:SHOWN], order[-SHOWN:].flip(0)):
            images = read_images(source.train, rows.tolist(), side, source.preprocess)[0]
            framed = torch.nn.functional.pad(images, (1, 1, 1, 1), value=255)
            lines.append(torch.cat(list(framed), 2))
    return torch.cat(lines, 1).permute(1, 2, 0).numpy()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the image set: folder, Hub id or sklearn:digits")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--per_class", type=int, help="take so many images of a class alone")
    parser.add_argument("--cache_dir", default="runs/cache")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of DifficultyConfig")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--classes", nargs="+", default=[])
    args = parser.parse_args(argv)
    if args.picture and not args.classes:
        parser.error("--picture shows the classes named by --classes; name some")
    settings = apply_settings(DifficultyConfig(dtype="float32"), args.set)
    source = load_source(SourceConfig(path=args.data))
    unknown = [c for c in args.classes if c not in source.class_names]
    if unknown:
        raise InputError(f"there is no class {unknown[0]!r} in {args.data}; it has {', '.join(source.class_names)}")
    source = first_images(source, args.per_class) if args.per_class else source
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cache = make_difficulty(args.cache_dir, source, args.image_size, settings, device=device)
    facts = {
        "net": settings.net,
        "images": len(source.train),
        "epochs": settings.trained_epochs,
        "runs": settings.runs,
    }
    records = [{**facts, **r} for r in agreement(cache, source, settings.runs)]
    for record in records:
        print(", ".join(f"{k} {v}" for k, v in record.items()))
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as f:
            f.write(f"{command_line(__file__, argv)}  ({platform.machine()}, torch {torch.__version__})\n")
            writer = csv.DictWriter(f, list(records[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)
    if args.picture:
        from PIL import Image

        args.picture.parent.mkdir(parents=True, exist_ok=True)
        orders = cache.orders(source, settings.score, settings.runs)
        Image.fromarray(picture(source, orders, args.classes, args.image_size)).save(args.picture, quality=85)
    return 0


if __name__ == "__main__":
    try:
        main()
    except (InputError, RunError) as e:
        sys.exit(f"difficulty: {e}")
