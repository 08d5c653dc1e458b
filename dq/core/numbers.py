"""Whole numbers that callers of public functions give."""

from __future__ import annotations

import operator
from typing import Any

from dq.core.errors import InputError


def whole_number(value: Any, name: str, *, least: int | None = 1) -> int:
    """A whole number of Python, NumPy or torch.

    Raises:
        InputError: for another type, a truth value, or a number below `least`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        bound = "" if least is None else f" of at least {least}"
        raise InputError(f"{name} is a whole number{bound}, not {value!r}")
    return number
