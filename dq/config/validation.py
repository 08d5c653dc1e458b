"""Settings as frozen pydantic dataclasses, whose errors are one sentence with path, value and bound."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

import pydantic.dataclasses
from pydantic import ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails

from dq.config.kinds import NoneAs
from dq.core.errors import InputError
from dq.core.text import nearest_name, short

C = TypeVar("C")
CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
RENAMED = {  # settings of earlier versions
    "teacher": "teachers",
    "judges": "validation_teachers",
    "mode_guidance": "prototype_guidance",
    "mode_stop": "prototype_guidance_stop",
    "guidance_snr": "guidance_interval",
    "licence": "license",
    "neighbours": "neighbors",
}
RENAMED_VALUES = {"race": "pca-multistart", "barycentre": "barycenter"}
TYPE_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class Checked:
    """Base of all settings classes.

    A mapping is read as one; scalars must be of their exact type.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    __pydantic_fields__: ClassVar[dict[str, FieldInfo]]
    __pydantic_validator__: ClassVar[Any]

    @classmethod
    def variant(cls, data: object) -> type[Checked]:
        """The class to read plain data as.

        It is this one, unless a subclass chooses by the data.
        """
        return cls

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        inner: Any = schema
        while inner["type"] != "dataclass" and "schema" in inner:
            inner = inner["schema"]
        if inner["type"] == "dataclass":
            inner["strict"] = False  # of mappings; fields have the strictness of the configuration
        return schema


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def settings(cls: type[C]) -> type[C]:
    """Make a frozen pydantic dataclass whose constructor raises `InputError`."""
    checked_class: Any = pydantic.dataclasses.dataclass(frozen=True, config=CONFIG)(cls)
    validate = checked_class.__init__

    @functools.wraps(validate)
    def init(self: object, *args: object, **kwargs: object) -> None:
        try:
            validate(self, *args, **kwargs)
        except ValidationError as e:
            raise InputError(sentence(e, checked_class, kwargs)) from None

    checked_class.__init__ = init
    return checked_class


def sentence(error: ValidationError, cls: object, data: object, where: str = "") -> str:
    """The first of the errors: path, what is expected, value; or all settings of earlier versions.

    Args:
        error: what validation raised.
        cls: the class that was to be made of `data`.
        data: plain data.
        where: path of the data themselves.
    """
    errors = error.errors(include_url=False)
    renamed = list(dict.fromkeys(filter(None, (_new_name(e, cls, data, where) for e in errors))))
    if renamed:
        return f"{', '.join(renamed)}; change the {'name' if len(renamed) == 1 else 'names'}"
    first = errors[0]
    kind, value = first["type"], first["input"]
    path, hint = _locate(cls, data, first["loc"], where)
    owner = _core_type(hint)
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        parent = path.rpartition(".")[0]
        owner = _core_type(_locate(cls, data, first["loc"][:-1], where)[1])
        return unknown_key(path, path.rpartition(".")[2], list(owner.__pydantic_fields__), parent)
    if kind == "value_error":
        text = str(first["ctx"]["error"])
        if not path:
            return text
        if is_settings(owner) and _first_name(text) in owner.__pydantic_fields__:
            return f"{path}.{text}"
        return f"{path} {text}" if text.startswith("must ") else f"{path}: {text}"
    if kind in ("missing", "missing_argument"):
        return f"{path} is missing"
    name = path or "the configuration"
    expectation = expected(hint)
    if kind == "finite_number":
        expectation = expectation.replace("a number", "a finite number", 1)
    nearest = ""
    if get_origin(owner) is Literal and len(get_args(owner)) > 1 and isinstance(value, str):
        close = nearest_name(value, map(str, get_args(owner)))
        nearest = f"; did you mean {close!r}?" if close else ""
    return f"{name} must be {expectation}, not {short(value)}{nearest}"


def _new_name(error: ErrorDetails, cls: object, data: object, where: str) -> str | None:
    """New name of a setting or a value of an earlier version, such as "'judges' is now called 'teachers'"."""
    key, value = error["loc"][-1] if error["loc"] else "", error["input"]
    if error["type"] == "unexpected_keyword_argument" and key in RENAMED:
        path, _ = _locate(cls, data, error["loc"], where)
        owner = _core_type(_locate(cls, data, error["loc"][:-1], where)[1])
        if RENAMED[str(key)] in owner.__pydantic_fields__:
            return renamed_key(path)
    if error["type"] == "literal_error" and isinstance(value, str):
        path, hint = _locate(cls, data, error["loc"], where)
        if RENAMED_VALUES.get(value) in get_args(_core_type(hint)):
            return f"{path}={value} is now called {RENAMED_VALUES[value]!r}"
    return None


