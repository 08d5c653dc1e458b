from __future__ import annotations

import threading
import time

import pytest

from dq.core.threads import Writer, reading_ahead, thread_map


def test_a_thread_reads_so_many_jobs_ahead() -> None:
    started: list[int] = []
    running = threading.Semaphore(0)

    def read(job: int) -> int:
        started.append(job)
        running.release()
        return job * job

    with reading_ahead(range(6), read, depth=2) as results:
        assert next(results) == (0, 0)
        for _ in range(3):
            assert running.acquire(timeout=10)
        assert started == [0, 1, 2]
        assert list(results) == [(i, i * i) for i in range(1, 6)]


def test_an_error_of_reading_comes_where_its_result_would() -> None:
    def read(job: int) -> int:
        if job == 2:
            raise ValueError("job 2")
        return job

    got = []
    with pytest.raises(ValueError, match="job 2"), reading_ahead(range(4), read) as results:
        got += [result for _, result in results]
    got_before = []
    with reading_ahead(range(4), read) as results:
        got_before += [next(results)[1], next(results)[1]]
    assert got == []
    assert got_before == [0, 1]


def test_what_is_not_taken_is_not_read() -> None:
    started: list[int] = []

    def read(job: int) -> int:
        started.append(job)
        time.sleep(0.02)
        return job

    with reading_ahead(range(50), read) as results:
        next(results)
    assert len(started) <= 3


def test_a_writer_calls_in_order_beside_the_caller() -> None:
    main, threads, calls = threading.get_ident(), set(), []

    def call(i: int) -> None:
        threads.add(threading.get_ident())
        calls.append(i)

    with Writer() as writer:
        for i in range(5):
            writer.submit(lambda i=i: call(i))
    assert calls == list(range(5))
    assert len(threads) == 1
    assert main not in threads


def test_errors_of_a_writer_reach_the_caller() -> None:
    def fail() -> None:
        raise OSError("no space")

    later = []
    with pytest.raises(OSError, match="no space"), Writer() as writer:
        writer.submit(fail)
        writer.submit(lambda: later.append(1))
    with pytest.raises(OSError, match="no space"), Writer() as writer:
        writer.submit(fail)  # nothing follows
    assert later == []


def test_what_was_submitted_is_written_in_spite_of_an_interruption(caplog: pytest.LogCaptureFixture) -> None:
    written = []

    def write() -> None:
        time.sleep(0.1)
        written.append(1)

    with pytest.raises(KeyboardInterrupt), Writer() as writer:
        writer.submit(write)
        raise KeyboardInterrupt
    assert written == [1]

    def fail() -> None:
        raise OSError("no space")

    with pytest.raises(KeyboardInterrupt), Writer() as writer:
        writer.submit(fail)
        raise KeyboardInterrupt
    assert "no space" in caplog.text


def test_a_writer_of_several_threads_makes_all_calls_and_raises() -> None:
    together = threading.Barrier(3, timeout=10)
    done = []

    def call(i: int) -> None:
        together.wait()
        done.append(i)

    with Writer(3) as writer:
        for i in range(6):
            writer.submit(lambda i=i: call(i))
    assert sorted(done) == list(range(6))

    def fail() -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"), Writer(3) as writer:
        for _ in range(9):
            writer.submit(fail)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_map_on_threads_gives_results_in_order(threads: int) -> None:
    def slow_at_first(i: int) -> int:
        time.sleep(0.01 if i < 3 else 0)
        return -i

    assert list(thread_map(slow_at_first, range(40), threads=threads)) == [-i for i in range(40)]
    assert list(thread_map(slow_at_first, [], threads=threads)) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_a_map_on_threads_takes_items_when_needed_and_raises(threads: int) -> None:
    taken: list[int] = []

    def items():
        for i in range(1000):
            taken.append(i)
            yield i

    def fail(i: int) -> int:
        if i == 5:
            raise ValueError("item 5")
        return i

    with pytest.raises(ValueError, match="item 5"):
        list(thread_map(fail, items(), threads=threads))
    assert len(taken) <= 6 + 4 * threads
