"""Settings read from plain data, and written back."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dq.config.validation import field_hint, is_settings, none_word, sentence
from dq.core.bounded_yaml import write_yaml
from dq.core.errors import InputError
from dq.core.plain import PlainDict
from dq.core.text import short

C = TypeVar("C")


def from_dict(cls: type[C], data: object, where: str = "") -> C:
    """Build a settings class from plain data, with every key, type and bound checked.

    Args:
        cls: the settings class.
        data: plain data.
        where: path of the data, which messages begin with.

    Raises:
        InputError: with the path of what does not fit, the value, and what is expected.
    """
    if not isinstance(data, dict):
        raise InputError(f"{where or 'the configuration'} must be a mapping of settings, not {short(data)}")
    try:
        return cls.__pydantic_validator__.validate_python(data)  # type: ignore[attr-defined]
    except ValidationError as e:
        raise InputError(sentence(e, cls, data, where)) from None


def to_dict(config: Any) -> PlainDict:
    """Plain data of a settings class, from which `from_dict` builds an equal one.

    Tuples become lists.

    Digests are made of it, so that None stays None.
    """
    return _plain(dataclasses.asdict(config))


def _plain(value: object) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def in_words(value: Any) -> Any:
    """Plain data in which None of a setting is its word."""
    if is_settings(type(value)):
        items = {name: (getattr(value, name), field) for name, field in type(value).__pydantic_fields__.items()}
        return {k: _word(f) if v is None else in_words(v) for k, (v, f) in items.items()}
    if isinstance(value, dict):
        return {k: in_words(v) for k, v in value.items()}
    return [in_words(v) for v in value] if isinstance(value, (list, tuple)) else value


def _word(field: FieldInfo) -> str | None:
    word = none_word(field_hint(field))
    return None if word == "null" else word


def changed_settings(config: Any, default: Any) -> PlainDict:
    """Plain data of the settings of a section that differ from those of another of its class."""
    changed: PlainDict = {}
    for name, field in type(config).__pydantic_fields__.items():
        value, other = getattr(config, name), getattr(default, name)
        if value == other:
            continue
        if is_settings(type(value)) and type(other) is type(value):
            changed[name] = changed_settings(value, other)
        else:
            changed[name] = _word(field) if value is None else in_words(value)
    return changed


def dump_changes(config: Any) -> str:
    """YAML text of the settings that are not the defaults, from which `load_config` reads equal ones."""
    return write_yaml(changed_settings(config, type(config)()))


def dump_config(config: Any) -> str:
    """YAML text of settings, from which `load_config` reads equal ones."""
    return write_yaml(in_words(config))
