"""Threads beside the main one: reading ahead, writing behind, and mapping over cores."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

from dq.core.devices import cores_per_process

log = logging.getLogger("dq")
J = TypeVar("J")
R = TypeVar("R")


@contextlib.contextmanager
def reading_ahead(jobs: Sequence[J], read: Callable[[J], R], *, depth: int = 2) -> Iterator[Iterator[tuple[J, R]]]:
    """Yield an iterator over jobs and what `read` gives for them, in order.

    A thread reads, one job after another, and is up to `depth` jobs ahead. An error of `read` is raised where its
    result would come. Leaving the block waits for the job that is being read and drops the others.
    """
    with ThreadPoolExecutor(1) as reader:
        pending: deque[Future[R]] = deque(reader.submit(read, job) for job in jobs[:depth])

        def results() -> Iterator[tuple[J, R]]:
            for i, job in enumerate(jobs):
                result = pending.popleft().result()
                if i + depth < len(jobs):
                    pending.append(reader.submit(read, jobs[i + depth]))
                yield job, result

        try:
            yield results()
        finally:
            for future in pending:
                future.cancel()


class Writer:
    """Context manager whose threads make calls, while the next ones are prepared.

    At most as many calls as threads are pending; with one thread they are made in their order. An error of a call is
    raised in the calling thread, by a later `submit` or at the end of the block. A block that ends by another error,
    such as Ctrl-C, still waits for the calls that were submitted.
    """

    def __init__(self, threads: int = 1) -> None:
        self._executor = ThreadPoolExecutor(threads)
        self._threads = threads
        self._pending: deque[Future[object]] = deque()

    def __enter__(self) -> Self:
        return self

    def submit(self, call: Callable[[], object]) -> None:
        """Start a call, once fewer than all threads have one."""
        self._finish(self._threads - 1)
        self._pending.append(self._executor.submit(call))

    def _finish(self, most: int = 0) -> None:
        """Wait until at most so many calls are pending."""
        while len(self._pending) > most:
            self._pending.popleft().result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._executor.shutdown()
        for future in self._pending if kind is not None else ():
            if (lost := future.exception()) is not None:
                log.warning("%s", lost)  # beside the error that ended the block


def thread_map(function: Callable[[J], R], items: Iterable[J], *, threads: int | None = None) -> Iterator[R]:
    """Results of a function for items, in order, computed by several threads.

    For work that releases the interpreter's lock, such as coding images and hashing. At most a few items per thread
    are computed ahead. `threads` None: one for each core of this process; with one, items are computed when needed.
    """
    number = threads or cores_per_process()
    if number == 1:
        yield from map(function, items)
        return
    queue = iter(items)
    with ThreadPoolExecutor(number) as pool:
        pending = deque(pool.submit(function, item) for item in itertools.islice(queue, 4 * number))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in itertools.islice(queue, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()
