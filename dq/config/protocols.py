"""Evaluation protocols by name: presets of student settings, kept as data in `presets/protocols/*.yaml`.

A preset is a mapping of `StudentConfig` settings, a list of the data sets whose published settings it has, and a list
of rules `when: {...}, set: {...}`, applied in order. What the user sets himself wins over both. A condition names a
fact (`FACTS`) and one or several values of it, or `FACT_from` and `FACT_to` a bound. `test_scale: sevenths` stands for
side // 7 * 8 px (RDED's resize of test images). Data sets under `without` are refused with the reason given there.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import yaml

from dq.config.reader import from_dict
from dq.config.students import StudentConfig, is_library_net
from dq.config.validation import unknown_key
from dq.core.errors import InputError
from dq.core.plain import PlainDict
from dq.core.text import short

FOLDER = Path(__file__).parent / "presets" / "protocols"
ALIASES = {"soft": "fadrm"}  # the usual preset of a family
FACTS = ("dataset", "net", "teacher", "ipc", "classes", "images", "image_size")


def list_protocols() -> dict[str, str]:
    """Names of the presets and what each is, in one line."""
    return {p.stem: _preset(p.stem)["about"] for p in sorted(FOLDER.glob("*.yaml"))}


def student_config(
    spec: PlainDict,
    *,
    ipc: str,
    classes: int,
    image_size: int,
    teacher: str | None = None,
    where: str = "student",
) -> StudentConfig:
    """Settings of a student for one set.

    Args:
        spec: fields of `StudentConfig`; `protocol` names a preset, `dataset` the data set whose published settings to
            take (e.g. "cifar100"; without it the preset's general ones hold); `epochs` may be a mapping by ipc with
            the keys "10", "full" or "default".
        ipc: images per class, or "full".
        classes: number of classes.
        image_size: side of the images in px.
        teacher: network of the only teacher; None if there is none, or there are several.
        where: what messages call the student.

    Raises:
        InputError: if a key, a preset or a data set is unknown, or `epochs` has no entry for this ipc.
    """
    chosen = dict(spec)
    dataset = chosen.pop("dataset", None)
    name = chosen.get("protocol", "custom")
    for key, value in (("protocol", name), ("dataset", dataset)):
        if not isinstance(value, str | None):
            raise InputError(f"{where}.{key} must be a name, not {short(value)}")
    if name in ALIASES:
        name = chosen["protocol"] = ALIASES[name]
    settings: PlainDict = {}
    if name != "custom":
        preset = _preset(name, f"{where}.protocol")
        number = math.inf if ipc == "full" else int(ipc)
        facts = {
            "dataset": dataset,
            "net": _plain_name(str(chosen.get("net", preset["settings"]["net"]))),
            "teacher": None if teacher is None else _plain_name(teacher),
            "ipc": number,
            "classes": classes,
            "images": number * classes,
            "image_size": image_size,
        }
        settings = _preset_settings(name, facts, f"{where}.dataset")
    elif dataset is not None:
        raise InputError(
            f"{where}.dataset chooses the settings of a protocol, but there is none; set {where}.protocol, or leave "
            "dataset out"
        )
    settings = _merged(_without_implied(settings, chosen), chosen)
    settings["epochs"] = _epochs(settings.get("epochs", StudentConfig.epochs), ipc, f"{where}.epochs")
    return from_dict(StudentConfig, settings, where)


def _preset_settings(name: str, facts: PlainDict, setting: str) -> PlainDict:
    """Settings of a preset for these facts.

    Args:
        name: name of the preset.
        facts: values of `FACTS`.
        setting: path of the data set's name, for messages.

    Raises:
        InputError: for a data set for which it has none.
    """
    preset, dataset = _preset(name), facts["dataset"]
    general = "leave dataset out to take the general ones"
    if dataset in preset.get("without", {}):
        reason = preset["without"][dataset]
        raise InputError(f"{setting}: protocol {name!r} has no settings for {dataset!r}: {reason}; {general}")
    if dataset is not None and dataset not in preset["datasets"]:
        datasets = ", ".join(preset["datasets"]) or "no data set in particular"
        raise InputError(f"{setting}: protocol {name!r} has settings for {datasets}, not for {dataset!r}; {general}")
    settings = _merged({}, preset["settings"])
    for rule in preset["rules"]:
        if all(_holds(key, wanted, facts) for key, wanted in rule["when"].items()):
            settings = _merged(settings, rule["set"])
    if settings.get("test_scale") == "sevenths":
        side = facts["image_size"]
        settings["test_scale"] = side // 7 * 8 / side
    return settings


def _without_implied(settings: PlainDict, chosen: PlainDict) -> PlainDict:
    """Settings of a preset without those that the chosen network or learning rate decides."""
    net, implied = str(chosen.get("net", "")), set()
    if is_library_net(net):
        implied = {"norm", "init"}  # the library decides both
    elif "-" in net:
        implied = {"norm"}  # the ending of the name decides it
    if "lr" in chosen:
        implied.add("learned_lr")  # a chosen rate is not the learned one
    return {key: value for key, value in settings.items() if key not in implied}


def _plain_name(net: str) -> str:
    """A network's name without its library and its norm."""
    return net.rpartition(":")[2].partition("-")[0]


def _epochs(epochs: object, ipc: str, setting: str) -> Any:
    """Epochs at `ipc`, where there is a mapping by ipc."""
    if not isinstance(epochs, dict):
        return epochs
    by_ipc = {str(k): v for k, v in epochs.items()}
    number = by_ipc.get(ipc, by_ipc.get("default"))
    if number is None:
        raise InputError(
            f"{setting} has entries for {', '.join(by_ipc) or 'nothing'} but not for {ipc!r}; set {setting}.{ipc}, or "
            f"{setting}.default"
        )
    return number


def _preset(name: str, setting: str = "protocol") -> PlainDict:
    """A preset by name.

    Args:
        name: of `list_protocols`.
        setting: path of the name, for messages.
    """
    if name == "ddr":
        raise InputError(
            f"{setting}=ddr is scored by `dq evaluate --protocol ddr --distilled PATH` and is no protocol of students"
        )
    names = [*(p.stem for p in sorted(FOLDER.glob("*.yaml"))), "custom"]
    if name not in names:
        raise InputError(f"{setting}: {unknown_key(name, name, names, kind='protocol')}")
    return _read_preset(name)


@functools.cache
def _read_preset(name: str) -> PlainDict:
    path = FOLDER / f"{name}.yaml"
    preset = yaml.safe_load(path.read_text())
    for rule in preset["rules"]:
        for key in rule["when"]:
            if key.removesuffix("_from").removesuffix("_to") not in FACTS:
                raise InputError(f"{path} has a rule about {key!r}; rules know {', '.join(FACTS)}")
    return preset


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _holds(key: str, wanted: object, facts: PlainDict) -> bool:
    if key.endswith("_from"):
        return facts[key.removesuffix("_from")] >= wanted
    if key.endswith("_to"):
        return facts[key.removesuffix("_to")] <= wanted
    return facts[key] in _listed(wanted)


def _merged(base: PlainDict, changes: PlainDict) -> PlainDict:
    """A copy of `base` with `changes`, nested mappings joined key by key; `epochs` is replaced whole."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "epochs"
        merged[key] = _merged(merged[key], value) if both else value
    return merged
