"""Membership inference against networks trained on a distilled set.

A chunk of train images (the members) is distilled; attacks guess from a network's outputs whether an image was in that
chunk (FRePo, arXiv 2206.00719).

    python pipelines/membership_inference.py --data DIR --csv FILE --output_dir DIR
    # MNIST as in the paper: --chunk 1000 --ipc 50 --steps 500000 --lr 3e-4 --student_steps 100 1000 16000

Networks learn the distilled set, as many random members, and all members. The released script trains on the images
where the optimization starts, which are real members; here it is the optimized set. The random members of seed 0 are
that start. Attackers are fitted on half of the members and of as many other train images and tested on the other
halves. Sources are the members in a set or, of the distilled set, in its start. A killed run goes on where it was.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import frepo_sets
import numpy as np
from collect_results import command_line
from membership_attacks import attack, loss_auc, outputs
from torch import nn

from dq.core.errors import InputError, RunError
from dq.core.progress import progress
from dq.data.coresets import random_rows
from dq.data.load import load_source
from dq.data.zca import Whitening, fit_whitening
from dq.evaluation.statistics import format_mean_std
from dq.refine.method import RealImages


def chunks(labels: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint rows of members and of others, `size` of each class."""
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2 * size:
        few = f"class {classes[counts.argmin()]} has {counts.min()}"
        raise InputError(f"two chunks need {2 * size} train images of a class, but {few}; lower --chunk")
    members = random_rows(labels, size, 0)
    rest = np.setdiff1d(np.arange(len(labels)), members)
    return members, rest[random_rows(labels[rest], size, 1)]


def measured(net: nn.Module, groups: Sequence[RealImages], whitening: Whitening, seed: int) -> list[dict[str, Any]]:
    """One row for every attack on a network.

    The groups are members, others, and the members that its set came from.
    """
    inside, outside, sources = (outputs(net, r, whitening) for r in groups)
    results = attack(inside, outside, seed) | {"loss, sources only": (loss_auc(sources, outside), float("nan"))}
    row = {}
    for name, y, real in zip(("member_accuracy", "other_accuracy"), (inside, outside), groups[:2], strict=True):
        row[name] = round(float((y[:, :-1].argmax(1) == real.labels.numpy()).mean()), 5)
    return [{**row, "attack": k, "auc": round(a, 5), "attack_accuracy": round(b, 5)} for k, (a, b) in results.items()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = frepo_sets.options(__doc__)
    parser.add_argument("--student_steps", type=frepo_sets.count, nargs="+", default=[10_000], help="one or several")
    parser.add_argument("--ipc", type=frepo_sets.count, default=50, help="images per class of a set")
    parser.add_argument("--chunk", type=frepo_sets.count, default=1000, help="members, and others, of each class")
    args = parser.parse_args(argv)
    command = command_line(__file__, argv)
    rows = frepo_sets.read_rows(args.csv, command)
    finished = {(r["set"], int(r["steps"]), int(r["seed"])) for r in rows}
    source = load_source(args.data)
    classes = len(source.class_names)
    real = frepo_sets.read_split(source, source.train, args.image_size)
    members, others = (frepo_sets.take(real, r) for r in chunks(real.labels.numpy(), args.chunk))
    whitening = fit_whitening(members.images).to(args.device)
    start = frepo_sets.random_images(members, args.ipc, 0)
    learned = frepo_sets.distill(start, members, whitening, classes, args)
    work = list(itertools.product(range(args.seeds), args.student_steps))
    for seed, steps in progress(work, desc="networks", unit="step count"):
        sources = {"frepo": start, "random": frepo_sets.random_images(members, args.ipc, seed), "all members": members}
        for name in [n for n in sources if (n, steps, seed) not in finished]:
            data = learned if name == "frepo" else frepo_sets.with_targets(sources[name], classes)
            net = frepo_sets.train(data, whitening, steps, seed, args)
            row = {"set": name, "images": len(data[0]), "steps": steps, "seed": seed}
            rows += [row | r for r in measured(net, (members, others, sources[name]), whitening, seed)]
            frepo_sets.write_rows(args.csv, command, rows)
    for key in dict.fromkeys((r["set"], int(r["steps"]), r["attack"]) for r in rows):
        aucs = [float(r["auc"]) for r in rows if (r["set"], int(r["steps"]), r["attack"]) == key]
        print(f"{key[0]}, {key[1]} steps, {key[2]}: AUC {format_mean_std(aucs, digits=3)}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, RunError) as e:
        sys.exit(f"membership_inference: {e}")
