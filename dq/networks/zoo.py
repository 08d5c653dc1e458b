"""Build the networks of students and teachers by name: `make_net`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from dq.config.networks import SIZED, unknown_network
from dq.config.students import is_library_net
from dq.core.errors import InputError
from dq.core.seeds import seeded
from dq.networks.classic import (
    MEDIUM,
    VGG11,
    AlexNet,
    BasicBlock,
    Bottleneck,
    CifarResNet,
    ConvNet,
    Init,
    MakeNorm,
    Norm,
    PooledBlock,
    ResNet,
    instance_norm,
)
from dq.networks.external import library_net
from dq.networks.frepo_conv import FrepoConv
from dq.networks.torchvision_like import DenseNet121, MobileNetV2, ShuffleNetV2

NORMS: dict[Norm, MakeNorm] = {
    "instance": instance_norm,
    "batch": nn.BatchNorm2d,
    "none": lambda channels: nn.Identity(),
}
SUFFIXES: dict[str, Norm] = {"in": "instance", "bn": "batch", "none": "none"}


class Recipe(NamedTuple):
    norm: Norm | None  # the usual one; None: the network has none
    smallest: int  # side in px; the last norm needs maps of 2x2, for over one pixel instance norm is constant
    build: Callable[..., nn.Module]  # (classes, side in px, norm), and `init` where there is a choice
    init: bool = False  # whether images of up to 64 px have a choice of initialization


RECIPES: dict[str, Recipe] = {
    **{f"convnet{depth}": Recipe("instance", 2**depth, partial(ConvNet, depth)) for depth in (3, 4, 5, 6)},
    # a quarter of the width and about five times the speed, for comparisons of many sets on a CPU
    "convnet3w32": Recipe("instance", 8, partial(ConvNet, 3, width=32)),
    **{f"frepoconv{depth}": Recipe("batch", 2**depth, partial(FrepoConv, depth)) for depth in (3, 4, 5)},
    "frepoconv3w32": Recipe("batch", 8, partial(FrepoConv, 3, width=32)),  # a quarter of the width, for CPUs
    "resnet20": Recipe("batch", 5, lambda classes, side, norm: CifarResNet(3, classes, norm)),
    "resnet56": Recipe("batch", 5, lambda classes, side, norm: CifarResNet(9, classes, norm)),
    "resnet18": Recipe("batch", 9, partial(ResNet, BasicBlock, (2, 2, 2, 2)), init=True),
    "resnet50": Recipe("batch", 9, partial(ResNet, Bottleneck, (3, 4, 6, 3)), init=True),
    "resnet101": Recipe("batch", 9, partial(ResNet, Bottleneck, (3, 4, 23, 3)), init=True),
    # the ResNet18BN_AP of the dataset condensation code, whose classifier sees the whole last map
    "resnet18ap": Recipe("batch", 16, partial(ResNet, PooledBlock, (2, 2, 2, 2), keep_map=True)),
    "resnetap10": Recipe("instance", 16, partial(ResNet, PooledBlock, (1, 1, 1, 1), init="fan_out")),
    "alexnet": Recipe(None, 8, lambda classes, side, norm: AlexNet(classes, side)),
    "vgg11": Recipe("instance", 32, VGG11),
    "mobilenetv2": Recipe("batch", 9, MobileNetV2),
    "shufflenetv2": Recipe("batch", 9, partial(ShuffleNetV2, (116, 232, 464))),
    "shufflenetv2x05": Recipe("batch", 9, partial(ShuffleNetV2, (48, 96, 192))),
    "densenet121": Recipe("batch", 16, DenseNet121),
}


def recipe_of(name: str) -> Recipe | None:
    """Return the recipe of a name without its ending.

    Also of a ConvNet of any depth from 2 and any width, such as convnet2w16.
    """
    sized = SIZED.fullmatch(name)
    if name in RECIPES or sized is None:
        return RECIPES.get(name)
    depth, width = map(int, sized.groups())
    return Recipe("instance", 2**depth, partial(ConvNet, depth, width=width))


def fast_layout(net: nn.Module) -> torch.memory_format:
    """Return the memory format in which `net` trains fastest.

    Channels last, except with group norm, which is slow in it. Measured on a CPU; activations take the layout of the
    first weights.
    """
    has_group_norm = any(isinstance(m, nn.GroupNorm) for m in net.modules())
    return torch.contiguous_format if has_group_norm else torch.channels_last


def move_net(net: nn.Module, device: torch.device | str) -> None:
    """Move a network to a device, in its fastest layout."""
    net.to(device, memory_format=fast_layout(net))  # type: ignore[call-overload]  # a keyword the stubs lack


def make_net(
    name: str, num_classes: int, image_size: int, *, norm: Norm | None = None, init: Init | None = None, seed: int
) -> nn.Module:
    """Build a network for (B, 3, `image_size`, `image_size`) images with freshly drawn weights, on the CPU.

    Args:
        name: one of `RECIPES`, a ConvNet of another width such as convnet3w64, or timm:NAME or torchvision:NAME for a
            classifier of those libraries. With "-bn", "-in" or "-none" behind a name without a colon, batch norm,
            instance norm or none takes the place of the usual one (instance norm for ConvNets, VGG-11 and ResNetAP-10,
            batch norm for the others; AlexNet has no norm).
        num_classes: length of the output.
        image_size: side of the images in px; classifiers and stems depend on it.
        norm: the same choice as the ending of `name`, for callers that have it as a value.
        init: of a ResNet-18, -50 or -101 for images up to 64 px, see `ResNet`; larger images have one alone.
        seed: of the weights. The global random state is neither read nor changed.

    Raises:
        InputError: if the name is unknown, its library is not installed, or the images are too small for the depth.
    """
    if is_library_net(name):
        if norm is not None:
            raise InputError(f"network {name!r} comes with its own norm; leave norm={norm!r} out")
        if init is not None:
            raise InputError(f"network {name!r} comes with its own initialization; leave init={init!r} out")
        with seeded(seed):
            return library_net(name, num_classes, image_size)
    base, _, suffix = name.partition("-")
    recipe = recipe_of(base)
    if recipe is None or (suffix and suffix not in SUFFIXES):
        raise unknown_network(name)
    if norm is not None and norm not in NORMS:
        raise InputError(f"norm must be 'instance', 'batch' or 'none', not {norm!r}")
    if suffix and norm not in (None, SUFFIXES[suffix]):
        raise InputError(f"network {name!r} asks for {SUFFIXES[suffix]} norm but norm={norm!r}; give only one of them")
    if recipe.norm is None and (suffix or norm):
        raise InputError(f"network {base!r} has no norm that could be chosen; call it plain {base!r}")
    if init is not None and not recipe.init:
        having = ", ".join(n for n, r in RECIPES.items() if r.init)
        raise InputError(f"network {base!r} has one initialization, {having} have several; leave init={init!r} out")
    if init not in (None, *get_args(Init)):
        raise InputError(f"init must be one of {', '.join(map(repr, get_args(Init)))}, not {init!r}")
    if image_size < recipe.smallest:
        raise InputError(
            f"network {name!r} needs images of at least {recipe.smallest} px, not {image_size}; "
            "choose a shallower network or raise source.image_size"
        )
    kind = norm or (SUFFIXES[suffix] if suffix else recipe.norm) or "batch"
    with seeded(seed):
        return recipe.build(num_classes, image_size, NORMS[kind], **({"init": init} if recipe.init else {}))


def check_net(
    name: str, num_classes: int, image_size: int, *, norm: Norm | None = None, init: Init | None = None
) -> None:
    """Check that `make_net` can build a network, without memory for its weights or time to draw them.

    Networks of libraries are built as they are.

    Raises:
        InputError: as `make_net` does.
    """
    with contextlib.nullcontext() if is_library_net(name) else torch.device("meta"):
        make_net(name, num_classes, image_size, norm=norm, init=init, seed=0)


def has_norm_choice(name: str) -> bool:
    """Return whether `make_net` takes a `norm` for a name.

    It does not for names that include it, libraries, and networks without a norm.
    """
    recipe = recipe_of(name)
    return not is_library_net(name) and "-" not in name and (recipe is None or recipe.norm is not None)


def net_of_weights(name: str, num_classes: int, image_size: int, state: Mapping[str, Tensor]) -> nn.Module:
    """Build the network that saved weights belong to, with fresh weights.

    ResNets take the stem that their weights have: a 7x7 one is torchvision's at any side. Published weights have it,
    and so have those that this package saved for 65 to 128 px before such images got a 3x3 stem.
    """
    stem = state.get("conv1.weight")
    base = recipe_of(name.partition("-")[0])
    if base is not None and base.init and stem is not None and stem.shape[-1] == 7:
        image_size = max(image_size, MEDIUM + 1)
    return make_net(name, num_classes, image_size, seed=0)