def renamed_key(path: str) -> str:
    """What a setting of an earlier version is called now."""
    section, _, key = path.rpartition(".")
    return f"{path!r} is now called {f'{section}.{RENAMED[key]}'.lstrip('.')!r}"


def _first_name(text: str) -> str:
    """The name that a message begins with."""
    return text.split(" ")[0].partition("=")[0].partition(".")[0].rstrip(":,")


def is_settings(hint: object) -> bool:
    return isinstance(hint, type) and issubclass(hint, Checked)


def unwrap(hint: object) -> tuple[Any, list[Any]]:
    """A type without `Annotated`, and the annotations from the outside in."""
    notes: list[Any] = []
    while get_origin(hint) is Annotated:
        hint, *more = get_args(hint)
        for note in more:
            notes += note.metadata if isinstance(note, FieldInfo) else [note]
    return hint, notes


def optional(hint: object) -> tuple[Any, bool]:
    """A type without `None`, and whether that was allowed."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    some = [a for a in get_args(hint) if a is not type(None)]
    return (some[0] if len(some) == 1 else Union[tuple(some)]), len(some) < len(get_args(hint))  # noqa: UP007


def _core_type(hint: object) -> Any:
    """A type without annotations and `None`."""
    while True:
        plain = optional(unwrap(hint)[0])[0]
        if plain is hint:
            return hint
        hint = plain


def field_hint(field: FieldInfo) -> Any:
    """Type of a field with its annotations."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _locate(cls: Any, data: Any, loc: Sequence[Any], where: str) -> tuple[str, Any]:
    """Dotted path of a place in data, and its type."""
    path, hint, node = where, cls, data
    for part in loc:
        core = _core_type(hint)
        if is_settings(core):
            fields = core.variant(node).__pydantic_fields__
            hint = field_hint(fields[part]) if part in fields else Any
            node = node.get(part) if isinstance(node, dict) else getattr(node, str(part), None)
        elif get_origin(core) is tuple:
            is_list = isinstance(node, (list, tuple))
            hint, node = get_args(core)[0], node[part] if is_list else node
            if not is_list and not isinstance(node, dict):  # a scalar that stands for a list of one
                continue
        elif get_origin(core) is dict and part != "[key]":
            hint, node = get_args(core)[1], node.get(part) if isinstance(node, dict) else None
        else:  # the member of a union
            continue
        path = f"{path}.{part}".lstrip(".")
    core = _core_type(hint)
    return path, core.variant(node) if is_settings(core) else hint


def bounds(notes: Iterable[object]) -> str:
    """Bounds of a number such as "of at least 1" or "in [0, 1)"; "" without any."""
    low = high = left = right = None
    for note in notes:
        for name in ("ge", "gt"):
            if (value := getattr(note, name, None)) is not None:
                low, left = value, name
        for name in ("le", "lt"):
            if (value := getattr(note, name, None)) is not None:
                high, right = value, name
    if low is not None and high is not None:
        return f"in {'[' if left == 'ge' else '('}{low:g}, {high:g}{']' if right == 'le' else ')'}"
    if low is not None:
        return f"of at least {low:g}" if left == "ge" else f"of more than {low:g}"
    if high is not None:
        return f"of at most {high:g}" if right == "le" else f"of less than {high:g}"
    return ""


def none_word(hint: object) -> str | None:
    """The word for None in a type; "null" if it has none.

    None if the type does not allow None.
    """
    inner, notes = unwrap(hint)
    if not optional(inner)[1]:
        return None
    return next((n.word for n in notes if isinstance(n, NoneAs)), "null")


def expected(hint: object) -> str:
    """What a setting must be: its type, its bound, and the word for None."""
    inner, notes = unwrap(hint)
    inner, _ = optional(inner)
    word = none_word(hint)
    core, more = unwrap(inner)
    text = f"{_type_name(core)} {bounds([*notes, *more])}".rstrip()
    return f"{text} or {word!r}" if word and word != "null" else text


def _type_name(core: Any) -> str:
    origin, args = get_origin(core), get_args(core)
    if core in TYPE_NAMES:
        return TYPE_NAMES[core]
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(expected(a) for a in args)
    if is_settings(core):
        return "a mapping of settings"
    return {tuple: "a list", dict: "a mapping"}.get(origin or core, "a value")


def unknown_key(where: str, key: str, names: Sequence[str], parent: str = "", kind: str = "setting") -> str:
    """The sentence on an unknown name, with a similar one."""
    close = nearest_name(key, names, cutoff=0.4)
    hint = f"did you mean {f'{parent}.{close}'.lstrip('.')!r}?" if close else f"known: {', '.join(sorted(names))}"
    return f"unknown {kind} {where!r}; {hint}"
