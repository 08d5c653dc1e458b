"""Networks of the distillation papers: ConvNet, AlexNet, VGG11, ResNets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["instance", "batch", "none"]
MakeNorm = Callable[[int], nn.Module]
Init = Literal["torchvision", "fan_out"]  # of the convolutions of ResNets for small images
SMALL, MEDIUM = 64, 128  # px up to which stems keep the resolution, and those of ResNets have kernels of 3x3


def instance_norm(channels: int) -> nn.Module:
    """Return affine instance norm, as group norm with one channel per group.

    On a CPU this was the fastest of seven implementations, forward and backward.
    """
    return nn.GroupNorm(channels, channels)


class ConvNet(nn.Module):
    """ConvNet of Gidaris & Komodakis 2018, as the dataset condensation papers use it.

    `depth` blocks of conv 3x3 -> norm -> ReLU -> 2x2 average pool, then a linear classifier.
    """

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


class AlexNet(nn.Module):
    """AlexNet of the dataset condensation papers for 32 px images.

    Five convolutions, no norm, a linear layer.
    """

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        # (channels, kernel, whether a 2x2 max pool follows)
        layers = [(128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True)]
        self.features = nn.Sequential()
        inputs = 3
        for channels, kernel, pool in layers:
            self.features.append(nn.Conv2d(inputs, channels, kernel, padding=kernel // 2))
            self.features.append(nn.ReLU(inplace=True))
            if pool:
                self.features.append(nn.MaxPool2d(2))
            inputs = channels
        self.fc = nn.Linear(inputs * (image_size // 8) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).flatten(1))


class VGG11(nn.Module):
    """VGG-11 (configuration A of Simonyan & Zisserman 2015) with norms and one linear layer.

    As the dataset condensation papers use it for 32 px images; larger ones leave a larger map to the linear layer.
    """

    def __init__(self, num_classes: int, image_size: int, norm: MakeNorm) -> None:
        super().__init__()
        self.features = nn.Sequential()
        inputs = 3
        for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
            for channels in stage:
                conv = nn.Conv2d(inputs, channels, 3, padding=1)
                self.features.extend([conv, norm(channels), nn.ReLU(inplace=True)])
                inputs = channels
            self.features.append(nn.MaxPool2d(2))
        self.classifier = nn.Linear(inputs * (image_size // 32) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016)."""

    expansion = 1  # channels out of a block by `outputs`

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


class PooledBlock(BasicBlock):
    """`BasicBlock` with average pooling after the first ReLU and no stride."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: MakeNorm, downsample: nn.Module) -> None:
        super().__init__(inputs, outputs, 1, norm, downsample)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions around a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, outputs: int, stride: int, norm: MakeNorm, downsample: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = norm(outputs)
        self.conv3 = nn.Conv2d(outputs, outputs * self.expansion, 1, bias=False)
        self.bn3 = norm(outputs * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ShortcutA(nn.Module):
    """Shortcut without parameters (option A of He et al. 2016).

    Every second pixel, zeros for the new channels.
    """

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))  # (B, C, S, S) -> (B, 2C, S/2, S/2)


class CifarResNet(nn.Module):
    """Thin ResNet for 32 px images (He et al. 2016, section 4.2).

    It has 6n+2 layers with 16, 32 and 64 channels.

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


class ResNet(nn.Module):
    """ResNets of four stages with torchvision's parameter names.

    Images up to 64 px get a 3x3 stem of stride 1 and no pool, those up to 128 px one with torchvision's max
    pool (IDC, Kim et al. 2022, and MinimaxDiffusion 969fc6f), larger ones the 7x7 stem of torchvision. With
    `PooledBlock` no convolution has a stride, as in ResNet-AP: the stem of larger images is 3x3 with a 2x2 average
    pool up to 128 px, then 7x7 with a 4x4 one (IDC).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, ...],
        num_classes: int,
        image_size: int,
        norm: MakeNorm,
        *,
        keep_map: bool = False,
        init: Init | None = None,
    ) -> None:
        """Build the layers.

        With `keep_map`, the classifier gets the last map and not its mean over the pixels.

        Above 64 px convolutions start from He's normal law over the outputs, as torchvision's and IDC's do. Up to
        64 px `init` decides. None: PyTorch's default, as in FADRM's, DC's and MTT's networks. "torchvision": He's law
        but for the stem, which RDED and SRe2L put into a finished network. "fan_out": He's law (IDC, Minimax).
        """
        super().__init__()
        pooled = block is PooledBlock
        self.maxpool: nn.Module = nn.Identity()
        kernel, stride, shrink = 3 if image_size <= MEDIUM else 7, 1, 1
        if pooled and image_size > SMALL:
            shrink = 2 if image_size <= MEDIUM else 4
            self.maxpool = nn.AvgPool2d(shrink)
        elif image_size > SMALL:
            stride = 1 if image_size <= MEDIUM else 2
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv1 = nn.Conv2d(3, 64, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn1 = norm(64)
        self.layer1 = self._stage(block, 64, 64, 1, blocks[0], norm)
        self.layer2 = self._stage(block, 64 * block.expansion, 128, 2, blocks[1], norm)
        self.layer3 = self._stage(block, 128 * block.expansion, 256, 2, blocks[2], norm)
        self.layer4 = self._stage(block, 256 * block.expansion, 512, 2, blocks[3], norm)
        self.keep_map = keep_map
        pixels = (image_size // shrink // 8) ** 2 if keep_map else 1
        self.fc = nn.Linear(512 * block.expansion * pixels, num_classes)
        if image_size <= SMALL and init is None:
            return
        for name, m in self.named_modules():
            replaced = image_size <= SMALL and init == "torchvision" and name == "conv1"
            if isinstance(m, nn.Conv2d) and not replaced:
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(
        block: type[BasicBlock] | type[Bottleneck], inputs: int, outputs: int, stride: int, count: int, norm: MakeNorm
    ) -> nn.Sequential:
        wide = outputs * block.expansion
        shortcut: nn.Module = nn.Identity()
        if block is PooledBlock and stride > 1:
            conv = nn.Conv2d(inputs, wide, 1, bias=False)
            shortcut = nn.Sequential(conv, nn.AvgPool2d(stride), norm(wide))
        elif inputs != wide:
            shortcut = nn.Sequential(nn.Conv2d(inputs, wide, 1, stride=stride, bias=False), norm(wide))
        first = block(inputs, outputs, stride, norm, shortcut)
        return nn.Sequential(first, *(block(wide, outputs, 1, norm, nn.Identity()) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.flatten(1) if self.keep_map else x.mean((2, 3)))
