"""Seconds per epoch of an expert: usual loop, `dq` in sequence, `dq` side by side.

    python benchmarks/experts.py [--net convnet3w32] [--side 32] [--images 1024] [--experts 4] [--csv FILE]

The usual loop has a module, `torch.optim.SGD` and a copy of the parameters after every epoch, as MTT's code has; all
three train the same networks on the same batches in turn within one run, without augmentation. `dq` should not be
slower than the usual loop: on a CPU with one expert after another, which is the default there, on a GPU side by side.
On a CPU the time is that of the process, so that other work on the machine counts for little.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from dq.config.trajectories import TrainExpertsConfig
from dq.core.devices import default_device
from dq.core.seeds import generator
from dq.networks.flat_parameters import FlatNet
from dq.networks.training import TrainingSet, normalizer
from dq.networks.trajectories import train_trajectories
from dq.networks.zoo import make_net

PIXELS = normalizer((0.5,) * 3, (0.25,) * 3)


def usual(net: str, side: int, images: torch.Tensor, labels: torch.Tensor, t: TrainExpertsConfig, seeds: range):
    """Parameters (E, P) of networks after the usual loop, one network after another."""
    device, ends = images.device, []
    x, y = PIXELS(images), labels
    for seed in seeds:
        model = make_net(net, 10, side, seed=seed).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=t.lr)
        checkpoints = []
        for epoch in range(t.epochs):
            for rows in torch.randperm(len(y), generator=generator(seed, "order", epoch)).split(t.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows.to(device)]), y[rows.to(device)]).backward()
                optimizer.step()
            checkpoints.append([p.detach().cpu().clone() for p in model.parameters()])
        ends.append(torch.cat([p.flatten() for p in checkpoints[-1]]))
    return torch.stack(ends)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="convnet3w32")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = default_device()
    images = torch.randint(0, 256, (args.images, 3, args.side, args.side), generator=generator("images")).byte()
    labels = torch.arange(args.images) % 10
    images, labels = images.to(device), labels.to(device)
    t = TrainExpertsConfig(
        net=args.net, epochs=1, batch_size=args.batch_size, optimizer="sgd", augment="none", whiten=False
    )
    seeds = range(args.experts)
    net = FlatNet(args.net, 10, args.side).to(device)
    data = TrainingSet(images.cpu(), labels.cpu(), 10, PIXELS)

    def ours(side_by_side: int) -> torch.Tensor:
        groups = [seeds[i : i + side_by_side] for i in range(0, len(seeds), side_by_side)]
        ends = [train_trajectories(net, data, t, seeds=g)[:, -1] for g in groups]
        return torch.cat(ends)

    calls = {
        "usual": lambda: usual(args.net, args.side, images, labels, t, seeds),
        "one_by_one": lambda: ours(1),
        "side_by_side": lambda: ours(args.experts),
    }
    ends = {name: call() for name, call in calls.items()}  # also warms up
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, call in calls.items():
            began = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken[name].append((clock() - began) / args.experts)
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    row = {
        "net": args.net,
        "side": args.side,
        "images": args.images,
        "batch_size": args.batch_size,
        "experts": args.experts,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{f"{name}_s_per_epoch": round(value, 4) for name, value in seconds.items()},
        "one_by_one_ratio": round(seconds["one_by_one"] / seconds["usual"], 2),
        "side_by_side_ratio": round(seconds["side_by_side"] / seconds["usual"], 2),
        "largest_difference": f"{max(float((e - ends['usual']).abs().max()) for e in ends.values()):.1e}",
    }
    writer = csv.DictWriter(sys.stdout, row)
    writer.writeheader()
    writer.writerow(row)
    if args.csv:
        new = not args.csv.exists()
        with open(args.csv, "a", newline="") as f:
            writer = csv.DictWriter(f, row)
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
