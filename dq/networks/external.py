"""Networks of timm and torchvision."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
from collections.abc import Iterable, Iterator
from types import ModuleType

from torch import nn

from dq.config.students import LIBRARIES
from dq.core.errors import InputError
from dq.core.text import similar_names

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # overrides the arguments of torch.load


def nearest_names(name: str, names: Iterable[str]) -> str:
    """Return the end of a message that lists similar names, empty without any."""
    near = similar_names(name, names, count=3)
    return f"; nearest: {', '.join(near)}" if near else ""


def library_of(name: str) -> tuple[ModuleType, str]:
    """Return the module that builds timm:NAME or torchvision:NAME, and NAME.

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
    names = library.list_models() if prefix == "timm" else library.list_models(module=library)
    if not (library.is_model(inner) if prefix == "timm" else inner in names):
        near = nearest_names(inner, names)
        raise InputError(
            f"{prefix} has no classifier called {inner!r}{near}; list them with {LIBRARIES[prefix]}.list_models()"
        )
    return library, inner


def published_outputs(name: str) -> int | None:
    """Return the number of outputs of timm:NAME or torchvision:NAME as published; None: unknown.

    Raises:
        InputError: if the library or the network does not exist, or it has no published weights.
    """
    library, inner = library_of(name)
    if name.startswith("timm:"):
        if not library.is_model_pretrained(inner):
            raise InputError(f"timm has no published weights of {inner!r}; set teachers.N.path to a safetensors file")
        return library.get_pretrained_cfg(inner).num_classes or None
    return len(library.get_model_weights(inner).DEFAULT.meta.get("categories", ())) or None


def library_net(name: str, num_classes: int | None, image_size: int, *, pretrained: bool = False) -> nn.Module:
    """Build timm:NAME or torchvision:NAME, with the library's own published weights if `pretrained`.

    timm takes safetensors where they are published; the files of torchvision are those of torch.save, and are opened
    by a reader of tensors only that runs no code. `num_classes` is the length of the output; None: as published.
    `image_size` is the side of the images in px, for networks that are built for one side.

    Raises:
        InputError: if the library, the network or its published weights cannot be had, or not for this side.
    """
    library, inner = library_of(name)
    options: dict[str, object] = {} if num_classes is None else {"num_classes": num_classes}
    if name.startswith("timm:"):
        options["pretrained"] = pretrained
        if pretrained:
            published_outputs(name)
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
        message = f"{type(e).__name__}: {' '.join(str(e).split())[:150]}"
        if pretrained:
            raise InputError(
                f"the published weights of {name!r} cannot be had ({message}); "
                "get them elsewhere, save them as safetensors and set teachers.N.path to that file"
            ) from e
        raise InputError(
            f"network {name!r} cannot be built for {image_size} px images ({message}); choose another"
        ) from e


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Let `torch.load` of any library unpickle tensors only, within the block."""
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCED]
        else:
            os.environ[FORCED] = before
