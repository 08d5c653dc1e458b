"""One command at a time on a folder."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from dq.core.errors import RunError
from dq.core.files import sweep
from dq.core.text import printable

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("dq")

LOCK = ".lock"
HOLDER = ".lock.json"  # who holds the lock; written after it is acquired, and of no effect on it
WAIT_S = 0.2  # for a command that is just ending


@contextlib.contextmanager
def locked(folder: str | Path, accelerator: Accelerator, cache_dir: str | Path | None = None) -> Iterator[None]:
    """Reserve `folder` for the processes of this command.

    Files that killed processes left half-written are removed from it, and from `cache_dir`, which commands share.

    The lock is the kernel's (`flock`) and goes with the process that holds it, however that ends. Where the file
    system has none, a warning says so.

    Raises:
        RunError: in every process, if another command holds it.
    """
    from accelerate.utils import broadcast_object_list

    folder = Path(folder)
    lock: FileLock | None = None
    refusal: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            lock = _acquire(folder)
        except Timeout:
            refusal[0] = f"{folder} is in use by {_holder(folder)}; wait for it, or choose another --output_dir"
    if accelerator.is_local_main_process and not refusal[0]:
        for place in (folder,) if cache_dir is None else (folder, cache_dir):
            sweep(Path(place))
    if accelerator.num_processes > 1:
        broadcast_object_list(refusal)
    if refusal[0]:
        raise RunError(refusal[0])
    try:
        yield
    finally:
        if lock is not None and lock.is_locked:  # a forked child holds nothing
            for name in (HOLDER, LOCK):  # before the release, so that nobody waits on a file that is gone
                (folder / name).unlink(missing_ok=True)
            lock.release()
            with contextlib.suppress(OSError):
                folder.rmdir()  # a command that was refused leaves no empty folder


def _acquire(folder: Path) -> FileLock | None:
    """Acquire the lock of a folder; None where locks are not supported.

    A file beside it names its holder.

    Raises:
        Timeout: if another command holds it.
    """
    path = folder / LOCK
    identity: list[os.stat_result] = []
    lock = FileLock(path, WAIT_S, fallback_to_soft=False, on_acquired=lambda fd: identity.append(os.fstat(fd)))
    while True:
        try:
            lock.acquire()
        except OSError as e:
            if e.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                log.warning("%s cannot be locked (%s); do not start a second command on it", folder, e.strerror)
                return None
            raise
        # NFS renames an open file that another unlinks, whereas filelock looks for a file without a name
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(identity[-1], os.stat(path)):
                break
        lock.release()
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])  # the verb; further arguments may be a token
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "command": printable(command)}
    facts["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
    (folder / HOLDER).write_text(json.dumps(facts) + "\n")
    return lock


def _holder(folder: Path) -> str:
    try:
        facts = json.loads((folder / HOLDER).read_text())
        return f"process {facts['pid']} on {facts['host']} ({facts['command']}) since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another command"
