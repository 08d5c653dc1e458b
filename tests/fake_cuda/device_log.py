"""What a CUDA device would have done, counted by line of dq."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = f"{ROOT / 'dq'}/"
TESTS = f"{ROOT / 'tests'}/"
HERE = f"{Path(__file__).parent}/"
TOOL = tuple(HERE + name for name in ("device_log.py", "tensor.py", "install.py", "rules.py"))

LAUNCH = "launch"  # a kernel is started
WAIT = (
    "wait"  # the host waits for everything that was launched before: .item(), nonzero(), a blocking copy to the host
)
TO_DEVICE = "copy to the device"  # from pageable memory, it waits as well
TO_HOST = "copy to the host"


@dataclass(frozen=True)
class Counts:
    """Events of each kind; they can be subtracted, to count a part of a run."""

    launches: int
    waits: int
    to_device: int
    to_host: int

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            self.launches - other.launches,
            self.waits - other.waits,
            self.to_device - other.to_device,
            self.to_host - other.to_host,
        )


class DeviceLog:
    """Counters of launches, waits and copies, by line and operation."""

    def __init__(self) -> None:
        self.events: Counter[tuple[str, str, str]] = Counter()  # (kind, line, operation)
        self.backward_line: str | None = None  # of the call of autograd that is at work, on a thread of its own
        self._lock = threading.Lock()

    def clear(self) -> None:
        self.events.clear()

    def add(self, kind: str, operation: str) -> None:
        line = self.current_line()
        with self._lock:
            self.events[kind, line, operation] += 1

    def current_line(self) -> str:
        """The innermost line of dq that is running, else of a test, else of a library."""
        chain = lines_of_dq()
        if chain:
            return chain[0]
        return self.backward_line or outer_line()

    def counts(self) -> Counts:
        kinds: Counter[str] = Counter()
        for (kind, _, _), n in self.events.items():
            kinds[kind] += n
        return Counts(kinds[LAUNCH], kinds[WAIT], kinds[TO_DEVICE], kinds[TO_HOST])

    def lines(self, kind: str) -> Counter[str]:
        """Events of a kind by line."""
        by_line: Counter[str] = Counter()
        for (k, line, _), n in self.events.items():
            if k == kind:
                by_line[line] += n
        return by_line

    def operations(self, kind: str) -> Counter[str]:
        """Events of a kind by operation and line, as `aten.add_ at dq/refine/fadrm.py:33 in _step`."""
        by_operation: Counter[str] = Counter()
        for (k, line, operation), n in self.events.items():
            if k == kind:
                by_operation[f"{operation} at {line}"] += n
        return by_operation

    def report(self, top: int = 20) -> str:
        """Totals, and for each kind the lines with most events."""
        text = [str(self.counts())]
        for kind in (LAUNCH, WAIT, TO_DEVICE, TO_HOST):
            counter = self.lines(kind) if kind == LAUNCH else self.operations(kind)
            text += [f"-- {kind}", *(f"{n:8d}  {where}" for where, n in counter.most_common(top))]
        return "\n".join(text)


def lines_of_dq(depth: int = 4) -> list[str]:
    """The running lines of dq, innermost first, at most `depth` of them."""
    chain: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(chain) < depth:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            chain.append(f"dq/{file[len(PACKAGE) :]}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return chain


def outer_line() -> str:
    """The innermost running line of a test, else of what called torch."""
    frame, library = sys._getframe(1), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(TESTS) and file not in TOOL:
            return f"tests/{file[len(TESTS) :]}:{frame.f_lineno} in {frame.f_code.co_name}"
        if not library and file not in TOOL and "/torch/" not in file:
            library = f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return library or "a thread of torch"
