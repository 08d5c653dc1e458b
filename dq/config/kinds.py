"""Types of settings: bounded numbers, paths, lists, and words for None."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

T = TypeVar("T")

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class NoneAs:
    """The word for None in files and on the command line; null is read too.

    YAML reads a bare `off` as false.
    """

    word: str

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._read, handler(source))

    def _read(self, value: object) -> Any:
        is_word = isinstance(value, str) and value == self.word
        return None if is_word or (value is False and self.word == "off") else value


def _as_tuple(value: object) -> Any:
    """Turn a list into a tuple, and a scalar into a tuple of one.

    None and mappings are left for the check to refuse.
    """
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return value if value is None or isinstance(value, dict) else (value,)


def _settings_as_tuple(value: object) -> Any:
    """As `_as_tuple`, with a mapping of settings as a tuple of one."""
    return (value,) if isinstance(value, dict) else _as_tuple(value)


def _text_keys(value: object) -> Any:
    """YAML reads names such as 10 as numbers."""
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value


def _path_text(value: object) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _index_text(value: object) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Auto = Annotated[T | None, NoneAs("auto")]  # chosen from the data, the device or another setting
Preset = Annotated[T | None, NoneAs("preset")]  # as the preset says
Off = Annotated[T | None, NoneAs("off")]  # not used
Many = Annotated[tuple[T, ...], BeforeValidator(_as_tuple)]
ManySettings = Annotated[tuple[T, ...], BeforeValidator(_settings_as_tuple)]
Named = Annotated[dict[str, T], BeforeValidator(_text_keys)]
PathText = Annotated[str, BeforeValidator(_path_text)]
NameOrIndex = Annotated[str, BeforeValidator(_index_text)]
