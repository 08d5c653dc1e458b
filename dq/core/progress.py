"""Progress bars, and the start, end and remaining time of each stage."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], *, desc: str, total: int | None = None, unit: str = "it", main: bool = True) -> tqdm:
    """A progress bar with ETA on standard error.

    It is shown by the main process only, and not with TQDM_DISABLE=1.
    """
    # tqdm itself asks the environment at its import, and not at all where `disable` is given
    hidden = not main or os.environ.get("TQDM_DISABLE") == "1"
    return tqdm(items, desc=desc, total=total, unit=unit, disable=hidden, file=sys.stderr, dynamic_ncols=True)


log = logging.getLogger("dq")
MIN_LOGGED_SECONDS = 1.0
RESUMED = 0.1  # a stage faster than this share of its estimate had most of its files already and tells no speed


class StageTimer:
    """Log start, end and remaining time of the stages of a command.

    The remaining time is the estimate of the stages to come, scaled by the ratio of time and estimate of the finished
    ones; it is left out if a stage to come has no estimate.
    """

    def __init__(
        self,
        stages: Sequence[str],
        expected: Mapping[str, float] | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.stages = tuple(stages)
        self.expected = dict(expected or {})  # seconds by stage
        self.taken: dict[str, float] = {}
        self.clock = clock

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage, and say at its end how long it took."""
        place = f"{self.stages.index(name) + 1} of {len(self.stages)}"
        likely = self.expected.get(name, 0.0) * self.ratio()
        log.info(
            "%s begins (%s%s)", name, place, f", about {duration(likely)}" if likely >= MIN_LOGGED_SECONDS else ""
        )
        began = self.clock()
        yield
        self.taken[name] = self.clock() - began
        left = self.remaining()
        rest = f"; about {duration(left)} left in all" if left is not None and left >= MIN_LOGGED_SECONDS else ""
        log.info("%s done in %s (%s)%s", name, duration(self.taken[name]), place, rest)

    def ratio(self) -> float:
        """Seconds taken by seconds expected, over the finished stages; 1 before the first."""
        estimated = [s for s in self.taken if self.expected.get(s, 0) > 0]
        informative = [s for s in estimated if self.taken[s] >= RESUMED * self.expected[s]]
        if not informative:
            return 1.0
        return sum(self.taken[s] for s in informative) / sum(self.expected[s] for s in informative)

    def remaining(self) -> float | None:
        """Seconds until the end, or None if nobody can say."""
        ahead = [s for s in self.stages if s not in self.taken]
        if any(s not in self.expected for s in ahead):
            return None
        return self.ratio() * sum(self.expected[s] for s in ahead)


def duration(seconds: float) -> str:
    """Format seconds as text such as "0.4 s", "12 s", "3 h 20 min", "2 d 5 h"."""
    if seconds < 9.5:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


@contextlib.contextmanager
def library_bars() -> Iterator[None]:
    """Hide the loading bars of diffusers and transformers where TQDM_DISABLE=1.

    These libraries read the variable at their import at most.
    """
    modules = [importlib.import_module(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    hidden = [m for m in modules if os.environ.get("TQDM_DISABLE") == "1" and m.is_progress_bar_enabled()]
    for module in hidden:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in hidden:
            module.enable_progress_bar()


def unit_done(stage: str, name: str, seconds: float, **numbers: float | int | str) -> None:
    """One line about a finished class or other unit, for `--verbose`."""
    if log.isEnabledFor(logging.DEBUG):
        text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
        log.debug("%s: %s%s, %.2f s", stage, name, f": {text}" if text else "", seconds)
