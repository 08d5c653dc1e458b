"""Items that a loader leaves out, counted by reason and logged once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dq.core.text import printable

log = logging.getLogger("dq")


class LeftOut:
    """Counts of items left out, by reason, with the first name of each."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, reason: str, name: object, count: int = 1) -> None:
        """Count `count` items that are left out for a reason such as "hidden"."""
        self._counts[reason] = self._counts.get(reason, 0) + count
        self._first.setdefault(reason, printable(name))

    def merge(self, other: LeftOut) -> None:
        """Add the counts of `other`."""
        for reason, n in other._counts.items():
            self.add(reason, other._first[reason], n)

    def __str__(self) -> str:
        return ", ".join(f"{n} {reason} (first: {self._first[reason]})" for reason, n in self._counts.items())

    def __bool__(self) -> bool:
        return bool(self._counts)

    def warn(self, origin: str) -> None:
        """Log one warning, if anything was counted."""
        if self:
            log.warning("%s: left out %s", printable(origin), self)


def warn_of_keys(keys: Sequence[str], expected: Sequence[str], origin: str, what: str) -> None:
    """Warn of keys that a loader does not use."""
    left_out = LeftOut()
    for key in keys:
        if key not in expected:
            left_out.add(f"{what} that mean nothing here", key)
    left_out.warn(origin)
