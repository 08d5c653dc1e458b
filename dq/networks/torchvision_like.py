"""More of torchvision's architectures, with FADRM's variants for small images.

torchvision cannot be imported beside every build of torch, and its networks shrink the maps of 32 px images to 1 px.
Images up to 64 px get the networks of FADRM's released code (f445e38): a stem of stride 1 without a pool, and
PyTorch's default initialization.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq.networks.classic import SMALL, MakeNorm


def _conv_norm(
    inputs: int, outputs: int, kernel: int, norm: MakeNorm, *, stride: int = 1, groups: int = 1, act: nn.Module | None
) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, norm(outputs), *([act] if act is not None else [])]


class InvertedResidual(nn.Module):
    """Inverted residual block (Sandler et al. 2018, table 1).

    1x1 expansion, 3x3 depthwise, 1x1 projection without activation.

    The `small` one has ReLU in place of ReLU6, a 1x1 convolution before the depthwise one even without expansion, and
    where stride 1 changes the channels a convolution in the shortcut.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, expand: int, norm: MakeNorm, *, small: bool = False
    ) -> None:
        super().__init__()
        hidden = inputs * expand
        activation = nn.ReLU if small else nn.ReLU6
        layers: list[nn.Module] = []
        if expand != 1 or small:
            layers.append(nn.Sequential(*_conv_norm(inputs, hidden, 1, norm, act=activation())))
        depthwise = _conv_norm(hidden, hidden, 3, norm, stride=stride, groups=hidden, act=activation())
        layers += [nn.Sequential(*depthwise), *_conv_norm(hidden, outputs, 1, norm, act=None)]
        self.conv = nn.Sequential(*layers)
        self.shortcut: nn.Module | None = None
        if stride == 1 and inputs == outputs:
            self.shortcut = nn.Identity()
        elif stride == 1 and small:
            self.shortcut = nn.Sequential(*_conv_norm(inputs, outputs, 1, norm, act=None))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.shortcut is None else self.shortcut(x) + self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018, table 2).

    Up to 64 px FADRM's: stride 1 in the second stage, the small `InvertedResidual` and no dropout.
    """

    # expansion, channels, blocks, stride of the first
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, num_classes: int, image_size: int, norm: MakeNorm) -> None:
        super().__init__()
        small = image_size <= SMALL
        activation = nn.ReLU if small else nn.ReLU6
        layers: list[nn.Module] = [
            nn.Sequential(*_conv_norm(3, 32, 3, norm, stride=1 if small else 2, act=activation()))
        ]
        inputs = 32
        for stage, (expand, outputs, blocks, first) in enumerate(self.STAGES, 1):
            for i in range(blocks):
                stride = first if i == 0 and not (small and stage == 2) else 1
                layers.append(InvertedResidual(inputs, outputs, stride, expand, norm, small=small))
                inputs = outputs
        layers.append(nn.Sequential(*_conv_norm(inputs, 1280, 1, norm, act=activation())))
        self.features = nn.Sequential(*layers)
        head = nn.Linear(1280, num_classes)
        self.classifier = nn.Sequential(nn.Identity() if small else nn.Dropout(0.2), head)
        if small:
            return
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class ShuffleUnit(nn.Module):
    """Unit of ShuffleNetV2 (Ma et al. 2018, figure 3 c and d).

    Half of the channels pass, the other half go through 1x1, 3x3 depthwise, 1x1; then the halves are interleaved.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: MakeNorm) -> None:
        super().__init__()
        half = outputs // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            depthwise = _conv_norm(inputs, inputs, 3, norm, stride=stride, groups=inputs, act=None)
            self.branch1.extend([*depthwise, *_conv_norm(inputs, half, 1, norm, act=nn.ReLU())])
        self.branch2 = nn.Sequential(
            *_conv_norm(inputs if stride > 1 else half, half, 1, norm, act=nn.ReLU()),
            *_conv_norm(half, half, 3, norm, stride=stride, groups=half, act=None),
            *_conv_norm(half, half, 1, norm, act=nn.ReLU()),
        )
        self.shrinks = stride > 1

    def forward(self, x: Tensor) -> Tensor:
        left, right = (self.branch1(x), x) if self.shrinks else x.chunk(2, 1)
        both = torch.cat([left, self.branch2(right)], 1)
        b, c, h, w = both.shape
        return both.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 (Ma et al. 2018, table 5).

    `widths` are the channels of its stages, (48, 96, 192) for x0.5.
    """

    def __init__(self, widths: tuple[int, int, int], num_classes: int, image_size: int, norm: MakeNorm) -> None:
        super().__init__()
        small = image_size <= SMALL
        self.conv1 = nn.Sequential(*_conv_norm(3, 24, 3, norm, stride=1 if small else 2, act=nn.ReLU()))
        self.maxpool: nn.Module = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        inputs, stages = 24, []
        for outputs, blocks in zip(widths, (4, 8, 4), strict=True):
            units = [ShuffleUnit(inputs, outputs, 2, norm)]
            stages.append(nn.Sequential(*units, *(ShuffleUnit(outputs, outputs, 1, norm) for _ in range(blocks - 1))))
            inputs = outputs
        self.stage2, self.stage3, self.stage4 = stages
        self.conv5 = nn.Sequential(*_conv_norm(inputs, 1024, 1, norm, act=nn.ReLU()))
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.maxpool(self.conv1(x)))))
        return self.fc(self.conv5(x).mean((2, 3)))


class DenseLayer(nn.Module):
    """Layer of DenseNet (Huang et al. 2017).

    Norm, ReLU, 1x1 to four times the growth; norm, ReLU, 3x3; appended to the input.
    """

    def __init__(self, inputs: int, growth: int, norm: MakeNorm) -> None:
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = norm(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


class DenseNet121(nn.Module):
    """DenseNet-121 (Huang et al. 2017, table 1).

    Growth 32, blocks of 6, 12, 24 and 16 layers, transitions that halve channels.

    Up to 64 px FADRM's, without norm and ReLU behind the stem.
    """

    def __init__(self, num_classes: int, image_size: int, norm: MakeNorm) -> None:
        super().__init__()
        small = image_size <= SMALL
        kernel, stride = (3, 1) if small else (7, 2)
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, 64, kernel, stride=stride, padding=kernel // 2, bias=False))
        if not small:
            self.features.add_module("norm0", norm(64))
            self.features.add_module("relu0", nn.ReLU())
            self.features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
        channels, growth = 64, 32
        for i, layers in enumerate((6, 12, 24, 16), 1):
            block = nn.Sequential()
            for j in range(1, layers + 1):
                block.add_module(f"denselayer{j}", DenseLayer(channels, growth, norm))
                channels += growth
            self.features.add_module(f"denseblock{i}", block)
            if i < 4:
                transition = nn.Sequential()
                transition.add_module("norm", norm(channels))
                transition.add_module("relu", nn.ReLU())
                transition.add_module("conv", nn.Conv2d(channels, channels // 2, 1, bias=False))
                transition.add_module("pool", nn.AvgPool2d(2))
                self.features.add_module(f"transition{i}", transition)
                channels //= 2
        self.features.add_module("norm5", norm(channels))
        self.classifier = nn.Linear(channels, num_classes)
        if small:
            return
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.features(x)).mean((2, 3)))
