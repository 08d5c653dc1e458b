"""One command at a time on a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dq.core.errors import RunError
from dq.core.files import sweep

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("dq")

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: str | Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep `folder` to the processes of this command, and clear it of what killed ones left half-written.

    The lock is the kernel's (`flock`) and goes with the process that holds it, however that ends. Where the file
    system has none, a warning says so.

    Raises:
        RunError: in every process, if another command holds it.
    """
    from accelerate.utils import broadcast_object_list

    folder = Path(folder)
    handle: int | None = None
    refusal: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            handle = _acquire(folder / LOCK)
        except BlockingIOError:
            refusal[0] = f"{folder} is in use by {_holder(folder / LOCK)}; wait for it, or choose another --output_dir"
    if accelerator.is_local_main_process and not refusal[0]:
        sweep(folder)
    if accelerator.num_processes > 1:
        broadcast_object_list(refusal)
    if refusal[0]:
        raise RunError(refusal[0])
    try:
        yield
    finally:
        if handle is not None:
            (folder / LOCK).unlink(missing_ok=True)  # before it is released, so that nobody waits on a lost file
            os.close(handle)
            with contextlib.suppress(OSError):
                folder.rmdir()  # a command that was refused leaves no empty folder


def _acquire(path: Path) -> int | None:
    """An open, locked file. Its holder may unlink it between our opening and our locking it; then it is another's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(handle)
            if isinstance(e, BlockingIOError):
                raise
            if e.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                log.warning("%s cannot be locked (%s); do not start a second command on it", path.parent, e.strerror)
                return None
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        os.close(handle)
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.truncate(handle, 0)
    os.pwrite(handle, json.dumps(facts).encode(), 0)
    return handle


def _holder(path: Path) -> str:
    try:
        facts = json.loads(path.read_text())
        return f"process {facts['pid']} on {facts['host']} since {facts['since']}"
    except (OSError, ValueError, KeyError):
        return "another command"
