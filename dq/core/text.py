"""Text of messages: shortened values, similar names, first lines, sizes, tables."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

from dq.core.errors import InputError


def first_line(e: BaseException) -> str:
    """What an error says, shortened."""
    return (str(e).strip() or type(e).__name__).splitlines()[0][:200]


def printable(name: object) -> str:
    """Text such as a file name, with bytes that are no UTF-8 as \\xNN."""
    return os.fsencode(str(name)).decode("utf-8", "backslashreplace")


def check_name(name: str, what: str) -> None:
    """Refuse names that could not be a folder or would leave it."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]*", name):
        raise InputError(f"{what} {name!r} must be letters, digits and _ . + - (it names a folder); choose another")


SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxdict, SHORT.maxlist, SHORT.maxstring = 3, 6, 12, 120


def short(value: object) -> str:
    """A value in an error message: a few lines of YAML can stand for millions."""
    return SHORT.repr(value)


def similar_names(name: str, names: Iterable[str], *, count: int = 1, cutoff: float = 0.5) -> list[str]:
    """At most `count` names similar to one, the most similar first.

    Args:
        name: the name that does not exist.
        names: those that exist.
        count: number of names at most.
        cutoff: least ratio of `difflib.SequenceMatcher`.
    """
    return difflib.get_close_matches(name, list(names), n=count, cutoff=cutoff)


def nearest_name(name: str, names: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """The most similar of some names; None if none is similar."""
    return next(iter(similar_names(name, names, cutoff=cutoff)), None)


def plural(n: int, noun: str) -> str:
    """A number with its noun, such as "1 epoch" or "2 batches"."""
    if n == 1:
        return f"1 {noun}"
    sibilant = noun.endswith(("s", "sh", "ch", "x")) and not noun.endswith("epoch")
    return f"{n} {noun}{'es' if sibilant else 's'}"


def format_bytes(n: float) -> str:
    """Text such as "13.9 kB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[Any]], *, left: int = 1) -> str:
    """Format a Markdown table with the first `left` columns aligned left."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
