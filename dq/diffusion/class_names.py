"""Classes of a generator by name or index."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from dq.core.errors import InputError
from dq.core.text import nearest_name


def class_indices(
    names: Sequence[str],
    generator_names: Mapping[str, str],
    total: int,
    class_map: Mapping[str, str] | None = None,
) -> list[int]:
    """Index of the generator's class for every class of a source.

    By `class_map`, else by name, else (for a generator without names and with as many classes) by position. A name is
    the whole text of a class ("tench, Tinca tinca") or one of its synonyms; a whole text wins over a synonym of
    another class.

    Args:
        names: of the source's classes.
        generator_names: text of the generator's classes, by index as text.
        total: classes of the generator.
        class_map: name of the source's class -> the generator's name or index.

    Raises:
        InputError: if the generator lacks a class, two of its classes have the name, or `class_map` names a class that
            the source lacks.
    """
    mapping = class_map or {}
    for name in mapping:
        if name not in names:
            close = nearest_name(name, names, cutoff=0.4)
            hint = f"did you mean {close!r}?" if close else f"it has {', '.join(map(repr, names[:5]))}"
            raise InputError(f"generate.class_map names {name!r}, which is no class of the data; {hint}")
    if not generator_names and not mapping and total == len(names):
        return list(range(total))
    exact: dict[str, list[int]] = {}
    synonyms: dict[str, list[int]] = {}
    for index, text in generator_names.items():
        exact.setdefault(text.strip(), []).append(int(index))
        for part in dict.fromkeys(p.strip() for p in text.split(",")):
            synonyms.setdefault(part, []).append(int(index))
    return [_index(name, mapping.get(name), exact, synonyms, total) for name in names]


def _index(
    name: str, mapped: str | None, exact: dict[str, list[int]], synonyms: dict[str, list[int]], total: int
) -> int:
    label = name if mapped is None else str(mapped)
    matches = exact.get(label.strip()) or synonyms.get(label.strip()) or []
    if len(matches) > 1:
        raise InputError(
            f"{len(matches)} classes of the generator are called {label!r} ({', '.join(map(str, matches))}); say "
            f"which one by its index: generate.class_map: {{{name}: {matches[0]}}}"
        )
    if not matches and mapped is not None and label.isdigit():
        matches = [int(label)]
    if not matches or not 0 <= matches[0] < total:
        missing = f"class {name!r}" if mapped is None else f"class {name!r} (class_map: {label!r})"
        raise InputError(
            f"the generator ({total} classes) lacks {missing}; "
            "map it with generate.class_map: {name: the generator's name or index}"
        )
    return matches[0]


def class_number(value: Any) -> int:
    """A whole number of Python, NumPy, torch or text."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(int(value) if isinstance(value, str) else value)
    except (TypeError, ValueError) as e:
        raise InputError(f"a class label is a whole number or a class name, not {value!r}") from e
