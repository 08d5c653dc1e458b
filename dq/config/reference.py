"""The reference of all settings: key, type, bound, default and help, taken from the settings classes."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from dq.config.reader import in_words
from dq.config.refinement import STAGES, RefineConfig
from dq.config.schema import RunConfig
from dq.config.students import StudentConfig
from dq.config.validation import (
    RENAMED,
    TYPE_NAMES,
    bounds,
    field_hint,
    is_settings,
    none_word,
    optional,
    renamed_key,
    unwrap,
)
from dq.core.bounded_yaml import write_yaml
from dq.core.errors import InputError
from dq.core.text import similar_names

NUMBER, NAME = "N", "NAME"  # stand for an index of a list and a key of a mapping


class Setting(NamedTuple):
    """A row of the reference."""

    key: str  # such as teachers.N.net
    type: str
    bound: str
    default: str
    help: str
    stage: str = ""  # the method of refinement that has it

    def __str__(self) -> str:
        bound = f", {self.bound}" if self.bound else ""
        stage = f" (stage: {self.stage})" if self.stage else ""
        return f"{self.key}{stage}\n    {self.help}\n    {self.type}{bound}; default {self.default}"


def reference() -> list[Setting]:
    """All settings, in the order of a configuration."""
    return list(_settings(RunConfig, ""))


def explain(key: str) -> list[Setting]:
    """The setting of a dotted name, all settings of a section, or all of which it is the last part.

    Raises:
        InputError: for a name that is none, with the nearest ones.
    """
    chosen = _named(key)
    if not chosen:
        if key.rpartition(".")[2] in RENAMED:
            raise InputError(f"{renamed_key(key)}; change the name")
        close = nearest_settings(key)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`dq config` lists all"
        raise InputError(f"unknown setting {key!r}; {hint}")
    return chosen


def _named(key: str) -> list[Setting]:
    """Settings that a name stands for exactly."""
    rows, parts = reference(), key.split(".")
    chosen = [r for r in rows if _matches(r.key.split("."), parts)]
    return chosen or [r for r in rows if len(parts) == 1 and r.key.rpartition(".")[2] == key]


def containing(word: str) -> list[Setting]:
    """Settings whose dotted name contains a word; none if the word is a name itself, or one of earlier versions."""
    exact = bool(_named(word)) or word.rpartition(".")[2] in RENAMED
    return [] if exact else [r for r in reference() if word.casefold() in r.key.casefold()]


def nearest_settings(key: str) -> list[str]:
    """At most three names of settings or sections that are similar to one, the most similar first."""
    rows = reference()
    names = {r.key.rpartition(".")[2]: r.key for r in reversed(rows)} | {r.key: r.key for r in rows}
    names |= {section: section for r in rows for section in _sections(r.key)}
    close = similar_names(key, names, count=3, cutoff=0.7) or similar_names(key, names)
    return list(dict.fromkeys(names[name] for name in close))


def _matches(row: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether a row's key begins with parts, where N is any number, NAME any name."""
    pairs = zip(row, parts, strict=False)  # a section has fewer parts than its rows
    return len(parts) <= len(row) and all(a in (b, NAME) or (a == NUMBER and b.isdigit()) for a, b in pairs)


def _sections(key: str) -> list[str]:
    """Sections in which a setting stands, such as `prior` and `prior.codec`."""
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def setting_names(cls: Any = RunConfig) -> list[str]:
    """Dotted names of all settings.

    Settings in lists and mappings, whose entries have names of their own, are left out.
    """
    names: list[str] = []
    for name, field in cls.__pydantic_fields__.items():
        core = unwrap(optional(unwrap(field_hint(field))[0])[0])[0]
        names += [f"{name}.{inner}" for inner in setting_names(core)] if is_settings(core) else [name]
    return names


def _settings(cls: Any, prefix: str, stage: str = "") -> Iterator[Setting]:
    for name, field in cls.__pydantic_fields__.items():
        hint, key = field_hint(field), f"{prefix}{name}"
        core = unwrap(optional(unwrap(hint)[0])[0])[0]
        inner = core
        if get_origin(core) in (tuple, dict):
            inner = unwrap(get_args(core)[0 if get_origin(core) is tuple else 1])[0]
            deeper = f"{key}.{NUMBER if get_origin(core) is tuple else NAME}."
        else:
            deeper = f"{key}."
        if not is_settings(core):
            help_text = field.description or ""
            yield Setting(key, type_text(hint), bound_text(hint), _default(field), help_text, stage)
        if key == "evaluate.students":
            yield from _settings(StudentConfig, f"{key}.{NUMBER}.")
        elif inner is RefineConfig:
            if not prefix:  # methods.NAME.refine has the same
                for stage_name in STAGES:
                    yield from _settings(STAGES[stage_name], deeper, stage_name)
        elif is_settings(inner):
            yield from _settings(inner, deeper, stage)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return none_word(field_hint(field)) or "null"
    return write_yaml([in_words(value)], one_line=True).strip()[1:-1]


def type_text(hint: object) -> str:
    """A type in words such as "list of whole numbers or auto"."""
    inner, _ = unwrap(hint)
    core = unwrap(optional(inner)[0])[0]
    word = none_word(hint)
    return f"{_plain_type(core)} or {word}" if word else _plain_type(core)


def _plain_type(core: object) -> str:
    args = get_args(core)
    if get_origin(core) is tuple:
        plural = {int: "whole numbers", float: "numbers", str: "texts"}
        return f"list of {plural.get(unwrap(args[0])[0]) or type_text(args[0])}"
    if get_origin(core) is dict:
        return f"mapping of names to {type_text(args[1])}"
    if get_origin(core) is Literal:
        return ", ".join(map(str, args))
    if get_origin(core) in (Union, types.UnionType):
        return " or ".join(type_text(a) for a in args)
    return "settings" if is_settings(core) else TYPE_NAMES.get(core, "any value").removeprefix("a ")


def bound_text(hint: object) -> str:
    """Bound of a number, or of a list's numbers, such as "at least 1"."""
    inner, notes = unwrap(hint)
    core, more = unwrap(optional(inner)[0])
    if get_origin(core) is tuple or get_origin(core) in (Union, types.UnionType):
        return bound_text(get_args(core)[0])
    return bounds([*notes, *more]).removeprefix("of ")
