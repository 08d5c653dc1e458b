"""Items that a loader leaves out, counted by reason and logged once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dq.core.text import plural, printable

log = logging.getLogger("dq")


class LeftOut:
    """Counts of items left out, by reason, with the first name of each."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = {}  # by noun and reason
        self._first: dict[tuple[str, str], str] = {}

    def add(self, noun: str, reason: str, name: object, count: int = 1) -> None:
        """Count items that are left out.

        Args:
            noun: what one of them is, such as "image".
            reason: why, after "1 image" as well as after "2 images", such as "outside class folders"; may be empty.
            name: of the item.
            count: of items.
        """
        key = (noun, reason)
        self._counts[key] = self._counts.get(key, 0) + count
        self._first.setdefault(key, printable(name))

    def merge(self, other: LeftOut) -> None:
        """Add the counts of `other`."""
        for key, n in other._counts.items():
            self.add(*key, other._first[key], n)

    def __str__(self) -> str:
        return ", ".join(
            f"{' '.join(filter(None, (plural(n, noun), reason)))} (first: {self._first[noun, reason]})"
            for (noun, reason), n in self._counts.items()
        )

    def __bool__(self) -> bool:
        return bool(self._counts)

    def warn(self, origin: str) -> None:
        """Log one warning, if anything was counted."""
        if self:
            log.warning("%s: left out %s", printable(origin), self)


def warn_of_keys(keys: Sequence[str], expected: Sequence[str], origin: str, noun: str) -> None:
    """Warn of keys that a loader does not use."""
    left_out = LeftOut()
    for key in keys:
        if key not in expected:
            left_out.add(noun, "without a meaning here", key)
    left_out.warn(origin)
