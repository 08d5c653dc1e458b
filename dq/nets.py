"""The networks that learn from a distilled set (students) or label it (teachers), behind one door: `make_net`."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq.config.students import LIBRARIES
from dq.core.errors import InputError
from dq.core.seeds import seeded
from dq.torchvision_nets import DenseNet121, MobileNetV2, ShuffleNetV2

Norm = Literal["instance", "batch"]
MakeNorm = Callable[[int], nn.Module]


def instance_norm(channels: int) -> nn.Module:
    """Affine instance norm. Group norm with one channel per group is the same function, and on a CPU the fastest of
    the seven ways to write it that we measured, forward and backward."""
    return nn.GroupNorm(channels, channels)


NORMS: dict[Norm, MakeNorm] = {"instance": instance_norm, "batch": nn.BatchNorm2d}
SUFFIXES: dict[str, Norm] = {"in": "instance", "bn": "batch"}
FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load obeys it whatever its caller says


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


class AlexNet(nn.Module):
    """The AlexNet of the dataset condensation papers for 32 px images: five convolutions, no norm, a linear layer."""

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
    """Configuration A of Simonyan & Zisserman 2015 with a norm behind every convolution and one linear layer, as the
    dataset condensation papers use it for 32 px images; larger ones leave a larger map to the linear layer."""

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
    """A `BasicBlock` that shrinks its maps by average pooling behind the first ReLU, not by a strided convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: MakeNorm, downsample: nn.Module) -> None:
        super().__init__(inputs, outputs, 1, norm, downsample)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; the stride is that of the 3x3 one, as in torchvision."""

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


class ResNet(nn.Module):
    """ResNets of four stages with torchvision's parameter names.

    Images up to 64 px get a 3x3 stem of stride 1 and no pool behind it. With `PooledBlock` no convolution has a
    stride, as in ResNet-AP: the stem of larger images is 3x3 with a 2x2 average pool up to 128 px, then 7x7 with a
    4x4 one (IDC, Kim et al. 2022).
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
    ) -> None:
        """With `keep_map`, the classifier sees the last map itself and not its mean over the pixels."""
        super().__init__()
        pooled = block is PooledBlock
        self.maxpool: nn.Module = nn.Identity()
        kernel, stride, shrink = 3, 1, 1
        if pooled and image_size > 64:
            kernel, shrink = (3, 2) if image_size <= 128 else (7, 4)
            self.maxpool = nn.AvgPool2d(shrink)
        elif image_size > 64:
            kernel, stride = 7, 2
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
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
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


class Recipe(NamedTuple):
    norm: Norm | None  # the usual one; None: the network has none
    smallest: int  # side in px; the last norm needs maps of 2x2, for over one pixel instance norm is constant
    build: Callable[[int, int, MakeNorm], nn.Module]  # (classes, side in px, norm)


RECIPES: dict[str, Recipe] = {
    **{f"convnet{depth}": Recipe("instance", 2**depth, partial(ConvNet, depth)) for depth in (3, 4, 5, 6)},
    # a quarter of the width and about five times the speed, for comparisons of many sets on a CPU
    "convnet3w32": Recipe("instance", 8, partial(ConvNet, 3, width=32)),
    "resnet20": Recipe("batch", 5, lambda classes, side, norm: CifarResNet(3, classes, norm)),
    "resnet56": Recipe("batch", 5, lambda classes, side, norm: CifarResNet(9, classes, norm)),
    "resnet18": Recipe("batch", 9, partial(ResNet, BasicBlock, (2, 2, 2, 2))),
    "resnet50": Recipe("batch", 9, partial(ResNet, Bottleneck, (3, 4, 6, 3))),
    "resnet101": Recipe("batch", 9, partial(ResNet, Bottleneck, (3, 4, 23, 3))),
    # the ResNet18BN_AP of the dataset condensation code, whose classifier sees the whole last map
    "resnet18ap": Recipe("batch", 16, partial(ResNet, PooledBlock, (2, 2, 2, 2), keep_map=True)),
    "resnetap10": Recipe("instance", 16, partial(ResNet, PooledBlock, (1, 1, 1, 1))),
    "alexnet": Recipe(None, 8, lambda classes, side, norm: AlexNet(classes, side)),
    "vgg11": Recipe("instance", 32, VGG11),
    "mobilenetv2": Recipe("batch", 17, MobileNetV2),
    "shufflenetv2": Recipe("batch", 9, partial(ShuffleNetV2, (116, 232, 464))),
    "shufflenetv2x05": Recipe("batch", 9, partial(ShuffleNetV2, (48, 96, 192))),
    "densenet121": Recipe("batch", 16, DenseNet121),
}


def fast_layout(net: nn.Module) -> torch.memory_format:
    """The layout of weights and activations in which `net` trains fastest: channels last, save with group norm, which
    is slow in that layout. Measured on a CPU; activations take the layout of the first weights."""
    grouped = any(isinstance(m, nn.GroupNorm) for m in net.modules())
    return torch.contiguous_format if grouped else torch.channels_last


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else ""


