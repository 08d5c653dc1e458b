"""Settings by dotted keys, applied to a configuration."""

from __future__ import annotations

from typing import Any

import yaml

from dq.config.reader import C, from_dict, to_dict
from dq.core.bounded_yaml import read_yaml
from dq.core.errors import InputError
from dq.core.plain import PlainDict
from dq.core.text import short


def set_value(data: PlainDict, key: str, value: object) -> None:
    """Set a dotted key (`cluster.n_iter`, `evaluate.students.0.lr`) in plain data, in place."""
    *path, last = key.split(".")
    node: Any = data
    for i, part in enumerate(path):
        child = _child(node, part, ".".join(path[: i + 1]))
        if child is None:
            child = {}
            _assign(node, part, child, key)
        node = child
    _assign(node, last, value, key)


def _child(node: object, part: str, where: str) -> Any:
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise InputError(f"{where!r} does not exist: the list has {len(node)} entries, counted from 0")
        return node[int(part)]
    if not isinstance(node, dict):
        raise InputError(f"{where!r} cannot be set: its parent is the value {short(node)}")
    return node.get(part)


def _assign(node: object, part: str, value: object, where: str) -> None:
    if isinstance(node, list):
        _child(node, part, where)
        node[int(part)] = value
    elif isinstance(node, dict):
        node[part] = value
    else:
        raise InputError(f"{where!r} cannot be set: its parent is the value {short(node)}")


def _check_sections(pairs: PlainDict) -> None:
    """Refuse a setting that its section, given too, sets to another value."""
    for key, value in pairs.items():
        parts = key.split(".")
        for n in range(1, len(parts)):
            section = ".".join(parts[:n])
            if section in pairs and not _agrees(pairs[section], parts[n:], value):
                raise InputError(
                    f"{key} is given twice, as {short(value)} and by {section}={short(pairs[section])}; leave one out"
                )


def _agrees(section: object, path: list[str], value: object) -> bool:
    """Whether a section leaves a setting open, or sets it to the same value."""
    if not path:
        return bool(section == value)
    first, *rest = path
    if isinstance(section, dict):
        return first not in section or _agrees(section[first], rest, value)
    if isinstance(section, list):
        is_entry = first.isdigit() and int(first) < len(section)
        return not is_entry or _agrees(section[int(first)], rest, value)
    return False


def apply_settings(config: C, settings: list[str] | PlainDict) -> C:
    """Copy `config` with `key=value` strings or a dict of dotted keys applied.

    Values of strings are read as YAML.
    """
    if isinstance(settings, list):
        pairs: PlainDict = {}
        for s in settings:
            key, sep, text = s.partition("=")
            if not sep:
                raise InputError(f"--set needs key=value, not {s!r}")
            key = key.strip()
            try:
                value = read_yaml(text)
            except (yaml.YAMLError, RecursionError, ValueError):  # impossible dates are ValueErrors
                raise InputError(f"the value of {key!r} is not readable: {short(text)}") from None
            if key in pairs:
                raise InputError(f"{key} is given twice, as {short(pairs[key])} and {short(value)}; leave one out")
            pairs[key] = value
        _check_sections(pairs)
        settings = dict(sorted(pairs.items(), key=lambda pair: pair[0].count(".")))  # a section before its settings
    data = to_dict(config)
    for key, value in settings.items():
        set_value(data, key, value)
    return from_dict(type(config), data)
