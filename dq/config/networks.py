"""Names of the networks that `dq.networks.zoo` builds."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from dq.config.students import LIBRARIES, is_library_net
from dq.core.errors import InputError
from dq.core.text import similar_names

NETWORKS = (
    *("convnet3", "convnet4", "convnet5", "convnet6", "convnet3w32"),
    *("frepoconv3", "frepoconv4", "frepoconv5", "frepoconv3w32"),
    *("resnet20", "resnet56", "resnet18", "resnet50", "resnet101", "resnet18ap", "resnetap10"),
    *("alexnet", "vgg11", "mobilenetv2", "shufflenetv2", "shufflenetv2x05", "densenet121"),
)
SIZED = re.compile(r"convnet([2-6])w([1-9]\d{0,3})")  # a ConvNet of another depth or width
NORM_ENDINGS = ("in", "bn", "none")
TEACHERS_ONLY = ("transformers", "pool")  # networks of a teacher alone


def is_network(name: str) -> bool:
    """Whether a name is one of dq, or one that a library may know."""
    base, _, ending = name.partition("-")
    return is_library_net(name) or (
        (base in NETWORKS or SIZED.fullmatch(base) is not None) and ending in ("", *NORM_ENDINGS)
    )


def unknown_network(name: str) -> InputError:
    """The error on a name that is none, with similar ones."""
    near = similar_names(name, NETWORKS, count=3)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    names = ", ".join([*NETWORKS, *(f"{prefix}:NAME" for prefix in LIBRARIES)])
    return InputError(
        f"no network is called {name!r}{hint}; choose among {names}, "
        "the ones without a colon also with -bn, -in or -none for another norm"
    )


def named_networks(config: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Settings that name a network, with the names.

    Students, and networks of teachers alone, are left out.
    """
    for f in dataclasses.fields(config):
        value, path = getattr(config, f.name), f"{where}.{f.name}".lstrip(".")
        items = {path: value}
        if isinstance(value, dict):
            items = {f"{path}.{k}": v for k, v in value.items()}
        elif isinstance(value, tuple):
            items = {f"{path}.{i}": v for i, v in enumerate(value)}
        for key, item in items.items():
            if dataclasses.is_dataclass(item):
                yield from named_networks(item, key)
            elif f.name in ("net", "nets") and isinstance(item, str) and item not in TEACHERS_ONLY:
                yield key, item
