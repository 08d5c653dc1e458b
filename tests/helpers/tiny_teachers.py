"""Teachers of a few thousand weights for tests of refinement."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dq.networks.teacher import Teacher

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


class TinyNet(nn.Module):
    """Three convolutions with batch norm, the last two around a shortcut; sees images of any size."""

    def __init__(self, classes: int = 4, width: int = 8, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = norm(width)
        self.late = norm(2 * width)  # registered before it is called
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn2 = norm(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.late(self.conv3(x)) + x)
        return self.head(x.mean((2, 3)))


def drawn(net: nn.Module, seed: int = 0) -> nn.Module:
    """A network with drawn weights and statistics, in evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.copy_(0.5 + torch.rand(m.weight.shape, generator=g))
                m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=g) * 0.2)
                m.running_var.copy_(0.5 + torch.rand(m.running_var.shape, generator=g))
    return net.eval()


def images_of(labels: Tensor, side: int = 16, seed: int = 0) -> Tensor:
    """Images (N, 3, S, S) in [0, 1] whose class shows in color and stripes."""
    g = torch.Generator().manual_seed(seed)
    x = 0.5 + 0.15 * torch.randn(len(labels), 3, side, side, generator=g)
    wave = torch.sin(torch.arange(side) * 1.3)
    for i, c in enumerate(labels.tolist()):
        x[i, c % 3] += 0.2
        if c >= 2:
            x[i] += 0.15 * (wave if c == 2 else wave[:, None])
    return x.clamp(0, 1)


def teacher_of(net: nn.Module, name: str = "tiny", **facts: object) -> Teacher:
    return Teacher(net, MEAN, STD, 64, f"digest of {name}", name, **facts)  # type: ignore[arg-type]


def trained(seed: int = 0, classes: int = 4, side: int = 16, width: int = 8) -> Teacher:
    """A tiny network trained on `images_of`."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(128) % classes
    images = images_of(labels, side, seed + 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    x = (images - mean) / std
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = TinyNet(classes, width)
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        rows = torch.randperm(len(x), generator=g)[:32]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), labels[rows]).backward()
        optimizer.step()
    return teacher_of(net.eval(), f"tiny{seed}")
