"""A process that has imported what tests need and runs code in forks of itself, which saves seconds of imports each.

For code that must not run in the process of the tests, since libraries read their environment when they are imported.
Started as a script it serves; `ForkServer` starts and asks it. Requests and answers are lines of JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any


class ForkServer:
    """Runs code in forks of one interpreter, one at a time.

    Args:
        environment: of the interpreter; libraries have read it before any code runs.
        modules: imported at the start.
    """

    def __init__(self, environment: dict[str, str], *modules: str) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, __file__, *modules], env=environment, **pipes)

    def run(
        self, code: str, *arguments: str, cwd: Path, environment: dict[str, str], timeout: int = 240
    ) -> subprocess.CompletedProcess[str]:
        """Run code as `python -c CODE ARGUMENTS` would, with `environment` for what is read at the time of a call."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            request = {"code": code, "arguments": arguments, "cwd": str(cwd), "environment": environment}
            request |= {"out": str(out), "err": str(err), "timeout": timeout}
            assert self._process.stdin
            assert self._process.stdout
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            returncode = json.loads(self._process.stdout.readline())
            return subprocess.CompletedProcess(["python"], returncode, out.read_text(), err.read_text())

    def close(self) -> None:
        self._process.kill()  # an interpreter with so many modules ends slowly
        self._process.communicate()


def redirect(out: Path, err: Path) -> None:
    """Let standard output and error of this process go to files, whatever stands in the place of `sys.stdout`."""
    for number, path in ((1, out), (2, err)):
        with open(path, "ab") as f:
            os.dup2(f.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115


def work(request: dict[str, Any]) -> None:
    """Run the code of a request in this process, and end it."""
    code = 1
    try:
        redirect(Path(request["out"]), Path(request["err"]))
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        sys.argv = ["-c", *request["arguments"]]
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.alarm(request["timeout"])
            work(request)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve()
