"""Memory, time and gradients of TESLA and exact unrolling, by steps of the student.

    python benchmarks/unroll.py [--steps 1 5 10 20 40] [--images 20] [--net convnet3w32] [--csv results/unroll.csv]

Memory is what autograd holds at most during one gradient (`saved_tensors_hooks`, each storage once); TESLA keeps a
vector of parameters for each step beside it, 90 KB for this network. Time is in seconds of the processor, in turns, as
a median ratio (TESLA / exact) of three rounds. `cosine` is that of the gradients of the images, `norms` the ratio of
their norms (TESLA / exact); the loss is the same. Images are noise and experts are the parameters of a network before
and after training on noise, so the gradients are those of the beginning of a matching, not of a trained set.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dq.core.seeds import generator
from dq.networks.flat_parameters import FlatNet
from dq.refine.unroll import GRADIENTS, Segment, Student, draw_batches

LR = 0.01  # of the student, as released
HARD = 5.0  # logit of an image's class


def problem(net_name: str, images: int, steps: int) -> tuple[Student, tuple[Tensor, Tensor, Tensor], Segment]:
    """A student, its images, label logits and step size, and an expert's segment."""
    net, g = FlatNet(net_name, 10, 32), generator(0, "images")
    x, labels = torch.randn(images, 3, 32, 32, generator=g), torch.arange(images) % 10
    start = net.initial(0)
    target, seen = start.clone().requires_grad_(True), torch.randn(64, 3, 32, 32, generator=g)
    for _ in range(4):  # an expert that moved
        (slope,) = torch.autograd.grad(F.cross_entropy(net(target, seen), torch.arange(64) % 10), target)
        target = (target - 5 * LR * slope).detach().requires_grad_(True)
    student = Student(net, draw_batches(images, images, steps, 0), 0)
    segment = Segment(start, target.detach())
    return student, (x, HARD * F.one_hot(labels, 10).float(), torch.tensor(LR)), segment


class Saved:
    """Bytes of the storages that autograd holds, now and at most, without those of some tensors."""

    def __init__(self, without: tuple[Tensor, ...]) -> None:
        self.without = {t.untyped_storage().data_ptr() for t in without}
        self.users: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def pack(self, tensor: Tensor) -> Handle:
        return Handle(self, tensor)


class Handle:
    """A saved tensor, which counts as long as autograd keeps it."""

    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.saved, self.tensor, self.key = saved, tensor, tensor.untyped_storage().data_ptr()
        if self.key not in saved.without:
            saved.users[self.key] += 1
            saved.sizes[self.key] = tensor.untyped_storage().nbytes()
            saved.peak = max(saved.peak, sum(saved.sizes.values()))

    def __del__(self) -> None:
        self.saved.users[self.key] -= 1
        if self.saved.users[self.key] == 0:
            self.saved.sizes.pop(self.key, None)


def saved_mb(kind: str, student: Student, learned: tuple[Tensor, Tensor, Tensor], segment: Segment) -> float:
    """MB that autograd holds at most during one gradient."""
    saved = Saved((*learned, segment.start, segment.target))
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda handle: handle.tensor):
        GRADIENTS[kind](student, *learned, segment)
    return saved.peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 10, 20, 40])
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--net", default="convnet3w32")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for steps in args.steps:
        student, learned, segment = problem(args.net, args.images, steps)
        seconds: dict[str, list[float]] = {kind: [] for kind in GRADIENTS}
        results = {}
        for _ in range(3):
            for kind, gradient in GRADIENTS.items():
                begin = time.process_time()
                results[kind] = gradient(student, *learned, segment)
                seconds[kind].append(time.process_time() - begin)
        exact, tesla = (results[k].images.flatten() for k in ("exact", "tesla"))
        ratios = [b / a for a, b in zip(seconds["exact"], seconds["tesla"], strict=True)]
        row = {
            "steps": steps,
            **{f"{kind}_mb": round(saved_mb(kind, student, learned, segment), 1) for kind in GRADIENTS},
            "time": round(statistics.median(ratios), 3),
            "cosine": round(float(F.cosine_similarity(exact, tesla, dim=0)), 3),
            "norms": round(float(tesla.norm() / exact.norm()), 3),
            "loss_difference": f"{abs(float(results['exact'].loss - results['tesla'].loss)):.1e}",
        }
        rows.append(row)
        print(row, flush=True)
    if args.csv:
        with open(args.csv, "w", newline="") as f:
            command = " ".join(["python benchmarks/unroll.py", *sys.argv[1:]])
            f.write(f"# {command}  ({platform.machine()}, torch {torch.__version__})\n")
            writer = csv.DictWriter(f, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
