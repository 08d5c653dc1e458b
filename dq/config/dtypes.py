"""Resolution of `dtype: auto` to the fast dtype of a device.

A folder that was begun on another device keeps its dtype.

Settings are resolved once, when a run, a training or an evaluation is opened. From then on only resolved values are
seen, in digests, caches and records; the configuration that was asked for keeps its "auto".
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from dq.config.schema import CodecConfig, GenerateConfig
from dq.core.devices import Use, is_slow, resolve_dtype
from dq.core.files import is_done, read_json, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("dq")
C = TypeVar("C")

RECORD = ".dtypes.json"  # in every output folder: what auto stands for there
USES: tuple[Use, ...] = ("inference", "training")
Dtypes = dict[Use, str]
_noted: set[str] = set()


def device_dtypes(device: torch.device | str) -> Dtypes:
    """What auto stands for on a device, by use."""
    return {use: resolve_dtype("auto", device, use) for use in USES}


def folder_dtypes(
    folder: Path, where: Accelerator | torch.device | str, *, begun: str | None = None, forget: bool = False
) -> Dtypes:
    """Dtypes of `auto` in an output folder: recorded ones, else those of the device.

    Nothing is written.

    Args:
        folder: the folder.
        where: the accelerator, whose processes all get that of the main one, or this process's device.
        begun: dtype of a folder that was begun when no record was kept; None: the folder is new.
        forget: the folder holds no work, so that its record does not matter.
    """
    from accelerate.utils import broadcast_object_list

    alone = isinstance(where, (str, torch.device))
    device = where if isinstance(where, (str, torch.device)) else where.device
    path = folder / RECORD
    if is_done(path) and not forget:
        dtypes = {use: str(read_json(path)[use]) for use in USES}
    else:
        dtypes = device_dtypes(device) if begun is None else dict.fromkeys(USES, begun)
    agreed = [dtypes]
    if alone:
        return dtypes
    broadcast_object_list(agreed)
    for dtype in sorted(set(agreed[0].values())):
        note_slow(dtype, device, f"dtype=auto stays {dtype} in {folder}, which was begun so")
    return agreed[0]


def note_slow(dtype: str, device: torch.device | str, sentence: str) -> None:
    """Log a sentence on a dtype that the device is slow in, once."""
    if is_slow(dtype, device) and sentence not in _noted:
        _noted.add(sentence)
        log.info("%s, although that is slow here", sentence)


def record_dtypes(folder: Path, dtypes: Dtypes, *, main: bool = True) -> None:
    """Write the dtypes of `auto` to a folder that lacks them, in the main process."""
    path = folder / RECORD
    if main and not (is_done(path) and {use: read_json(path)[use] for use in USES} == dtypes):
        write_json(folder / RECORD, dtypes)


def resolve_dtypes(config: C, dtypes: Mapping[Use, str]) -> C:
    """Copy a configuration, or a part of one, without `dtype: auto`.

    Mappings of students are resolved too.
    """
    changes = {}
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        new = _resolved(f.name, value, config, dtypes)
        if new is not value:
            changes[f.name] = new
    return dataclasses.replace(config, **changes) if changes else config  # type: ignore[type-var]


def _resolved(name: str, value: Any, owner: object, dtypes: Mapping[Use, str]) -> Any:
    if name == "dtype" and value == "auto":
        return dtypes["inference" if isinstance(owner, (CodecConfig, GenerateConfig)) else "training"]
    if name == "students":
        new = tuple({**s, "dtype": dtypes["training"]} if s.get("dtype", "auto") == "auto" else s for s in value)
        return new if new != tuple(value) else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return resolve_dtypes(value, dtypes)
    parts = list(value.values()) if isinstance(value, dict) else value
    if isinstance(parts, (tuple, list)) and parts and all(dataclasses.is_dataclass(v) for v in parts):
        resolved = [resolve_dtypes(v, dtypes) for v in parts]
        if any(a is not b for a, b in zip(resolved, parts, strict=True)):
            return dict(zip(value, resolved, strict=True)) if isinstance(value, dict) else tuple(resolved)
    return value


def named_dtypes(config: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every dtype that a configuration names, with the setting that names it; defaults are not listed."""
    for f in dataclasses.fields(config):
        value, path = getattr(config, f.name), f"{where}.{f.name}".lstrip(".")
        items: list[tuple[str, Any]] = [(path, value)]
        if isinstance(value, dict):
            items = [(f"{path}.{k}", v) for k, v in value.items()]
        elif isinstance(value, (tuple, list)):
            items = [(f"{path}.{i}", v) for i, v in enumerate(value)]
        for key, item in items:
            if f.name == "dtype":
                named = [] if item in ("auto", f.default) else [(key, item)]  # FRePo has float32 alone
            elif f.name == "students":
                named = [(f"{key}.dtype", item["dtype"])] if item.get("dtype", "auto") != "auto" else []
            else:
                named = list(named_dtypes(item, key)) if dataclasses.is_dataclass(item) else []
            yield from named


def slow_dtypes(config: object, device: torch.device | str, *, without: Collection[str] = ()) -> str | None:
    """One sentence on named dtypes that the device is slow in, None without any.

    Args:
        config: settings that may name dtypes, at any depth.
        device: where to compute.
        without: sections that are not read.
    """
    named = ((where, dtype) for where, dtype in named_dtypes(config) if where.split(".")[0] not in without)
    slow = [f"{where}={dtype}" for where, dtype in named if is_slow(dtype, device)]
    if not slow:
        return None
    kind = torch.device(device).type
    what = "CPU" if kind == "cpu" else "GPU"
    others = f" (and {len(slow) - 1} more)" if len(slow) > 1 else ""
    where = slow[0].partition("=")[0]
    return f"{slow[0]}{others} is much slower than float32 on this {what}, which has no such numbers; set {where}=auto"
