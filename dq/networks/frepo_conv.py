"""ConvNet of FRePo (Zhou et al. 2022, arXiv 2206.00719): norm before convolution, doubling width."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

TRUNCATED_STD = 0.87962566103423978  # of a standard normal law cut at two standard deviations


class FrepoConv(nn.Module):
    """ConvNet of FRePo.

    `depth` blocks of [norm, but in the first] -> conv 3x3 of width 128, 256, ... -> ReLU -> 2x2 average pool, then
    a linear classifier on the flattened maps. LeCun-normal weights, zero biases. A side that the pools do not divide
    gets more padding in the first convolution, as the released code pads 28 px to 32.
    """

    def __init__(
        self, depth: int, num_classes: int, image_size: int, norm: Callable[[int], nn.Module], width: int = 128
    ) -> None:
        super().__init__()
        extra = (-image_size % 2**depth) // 2
        inputs = 3
        blocks: list[nn.Module] = []
        for i in range(depth):
            outputs = width * 2**i
            conv = nn.Conv2d(inputs, outputs, 3, padding=1 if i else 1 + extra)
            blocks += [*([norm(inputs)] if i else []), conv, nn.ReLU(inplace=True), nn.AvgPool2d(2)]
            inputs = outputs
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs * ((image_size + 2 * extra) >> depth) ** 2, num_classes)
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                lecun_normal_(m)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))  # (B, 3, S, S) -> (B, classes)


def lecun_normal_(layer: nn.Conv2d | nn.Linear) -> None:
    """Initialize a layer by LeCun-normal weights and zero biases, as Flax does.

    The normal law has variance 1 / fan-in and is cut at two standard deviations of the uncut law.
    """
    std = math.sqrt(1 / layer.weight[0].numel()) / TRUNCATED_STD
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
