"""Whole numbers that callers of public functions give."""

from __future__ import annotations

import operator
from typing import Any

from dq.core.errors import InputError


def whole_number(value: Any, name: str, *, minimum: int | None = 1) -> int:
    """A whole number of Python, NumPy or a tensor of one element.

    Raises:
        InputError: for another type, a truth value, or a number below `least`.
    """
    try:
        truth = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
        number = None if truth else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # of tensors with several elements
        number = None
    if number is None or (minimum is not None and number < minimum):
        bound = "" if minimum is None else f" of at least {minimum}"
        raise InputError(f"{name} is a whole number{bound}, not {value!r}")
    return number
