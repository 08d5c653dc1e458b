"""Work in processes that are forked and so have everything imported; a start takes seconds for that."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from fork_server import redirect
from launching import free_port


class Forked:
    """Work in forked processes that see one another as those of torchrun do.

    Has the attributes of `subprocess.Popen` that tests use. All processes are of one group, whose number is `pid`. As
    under a launcher, the first that fails ends the others.

    Args:
        work: what each does; its result is the exit code.
    """

    def __init__(self, work: Callable[[], int | None], processes: int = 1) -> None:
        self._output = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._output.name, name) for name in ("out", "err"))
        port = free_port() if processes > 1 else ""
        self._codes: dict[int, int | None] = {}
        self.pid = 0
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                self._child(work, rank, processes, port)
            self.pid = self.pid or pid
            os.setpgid(pid, self.pid)  # here too: a signal to the group may be sent before the child has run
            self._codes[pid] = None

    def _child(self, work: Callable[[], int | None], rank: int, processes: int, port: str) -> None:
        code = 1
        try:
            os.setpgid(0, self.pid)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the suite ignores Ctrl-C
            redirect(self._out, self._err)
            for logger in (logging.getLogger(), logging.getLogger("dq")):  # handlers of pytest
                logger.handlers.clear()
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            code = work() or 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @property
    def returncode(self) -> int | None:
        """0 or the first code that is not; negative for signals; None while a process runs."""
        codes = list(self._codes.values())
        return None if None in codes else next((c for c in codes if c), 0)

    def poll(self) -> int | None:
        for pid, code in self._codes.items():
            if code is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._codes[pid] = os.waitstatus_to_exitcode(status)
        if None in self._codes.values() and any(self._codes.values()):
            os.killpg(self.pid, signal.SIGKILL)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and error of all processes, after their end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired("forked processes", timeout or 0.0)
            time.sleep(0.01)
        out, err = self._out.read_text(), self._err.read_text()
        self._output.cleanup()
        return out, err
