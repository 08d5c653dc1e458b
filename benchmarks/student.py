"""Seconds per epoch of student training against the usual loop, and cost of replay.

The usual loop is a DataLoader with worker processes that decodes PNG files and transforms them with PIL, in float32.
Replay of stored labels is compared with fixed ones.

    python benchmarks/student.py [--data DIR] [--net resnet20] [--images 500] [--epochs 4] [--csv results/student.csv]

Same images, same network, same crops and mirrors, in turn within one run. Without --data: digits at 32 px. The usual
loop should take at least twice as long, replay at most 1.1 times as long as fixed labels.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import math
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dq.config.students import StudentConfig, ViewConfig
from dq.core.devices import default_device, resolve_dtype
from dq.data.images import read_images
from dq.data.load import load_source
from dq.labels.files import read_labels, write_manifest, write_shard
from dq.labels.plan import make_plan
from dq.networks.teacher import Teacher
from dq.networks.training import TrainingSet, fit, normalizer
from dq.networks.zoo import make_net

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
VIEWS = ViewConfig(crop_scale=(0.08, 1.0), flip=0.5)
MIXED = ViewConfig(crop_scale=(0.08, 1.0), flip=0.5, mix="cutmix")


class Files(Dataset):
    """Encoded images, opened and transformed one by one with PIL as an image folder is."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.labels = labels
        self.files = []
        for x in images:
            buffer = io.BytesIO()
            Image.fromarray(x.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
            self.files.append(buffer.getvalue())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image = Image.open(io.BytesIO(self.files[i])).convert("RGB")
        side = image.size[0]
        box = (0, 0, side, side)
        for _ in range(10):  # RandomResizedCrop
            area = side * side * random.uniform(0.08, 1.0)
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= side and 0 < h <= side:
                left, top = random.randint(0, side - w), random.randint(0, side - h)
                box = (left, top, left + w, top + h)
                break
        image = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()).float() / 255
        return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), int(self.labels[i])


def usual(net: torch.nn.Module, loader: DataLoader, epochs: int, device: torch.device) -> float:
    """Seconds per epoch of the loop that most scripts have."""
    net = net.to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    began = time.perf_counter()
    for _ in range(epochs):
        net.train()
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            loss.item()
    return (time.perf_counter() - began) / epochs


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sklearn:digits")
    parser.add_argument("--net", action="append")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def student(args: argparse.Namespace, net: str, **settings: Any) -> StudentConfig:
    return StudentConfig(net=net, epochs=args.epochs, batch_size=args.batch_size, augment="none", **settings)


def store_labels(args: argparse.Namespace, net: str, data: TrainingSet, folder: Path) -> None:
    """Store the labels of all views of a student, by a teacher with random weights."""
    weights = make_net(net, data.num_classes, 32, seed=1).eval().to(args.device)
    teacher = Teacher(weights, MEAN, STD, 256, "benchmark", net)
    plan = make_plan(data.images, [teacher], data.num_classes, student(args, net, labels="soft", views=MIXED))
    write_manifest(folder, data.images, plan, [teacher])
    for epochs in plan.shards():
        write_shard(folder, data.images.to(args.device), [teacher], plan, epochs)


def loops(
    args: argparse.Namespace, net: str, data: TrainingSet, loader: DataLoader, folder: Path
) -> dict[str, Callable[[], float]]:
    """Functions that train a network and return seconds per epoch, by the name of the loop."""
    fast = resolve_dtype("auto", args.device, "training")
    on_device = dataclasses.replace(data, images=data.images.to(args.device), labels=data.labels.to(args.device))

    def ours(dtype: str, labels: str, views: ViewConfig = VIEWS) -> float:
        soft_labels: Any = {"hard": None, "fixed": torch.zeros(len(data.labels), data.num_classes)}.get(labels)
        if labels == "soft":
            soft_labels = read_labels(folder, data.images)
        config = student(args, net, labels=labels, views=views, dtype=dtype)
        return fit(dataclasses.replace(on_device, soft_labels=soft_labels), config, seed=0).seconds / args.epochs

    functions: dict[str, Callable[[], float]] = {
        "usual loop, float32": lambda: usual(
            make_net(net, data.num_classes, 32, seed=0), loader, args.epochs, args.device
        ),
        "dq, float32": lambda: ours("float32", "hard"),
    }
    if fast != "float32":  # what auto stands for
        functions[f"dq, {fast}"] = lambda: ours(fast, "hard")
    functions["dq, float32, fixed labels"] = lambda: ours("float32", "fixed")
    functions["dq, float32, replayed labels"] = lambda: ours("float32", "soft", MIXED)
    return functions


def measure(args: argparse.Namespace, net: str, data: TrainingSet, loader: DataLoader) -> list[dict[str, object]]:
    """Rows with the median seconds per epoch of every loop."""
    timings: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store_labels(args, net, data, Path(folder))
        functions = loops(args, net, data, loader, Path(folder))
        for _ in range(args.rounds + 1):  # in turn; the first round warms up
            for name, train in functions.items():
                timings.setdefault(name, []).append(train())
    medians = {name: statistics.median(v[1:]) for name, v in timings.items()}
    rows: list[dict[str, object]] = []
    for name, seconds in medians.items():
        against = "dq, float32, fixed labels" if "replayed" in name else "usual loop, float32"
        ratio = seconds / medians[against]
        facts = {"net": net, "images": len(data.images), "batch": args.batch_size, "loop": name}
        rows.append({**facts, "seconds_per_epoch": round(seconds, 4), "against": against, "ratio": round(ratio, 3)})
        print(f"{net}: {name}: {seconds:.3f} s per epoch, x{ratio:.2f} of {against}")
    return rows


def main() -> None:
    args = arguments()
    source = load_source(args.data)
    images, _, _ = read_images(source.train, range(args.images), 32, "crop")
    labels = torch.from_numpy(source.train.labels[: args.images])
    data = TrainingSet(images, labels, len(source.class_names), normalizer(MEAN, STD))
    loader = DataLoader(Files(images, labels), args.batch_size, shuffle=True, num_workers=args.workers)
    rows = [row for net in args.net or ["resnet20", "convnet3"] for row in measure(args, net, data, loader)]
    if args.csv:
        with open(args.csv, "w", newline="") as f:
            words = [a if "/" not in a else Path(a).name for a in sys.argv[1:]]
            print("# python benchmarks/student.py", *words, file=f)
            machine, threads = platform.machine(), torch.get_num_threads()
            print(f"# {args.device.type}, {machine}, {threads} threads, torch {torch.__version__}", file=f)
            writer = csv.DictWriter(f, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
