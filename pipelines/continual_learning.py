"""Class-incremental learning from distilled sets (FRePo, arXiv 2206.00719).

Classes come in parts, each of which FRePo distills by itself; after each part a fresh network is trained on the union
so far and tested on all classes seen.

    python pipelines/continual_learning.py --data DIR --csv FILE --output_dir DIR
    # CIFAR-100 as in the paper: --ipc 20 --parts 5 --steps 500000 --lr 3e-4

Beside it: as many random real images, and `--larger` real images per class. Prints means over seeds. A killed run goes
on behind its last distilled part and its last training. Labels are as wide as all classes from the first part on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import frepo_sets
import torch
from collect_results import command_line
from torch import Tensor

from dq.core.errors import InputError, RunError
from dq.core.progress import progress
from dq.core.seeds import generator
from dq.data.load import load_source
from dq.data.zca import fit_whitening
from dq.evaluation.statistics import format_mean_std
from dq.networks.training import accuracy
from dq.refine.method import RealImages


def class_parts(classes: int, parts: int, seed: int) -> list[Tensor]:
    """Classes of each part; their order is fixed by the seed."""
    if not 1 <= parts <= classes:
        raise InputError(f"{classes} classes make 1 to {classes} parts, not {parts}; change --parts")
    return list(torch.randperm(classes, generator=generator(seed, "class order")).tensor_split(parts))


def of_classes(real: RealImages, classes: Tensor) -> RealImages:
    """The images of some classes."""
    return frepo_sets.take(real, torch.isin(real.labels, classes))


def main(argv: Sequence[str] | None = None) -> None:
    parser = frepo_sets.options(__doc__)
    parser.add_argument("--student_steps", type=frepo_sets.count, default=10_000)
    parser.add_argument("--ipc", type=frepo_sets.count, default=20, help="images per class")
    parser.add_argument("--parts", type=frepo_sets.count, default=5)
    parser.add_argument("--order_seed", type=int, default=0, help="of the order of classes")
    parser.add_argument("--larger", type=int, default=0, help="real images per class of a larger set; 0: none")
    parser.add_argument("--test_per_class", type=frepo_sets.count, default=100_000, help="at most")
    args = parser.parse_args(argv)
    command = command_line(__file__, argv)
    rows = frepo_sets.read_rows(args.csv, command)
    finished = {(int(r["part"]), r["set"], int(r["seed"])) for r in rows}
    source = load_source(args.data)
    classes = len(source.class_names)
    real = frepo_sets.read_split(source, source.train, args.image_size)
    test = frepo_sets.read_split(source, source.test, args.image_size)
    test = frepo_sets.random_images(test, args.test_per_class, 0)
    parts = class_parts(classes, args.parts, args.order_seed)
    # of the first part alone, since later classes are not known yet; the released code fits it on all train images
    whitening = fit_whitening(of_classes(real, parts[0]).images).to(args.device)
    sizes = {"random": args.ipc, **({f"random, {args.larger} per class": args.larger} if args.larger else {})}
    learned: list[frepo_sets.Set] = []
    for number, part in enumerate(parts, 1):
        new = of_classes(real, part)
        learned.append(frepo_sets.distill(frepo_sets.random_images(new, args.ipc, 0), new, whitening, classes, args))
        seen = torch.cat(parts[:number])
        so_far, tested = of_classes(real, seen), of_classes(test, seen)
        for seed in progress(range(args.seeds), desc=f"part {number} of {len(parts)}", unit="seed"):
            sets = {"frepo": (torch.cat([x for x, _ in learned]), torch.cat([y for _, y in learned]))}
            # another subset for every seed; that of seed 0 is where the distillation started
            drawn = {name: frepo_sets.random_images(so_far, n, seed) for name, n in sizes.items()}
            sets |= {name: frepo_sets.with_targets(r, classes) for name, r in drawn.items()}
            for name in [n for n in sets if (number, n, seed) not in finished]:
                net = frepo_sets.train(sets[name], whitening, args.student_steps, seed, args)
                score = accuracy(net, tested.images, tested.labels, pixels=whitening)
                row = {"part": number, "classes": len(seen), "set": name, "images": len(sets[name][0]), "seed": seed}
                rows.append({**row, "accuracy": round(score, 5)})
                frepo_sets.write_rows(args.csv, command, rows)
        for name in sets:
            scores = [100 * float(r["accuracy"]) for r in rows if (int(r["part"]), r["set"]) == (number, name)]
            print(f"{len(seen)} classes, {name}: {format_mean_std(scores)} %", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (InputError, RunError) as e:
        sys.exit(f"continual_learning: {e}")
