from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forking import Forked

from dq.core.errors import RunError
from dq.core.files import temporary_beside
from dq.core.locks import HOLDER, LOCK, locked
from dq.core.processes import make_accelerator

HOLD = """
import sys, time
from dq.core.processes import make_accelerator
from dq.core.locks import locked
with locked(sys.argv[1], make_accelerator(cpu=True)):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path) -> subprocess.Popen:
    """A process that holds the lock of a folder."""
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.multi_process
def test_a_second_command_is_refused_until_the_first_is_dead(tmp_path: Path, accelerator) -> None:
    process = holder(tmp_path / "run")
    try:
        message = (
            rf"run is in use by process {process.pid} on \S+ \(-c {re.escape(str(tmp_path / 'run'))}\) since .*; "
            "wait for it, or choose another --output_dir"
        )
        with pytest.raises(RunError, match=message), locked(tmp_path / "run", accelerator):
            pass
        with locked(tmp_path / "other", accelerator):  # its own folder is nobody else's business
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = temporary_beside(tmp_path / "run" / "deep" / "x.bin")
    left.parent.mkdir()
    left.with_name(left.name.replace(str(os.getpid()), str(process.pid))).write_text("half")
    assert (tmp_path / "run" / LOCK).is_file()  # a crash leaves the file, and it holds nobody up
    with locked(tmp_path / "run", accelerator):
        assert json.loads((tmp_path / "run" / HOLDER).read_text())["pid"] == os.getpid()
        assert not list(left.parent.iterdir())
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["deep"]
    shared = tmp_path / "cache" / "full" / left.name.replace(str(os.getpid()), str(process.pid))
    shared.parent.mkdir(parents=True)
    of_living = shared.with_name(left.name)
    for file in (shared, of_living):
        file.write_text("half")
    with locked(tmp_path / "run", accelerator, tmp_path / "cache"):
        assert list(shared.parent.iterdir()) == [of_living]


def test_one_process_cannot_hold_a_folder_twice(tmp_path: Path, accelerator) -> None:
    with locked(tmp_path, accelerator), pytest.raises(RunError, match="is in use by"), locked(tmp_path, accelerator):
        pass
    with locked(tmp_path, accelerator):
        pass


def test_the_clock_may_go_back(tmp_path: Path, accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path, accelerator):
        monkeypatch.setattr(time, "time", lambda: 0.0)
        os.utime(tmp_path / LOCK, (10**10, 10**10))  # written in the far future
        with pytest.raises(RunError, match="is in use by"), locked(tmp_path, accelerator):
            pass
    with locked(tmp_path, accelerator):
        pass


def test_a_command_that_fails_leaves_no_empty_folder(tmp_path: Path, accelerator) -> None:
    with pytest.raises(ValueError, match="no"), locked(tmp_path / "a", accelerator):
        raise ValueError("no")
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("")
    with locked(tmp_path / "b", accelerator):
        pass
    assert [f.name for f in (tmp_path / "b").iterdir()] == ["mine.txt"]


@pytest.mark.multi_process
def test_every_process_of_a_second_command_is_refused(tmp_path: Path) -> None:
    first = holder(tmp_path / "run")
    try:

        def hold() -> None:
            try:
                with locked(tmp_path / "run", make_accelerator(cpu=True)):
                    pass
            except RunError as e:
                print(f"refused: {e}")

        output, errors = Forked(hold, processes=2).communicate(timeout=120)
        assert output.count(f"is in use by process {first.pid}") == 2, output + errors[-2000:]
    finally:
        first.kill()
        first.wait()


def test_the_lock_of_a_file_that_another_removed_meanwhile_is_none(
    tmp_path: Path, accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holder that ends between our opening and our locking takes the file with it, and a third makes a new one."""
    lock = fcntl.flock
    third: list[int] = []

    def late(handle: int, operation: int) -> None:
        if not third:
            (tmp_path / LOCK).unlink()
            third.append(os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT))
            lock(third[0], fcntl.LOCK_EX)
        lock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(RunError, match="is in use by"), locked(tmp_path, accelerator):
        pass
    assert (tmp_path / LOCK).is_file()  # the third one's
    os.close(third[0])
    with locked(tmp_path, accelerator):
        pass


@pytest.mark.multi_process
def test_a_forked_child_neither_holds_nor_releases_the_lock(tmp_path: Path, accelerator) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(tmp_path, accelerator))

        def leave_and_wait() -> None:
            stack.close()
            (tmp_path / "left").touch()
            time.sleep(600)

        child = Forked(leave_and_wait)
        try:
            while not (tmp_path / "left").exists():  # until the time limit of the suite
                assert child.poll() is None
                time.sleep(0.01)
            assert (tmp_path / LOCK).is_file()
            stack.close()
            with locked(tmp_path, accelerator):  # although the child lives
                assert child.poll() is None
        finally:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_of(
    code: int, tmp_path: Path, accelerator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path, accelerator):
        assert not (tmp_path / HOLDER).exists()
    assert "cannot be locked" in caplog.text
    assert "do not start a second command on it" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", '{"pid": 1}', "{"])
def test_a_damaged_file_of_the_holder_names_nobody(content: str, tmp_path: Path, accelerator) -> None:
    with locked(tmp_path, accelerator):
        (tmp_path / HOLDER).write_text(content)
        with pytest.raises(RunError, match="is in use by another command; wait"), locked(tmp_path, accelerator):
            pass


def test_the_file_of_the_holder_has_no_token(tmp_path: Path, accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dq", "run", "--token", "secret"])
    with locked(tmp_path, accelerator):
        assert json.loads((tmp_path / HOLDER).read_text())["command"] == "dq run"
