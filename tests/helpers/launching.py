"""Command lines that start several processes."""

from __future__ import annotations

import socket
import sys


def free_port() -> str:
    """A port that nothing listens on, for a launcher; suites that run side by side must not share one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def torchrun(processes: int = 2) -> list[str]:
    """The beginning of a command line that starts so many processes of what follows."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [*launcher, "--master_port", free_port()]
