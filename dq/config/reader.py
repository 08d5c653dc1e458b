"""Configurations as frozen dataclasses: values checked, read from plain data, changed by `key=value`, written back.

Unknown keys are refused with the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from dq.core.errors import InputError
from dq.core.text import short

C = TypeVar("C")
# Least values of settings by name; a trailing ">" leaves the bound itself out. All must be finite.
LEAST: dict[str, tuple[float, bool]] = {
    **dict.fromkeys(("batch_size", "resolution", "image_size", "n_init", "n_iter", "passes", "expand"), (1, True)),
    "dims": (1, True),
    "feature_weight": (0, True),
    **dict.fromkeys(("guidance_scale", "internal_guidance", "autoguidance"), (1, True)),
    "intermediate_head": (0, True),
    **dict.fromkeys(("num_inference_steps", "images_per_prototype", "check_images", "tests", "epochs"), (1, True)),
    **dict.fromkeys(("measure_entropy", "repulsion_ridge"), (0, False)),
    "repulsion": (0, True),
    "measure_iterations": (1, True),
    **dict.fromkeys(("candidates", "prototypes_per_class"), (1, True)),
    **dict.fromkeys(("accumulate", "shuffle", "top_k", "validation_images", "patch_factor"), (1, True)),
    **dict.fromkeys(("seeds", "full_seeds", "save_every", "patch_size", "num_layers"), (1, True)),
    **dict.fromkeys(("num_attention_heads", "attention_head_dim", "latent_channels", "layers_per_block"), (1, True)),
    **dict.fromkeys(("steps", "held_out"), (0, True)),
    "perceptual_weight": (0, True),
    **dict.fromkeys(("per_class", "neighbours", "shown"), (1, True)),
    **dict.fromkeys(("entropy", "snr", "strength", "temperature", "zeta", "mix_alpha", "checkpoint_s"), (0, False)),
    **dict.fromkeys(("tol", "momentum", "weight_decay", "kl_weight", "warmup_steps"), (0, True)),
    **dict.fromkeys(("rand_augment", "rand_magnitude", "crop_pad", "warmup"), (0, True)),
    "step_factor": (0, False),
    "test_scale": (1, True),  # the centre of a smaller image would be no whole one
    **dict.fromkeys(("ema", "dropout", "lr", "jitter", "lighting", "gt_weight", "flip"), (0, True)),
    **dict.fromkeys(("r_bn", "first_bn_weight", "class_weight", "proximity", "ramp", "recovery_lr"), (0, True)),
    **dict.fromkeys(
        ("retrieve_complexity", "recovery_epochs", "online_lr", "net_lr", "sampler_lr", "label_margin"), (0, True)
    ),
    **dict.fromkeys(("threshold", "outer_temperature"), (0, False)),
    **dict.fromkeys(("bn_share", "weight"), (0, False)),
    **dict.fromkeys(("min_classes", "retrieve_pool", "size", "statistics_images", "runs", "score_epoch"), (1, True)),
    **dict.fromkeys(("keep_per_ipc", "keep_share"), (0, True)),
    "cad_window": (2, True),
    "outside_weight": (0, False),
}


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    """Types of the fields of a class; every look-up evaluates the annotations, which takes longer than all checks."""
    return typing.get_type_hints(cls)


class Checked:
    """Refuses values that no code could use, however a configuration was made."""

    @classmethod
    def variant(cls, data: Any, where: str) -> type[Checked]:
        """The class that plain data are to be read as: this one, unless a subclass chooses by the data."""
        return cls

    def __post_init__(self) -> None:
        hints = _type_hints(type(self))  # type: ignore[arg-type]  # mypy takes the class for an instance
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if get_origin(hints[f.name]) is Literal and value not in get_args(hints[f.name]):
                options = ", ".join(map(repr, get_args(hints[f.name])))
                raise InputError(f"{f.name} must be one of {options}, not {short(value)}")
            if isinstance(value, float) and math.isnan(value):
                raise InputError(f"{f.name} must be a number, not {short(value)}")
            if f.name in LEAST and isinstance(value, int | float):
                least, inclusive = LEAST[f.name]
                if not (value >= least if inclusive else value > least) or value == float("inf"):
                    bound = f"at least {least:g}" if inclusive else f"more than {least:g}"
                    raise InputError(f"{f.name} must be {bound} and finite, not {short(value)}")
            if isinstance(value, float) and math.isinf(value):
                raise InputError(f"{f.name} must be finite, not {short(value)}")


def from_dict(cls: type[C], data: Any, where: str = "") -> C:
    """Build a config dataclass from plain data, checking every key and type on the way."""
    return _build(cls, data, where)


def _build(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if issubclass(hint, Checked):
            hint = hint.variant(value, where)
        if not isinstance(value, dict):
            raise InputError(f"{where or 'the configuration'} must be a mapping of settings, not {short(value)}")
        hints = _type_hints(hint)
        for key in value:
            if key not in hints:
                raise InputError(unknown_key(f"{where}.{key}".lstrip("."), str(key), list(hints)))
        values = {k: _build(hints[k], v, f"{where}.{k}".lstrip(".")) for k, v in value.items()}
        try:
            return hint(**values)
        except InputError as e:
            raise InputError(f"{where}.{e}".lstrip(".")) from None
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        some = [a for a in args if a is not type(None)]
        words = [v for a in some if get_origin(a) is Literal for v in get_args(a)] if len(some) > 1 else []
        if value in words:
            return value
        try:
            return _build(next((a for a in some if get_origin(a) is not Literal), some[0]), value, where)
        except InputError as e:
            raise InputError(f"{e}, or {' or '.join(map(repr, words))}" if words else str(e)) from None
    if origin is Literal:
        if value not in args:
            raise InputError(f"{where} must be one of {', '.join(map(repr, args))}, not {short(value)}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where} must be a mapping, not {short(value)}")
        return {str(k): _build(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} must be a list, not {short(value)}")
        return tuple(_build(args[0], v, f"{where}.{i}") for i, v in enumerate(value))
    if hint is float and isinstance(value, str | int) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except (OverflowError, ValueError):
            raise InputError(f"{where} must be a number, not {short(value)}") from None
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise InputError(f"{where} must be {names.get(hint, hint)}, not {short(value)}")
    return value


def unknown_key(where: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return f"unknown setting {where!r}; {hint}"


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data of a config dataclass (tuples become lists), such that `from_dict` gives an equal one back."""

    def plain(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: plain(x) for k, x in v.items()}
        return [plain(x) for x in v] if isinstance(v, (list, tuple)) else v

    return plain(dataclasses.asdict(config))


def dump_config(config: Any) -> str:
    """YAML text of a config; `load_config` on it gives an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=100)