def library_of(name: str) -> tuple[ModuleType, str]:
    """The module that builds timm:NAME or torchvision:NAME, and NAME.

    Raises:
        InputError: if the library is not installed, or knows no classifier of that name.
    """
    prefix, _, inner = name.partition(":")
    try:
        library = importlib.import_module(LIBRARIES[prefix])
    except ImportError as e:
        raise InputError(
            f"network {name!r} needs {prefix}, which is not installed; pip install 'dq-distill[vision]'"
        ) from e
    # torchvision.models also lists detectors and video networks, in modules of their own
    known = library.list_models() if prefix == "timm" else library.list_models(module=library)
    if not (library.is_model(inner) if prefix == "timm" else inner in known):
        near = _nearest(inner, known)
        raise InputError(
            f"{prefix} has no classifier called {inner!r}{near}; list them with {LIBRARIES[prefix]}.list_models()"
        )
    return library, inner


def library_net(name: str, num_classes: int | None, image_size: int, *, pretrained: bool = False) -> nn.Module:
    """Build timm:NAME or torchvision:NAME, with the library's own published weights if `pretrained`.

    timm takes safetensors where they are published; the files of torchvision are those of torch.save, and are opened
    by a reader that knows tensors only and runs no code.

    Args:
        num_classes: length of the output; None: as published.
        image_size: side of the images in px, for networks that are built for one side.

    Raises:
        InputError: if the library, the network or its published weights cannot be had, or not for this side.
    """
    library, inner = library_of(name)
    options: dict[str, object] = {} if num_classes is None else {"num_classes": num_classes}
    if name.startswith("timm:"):
        options["pretrained"] = pretrained
        if pretrained and not library.is_model_pretrained(inner):
            raise InputError(f"timm has no published weights of {inner!r}; set teachers.N.path to a safetensors file")
        if not pretrained and library.get_pretrained_cfg(inner).fixed_input_size:
            options["img_size"] = image_size
    else:
        options["weights"] = library.get_model_weights(inner).DEFAULT if pretrained else None
        if inner.startswith("vit_") and not pretrained:
            options["image_size"] = image_size
        if inner.startswith("maxvit_") and not pretrained:
            options["input_size"] = (image_size, image_size)
        if inner in ("googlenet", "inception_v3") and not pretrained:
            # their auxiliary classifiers would make a tuple of the output in training mode
            options |= {"aux_logits": False, "init_weights": True}
    try:
        with tensors_only():
            return (library.create_model if name.startswith("timm:") else library.get_model)(inner, **options)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as e:
        said = f"{type(e).__name__}: {' '.join(str(e).split())[:150]}"
        if pretrained:
            raise InputError(
                f"the published weights of {name!r} cannot be had ({said}); "
                "download them elsewhere and set teachers.N.path to a safetensors file"
            ) from e
        raise InputError(
            f"network {name!r} cannot be built for {image_size} px images ({said}); choose another"
        ) from e


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Within the block no `torch.load` of any library unpickles more than tensors."""
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCED]
        else:
            os.environ[FORCED] = before


def make_net(name: str, num_classes: int, image_size: int, *, norm: Norm | None = None, seed: int) -> nn.Module:
    """Build a network for (B, 3, `image_size`, `image_size`) images with freshly drawn weights, on the CPU.

    Args:
        name: one of `RECIPES`, or timm:NAME or torchvision:NAME for a classifier of those libraries. With "-bn" or
            "-in" behind a name of `RECIPES`, batch norm or instance norm takes the place of the usual one (instance
            norm for ConvNets, VGG-11 and ResNetAP-10, batch norm for the other ResNets; AlexNet has no norm).
        num_classes: length of the output.
        image_size: side of the images in px; classifiers and stems depend on it.
        norm: the same choice as the ending of `name`, for callers that have it as a value.
        seed: of the weights. The global random state is neither read nor changed.

    Raises:
        InputError: if the name is unknown, its library is not installed, or the images are too small for the depth.
    """
    if is_library_net(name):
        if norm is not None:
            raise InputError(f"network {name!r} comes with its own norm; leave norm={norm!r} out")
        with seeded(seed):
            return library_net(name, num_classes, image_size)
    base, _, suffix = name.partition("-")
    if base not in RECIPES or (suffix and suffix not in SUFFIXES):
        known = ", ".join([*RECIPES, *(f"{prefix}:NAME" for prefix in LIBRARIES)])
        raise InputError(
            f"no network is called {name!r}{_nearest(name, RECIPES)}; choose among {known}, "
            "the ones without a colon also with -bn or -in for another norm"
        )
    recipe = RECIPES[base]
    if norm is not None and norm not in NORMS:
        raise InputError(f"norm must be 'instance' or 'batch', not {norm!r}")
    if suffix and norm not in (None, SUFFIXES[suffix]):
        raise InputError(f"network {name!r} asks for {SUFFIXES[suffix]} norm but norm={norm!r}; give only one of them")
    if recipe.norm is None and (suffix or norm):
        raise InputError(f"network {base!r} has no norm that could be chosen; call it plain {base!r}")
    if image_size < recipe.smallest:
        raise InputError(
            f"network {name!r} needs images of at least {recipe.smallest} px, not {image_size}; "
            "choose a shallower network or raise source.image_size"
        )
    kind = norm or (SUFFIXES[suffix] if suffix else recipe.norm) or "batch"
    with seeded(seed):
        return recipe.build(num_classes, image_size, NORMS[kind])
