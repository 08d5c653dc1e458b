"""Train a network of your own on a distilled set, in plain PyTorch.

    python examples/train_on_a_set.py SET DATA --epochs 100

SET is what dq wrote or pulled: a set or run folder, or a repository of the Hub. DATA is the image set that it
was made of, whose test split scores the network.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dq import load_set, load_source
from dq.data.images import read_images


def network(classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (3, 32, 32):
        layers += [
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.InstanceNorm2d(32, affine=True),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(classes))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    rows = torch.cat([model(x).argmax(1) for x in images.split(500)])
    return float((rows == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set")
    parser.add_argument("data", nargs="?", default="sklearn:digits")
    parser.add_argument("--epochs", type=int, default=100)
    args = parser.parse_args()

    torch.manual_seed(0)
    distilled = load_set(args.set)
    side = distilled.images.shape[-1]
    loader = DataLoader(distilled.to_torch(), batch_size=32, shuffle=True)
    model = network(len(distilled.class_names))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    for _ in range(args.epochs):
        model.train()
        for x, y, weight, *_ in loader:  # a fourth tensor, if any, holds label vectors
            loss = (F.cross_entropy(model(x), y, reduction="none") * weight).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    source = load_source(args.data, test_share=0.2)
    test, rows, _ = read_images(source.test, range(len(source.test)), side, source.preprocess)
    labels = torch.from_numpy(source.test.labels)[rows]
    print(f"{100 * accuracy(model, test.float() / 255, labels):.1f} % of {len(rows)} test images")


if __name__ == "__main__":
    main()
