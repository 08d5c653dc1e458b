"""The networks that learn from a distilled set (students) or label it (teachers), behind one door: `make_net`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq.errors import InputError

Norm = Literal["instance", "batch"]
MakeNorm = Callable[[int], nn.Module]


def instance_norm(channels: int) -> nn.Module:
    """Affine instance norm. Group norm with one channel per group is the same function, and on a CPU the fastest of
    the seven ways to write it that we measured, forward and backward."""
    return nn.GroupNorm(channels, channels)


NORMS: dict[Norm, MakeNorm] = {"instance": instance_norm, "batch": nn.BatchNorm2d}
SUFFIXES: dict[str, Norm] = {"in": "instance", "bn": "batch"}
CONVNETS = {"convnet3": 3, "convnet4": 4, "convnet5": 5, "convnet6": 6}  # name -> depth
CIFAR_RESNETS = {"resnet20": 3, "resnet56": 9}  # name -> blocks per stage
NAMES = (*CONVNETS, *CIFAR_RESNETS, "resnet18")


class ConvNet(nn.Module):
    """`depth` blocks of conv 3x3 -> norm -> ReLU -> 2x2 average pool, then a linear classifier (Gidaris & Komodakis
    2018, as the dataset condensation papers use it)."""

    def __init__(self, depth: int, num_classes: int, image_size: int, norm: MakeNorm, width: int = 128) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for i in range(depth):
            conv = nn.Conv2d(width if i else 3, width, 3, padding=1)
            blocks += [conv, norm(width), nn.ReLU(inplace=True), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * (image_size >> depth) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))  # (B, 3, S, S) -> (B, classes)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: MakeNorm, downsample: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = norm(outputs)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ShortcutA(nn.Module):
    """Option A of He et al. 2016: every second pixel, zeros for the new channels, no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))  # (B, C, S, S) -> (B, 2C, S/2, S/2)


class CifarResNet(nn.Module):
    """The thin ResNet for 32 px images (He et al. 2016, section 4.2): 6n+2 layers with 16, 32 and 64 channels.

    The parameter names are those of akamaster/pytorch_resnet_cifar10, whose trained weights are widely used.
    """

    def __init__(self, blocks: int, num_classes: int, norm: MakeNorm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = norm(16)
        self.layer1 = self._stage(16, 16, blocks, norm)
        self.layer2 = self._stage(16, 32, blocks, norm)
        self.layer3 = self._stage(32, 64, blocks, norm)
        self.linear = nn.Linear(64, num_classes)
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(m.weight)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, norm: MakeNorm) -> nn.Sequential:
        narrow = inputs != outputs
        first = BasicBlock(inputs, outputs, 2 if narrow else 1, norm, ShortcutA() if narrow else nn.Identity())
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, norm, nn.Identity()) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class ResNet18(nn.Module):
    """ResNet-18 with torchvision's parameter names. Images up to 64 px get a 3x3 stem of stride 1 and no max pool."""

    def __init__(self, num_classes: int, image_size: int, norm: MakeNorm) -> None:
        super().__init__()
        small = image_size <= 64
        kernel, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(3, 64, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn1 = norm(64)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(64, 64, norm)
        self.layer2 = self._stage(64, 128, norm)
        self.layer3 = self._stage(128, 256, norm)
        self.layer4 = self._stage(256, 512, norm)
        self.fc = nn.Linear(512, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(inputs: int, outputs: int, norm: MakeNorm) -> nn.Sequential:
        shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), norm(outputs))
        first = BasicBlock(inputs, outputs, 2 if inputs != outputs else 1, norm, shortcut)
        return nn.Sequential(first, BasicBlock(outputs, outputs, 1, norm, nn.Identity()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def fast_layout(net: nn.Module) -> torch.memory_format:
    """The layout of weights and activations in which `net` trains fastest: channels last, save with group norm, which
    is slow in that layout. Measured on a CPU; activations take the layout of the first weights."""
    grouped = any(isinstance(m, nn.GroupNorm) for m in net.modules())
    return torch.contiguous_format if grouped else torch.channels_last


def make_net(name: str, num_classes: int, image_size: int, *, norm: Norm | None = None, seed: int) -> nn.Module:
    """Build a network for (B, 3, `image_size`, `image_size`) images with freshly drawn weights, on the CPU.

    Args:
        name: convnet3 to convnet6, resnet20, resnet56 or resnet18; with "-bn" or "-in" behind it, batch norm or
            instance norm takes the place of the usual one (instance norm for ConvNets, batch norm for ResNets).
        num_classes: length of the output.
        image_size: side of the images in px; the classifier of a ConvNet and the stem of ResNet-18 depend on it.
        norm: the same choice as the ending of `name`, for callers that have it as a value.
        seed: of the weights. The global random state is neither read nor changed.

    Raises:
        InputError: if the name is unknown, or the images are too small for the depth.
    """
    base, _, suffix = name.partition("-")
    if base not in NAMES or (suffix and suffix not in SUFFIXES):
        raise InputError(f"no network is called {name!r}; choose {', '.join(NAMES)}, with -bn or -in for another norm")
    if norm is not None and norm not in NORMS:
        raise InputError(f"norm must be 'instance' or 'batch', not {norm!r}")
    if suffix and norm not in (None, SUFFIXES[suffix]):
        raise InputError(f"network {name!r} asks for {SUFFIXES[suffix]} norm but norm={norm!r}; give only one of them")
    kind = norm or (SUFFIXES[suffix] if suffix else "instance" if base in CONVNETS else "batch")
    # The last norm needs maps of 2x2 px at least: over a single pixel, instance norm returns a constant.
    if base in CONVNETS:
        smallest = 2 ** CONVNETS[base]
    else:
        smallest = 9 if base == "resnet18" else 5
    if image_size < smallest:
        raise InputError(
            f"network {name!r} needs images of at least {smallest} px, not {image_size}; "
            "choose a shallower network or raise source.image_size"
        )
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed every accelerator, which fork_rng(devices=[]) does not restore
        torch.default_generator.manual_seed(seed)
        if base in CONVNETS:
            return ConvNet(CONVNETS[base], num_classes, image_size, NORMS[kind])
        if base in CIFAR_RESNETS:
            return CifarResNet(CIFAR_RESNETS[base], num_classes, NORMS[kind])
        return ResNet18(num_classes, image_size, NORMS[kind])
