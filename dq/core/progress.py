"""Progress bars, and the start, end and remaining time of each stage."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar, TypeVar

from tqdm.auto import tqdm

from dq.core.plain import PlainDict

T = TypeVar("T")


def progress(
    items: Iterable[T], *, desc: str, total: int | None = None, unit: str = "it", main: bool = True
) -> Progress:
    """Progress of a loop: a bar on standard error with the remaining time, or lines.

    The bar is shown by the main process only, and not with TQDM_DISABLE=1. Within a stage of a `StageTimer` it goes
    away at its end and names the remaining time of all stages. Without a bar, lines of the log tell the remaining
    time, ever less often.
    """
    # tqdm itself asks the environment at its import, and not at all where `disable` is given
    hidden = not main or os.environ.get("TQDM_DISABLE") == "1"
    timer = StageTimer.current if main else None
    options: PlainDict = {
        "desc": timer.label(desc) if timer else desc,
        "total": total,
        "unit": unit,
        "leave": timer is None,
    }
    options |= {"disable": hidden, "file": sys.stderr, "dynamic_ncols": True}
    return Progress(items, timer=timer, name=desc, logs=main and (timer is not None or hidden), options=options)


log = logging.getLogger("dq")
MIN_LOGGED_SECONDS = 1.0
RESUMED = 0.1  # a stage faster than this share of its estimate had most of its files already and tells no speed
LONG_S = 600.0  # remaining time that is announced early
FIRST_LINE_S, NEXT_LINE_S = 10.0, 60.0  # after which a loop tells a speed, and its lines follow one another at least
MEASURED_AFTER_S = 10.0  # of work, after which the speeds of stages to come are worth measuring


class Progress(tqdm):
    """A bar of tqdm that tells a `StageTimer` how far its stage is, or logs lines where it is hidden."""

    def __init__(
        self, items: Iterable[Any], *, timer: StageTimer | None, name: str, logs: bool, options: Mapping[str, Any]
    ):
        self.timer, self.name, self.logs = timer, name, logs
        self.clock = timer.clock if timer else time.monotonic
        self.began, self.next_line = self.clock(), FIRST_LINE_S
        super().__init__(items, bar_format="{l_bar}{bar}{r_bar}{in_all}", **options)

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self.iterable:
                yield item
                self.update(1)
        finally:
            self.close()

    def update(self, n: float | None = 1) -> bool | None:
        """Count finished items, and log the remaining time now and then."""
        shown = super().update(n)
        if self.disable:  # where tqdm counts nothing
            self.n += n or 0
        if self.logs:
            self._log_remaining()
        return shown

    @property
    def format_dict(self) -> dict[str, Any]:
        """Values of the bar, with the remaining time of all stages."""
        left = self.timer.remaining(self.seconds_left()) if self.timer else None
        text = "" if left is None or left < MIN_LOGGED_SECONDS else f" about {duration(left)} left in all"
        return {**super().format_dict, "in_all": text}

    def seconds_left(self) -> float | None:
        """Seconds until the loop ends, by the speed so far; None before it is known."""
        done = self.n - getattr(self, "initial", 0)  # of this command; a resumed one has earlier items
        if not self.total or done <= 0:
            return None
        return (self.clock() - self.began) * (self.total - self.n) / done

    def _log_remaining(self) -> None:
        """Log a long remaining time once, and without a bar from time to time."""
        elapsed = self.clock() - self.began
        if elapsed < self.next_line or (left := self.seconds_left()) is None:
            return
        first, self.next_line = self.next_line == FIRST_LINE_S, max(NEXT_LINE_S, 2 * elapsed)
        if left < LONG_S if first else not self.disable:
            return
        in_all = self.timer.remaining(left) if self.timer else None
        rest = f", {duration(in_all)} in all" if in_all is not None and in_all > left + MIN_LOGGED_SECONDS else ""
        log.info("%s: %.0f %%, about %s left%s", self.name, 100 * self.n / self.total, duration(left), rest)


class StageTimer:
    """Log one line per stage of a command, with the remaining time of all.

    The remaining time is the estimate of the stages to come, scaled by the ratio of time and estimate of the finished
    ones; it is left out if a stage to come has no estimate.

    Args:
        stages: names, in order.
        expected: seconds by stage.
        measure: gives seconds by stage; called once some time has been spent and a stage to come has no estimate.
        clock: seconds.
    """

    current: ClassVar[StageTimer | None] = None  # the one whose stage is at work

    def __init__(
        self,
        stages: Sequence[str],
        expected: Mapping[str, float] | None = None,
        *,
        measure: Callable[[], Mapping[str, float]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.stages = tuple(stages)
        self.expected = dict(expected or {})  # seconds by stage
        self.measure = measure
        self.taken: dict[str, float] = {}
        self.clock = clock
        self.name = ""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and say at its end how long it took and what is left."""
        self.name = name
        likely = self.expected.get(name, 0.0) * self.ratio()
        if likely >= LONG_S:
            log.info("%s takes about %s", self.label(name), duration(likely))
        began = self.clock()
        outer, StageTimer.current = StageTimer.current, self
        try:
            yield
        finally:
            StageTimer.current = outer
        self.taken[name] = self.clock() - began
        self._measure()
        left = self.remaining()
        rest = f"; about {duration(left)} left in all" if left is not None and left >= MIN_LOGGED_SECONDS else ""
        log.info("%s %s%s", self.label(name), duration(self.taken[name]), rest)

    def label(self, name: str) -> str:
        """A name with the place of the stage that is at work, such as "encode (1 of 7)"."""
        return f"{name} ({self.stages.index(self.name) + 1} of {len(self.stages)})"

    def _measure(self) -> None:
        """Measure the speeds of stages to come, once it is worth its time."""
        ahead = [s for s in self.stages if s not in self.taken and s not in self.expected]
        if self.measure is not None and ahead and sum(self.taken.values()) >= MEASURED_AFTER_S:
            self.expected |= {k: v for k, v in self.measure().items() if k not in self.expected}
            self.measure = None

    def ratio(self) -> float:
        """Seconds taken by seconds expected, over the finished stages; 1 before the first."""
        estimated = [s for s in self.taken if self.expected.get(s, 0) > 0]
        informative = [s for s in estimated if self.taken[s] >= RESUMED * self.expected[s]]
        if not informative:
            return 1.0
        return sum(self.taken[s] for s in informative) / sum(self.expected[s] for s in informative)

    def remaining(self, of_stage: float | None = None) -> float | None:
        """Seconds until the end, or None if a stage has no estimate.

        `of_stage` are the seconds that the stage at work still needs, where its own speed tells.
        """
        ahead = [s for s in self.stages if s not in self.taken]
        if of_stage is not None:
            ahead = [s for s in ahead if s != self.name]
        if any(s not in self.expected for s in ahead):
            return None
        return (of_stage or 0.0) + self.ratio() * sum(self.expected[s] for s in ahead)

    def summary(self) -> str:
        """Time of the command and of its stages, such as "75 s: encode 12 s, generate 63 s"."""
        parts = [f"{s} {duration(t)}" for s, t in self.taken.items() if t >= MIN_LOGGED_SECONDS]
        total = duration(sum(self.taken.values()))
        return f"{total}: {', '.join(parts)}" if len(parts) > 1 else total


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


LOADING_BARS: ContextVar[bool] = ContextVar("loading_bars", default=True)  # whether libraries may show theirs


@contextlib.contextmanager
def without_loading_bars() -> Iterator[None]:
    """Hide the loading bars of diffusers and transformers within the block, as the command line does."""
    token = LOADING_BARS.set(False)
    try:
        yield
    finally:
        LOADING_BARS.reset(token)


@contextlib.contextmanager
def library_bars() -> Iterator[None]:
    """Load models of diffusers and transformers, without bars with TQDM_DISABLE=1 or in the command line.

    These libraries read the variable at their import at most.
    """
    modules = [importlib.import_module(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    hide = os.environ.get("TQDM_DISABLE") == "1" or not LOADING_BARS.get()
    hidden = [m for m in modules if hide and m.is_progress_bar_enabled()]
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
