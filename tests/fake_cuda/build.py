"""Compile `guard.cpp` once per version of torch, and load it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("guard.cpp")


def missing() -> str | None:
    """What the device needs and this machine lacks, or None."""
    if torch.version.cuda or torch.version.hip:
        return "the fake CUDA device needs a CPU build of torch"
    if compiler() is None:
        return "the fake CUDA device needs a C++ compiler: c++ on the path, or its name in CXX"
    return None


def compiler() -> str | None:
    """Path of a C++ compiler."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def load_guard() -> None:
    """Register the device in this process.

    Raises:
        RuntimeError: if the source does not compile, with the first lines of the compiler's output.
    """
    ctypes.CDLL(str(_library())).install_hooks()


def _library() -> Path:
    """The compiled library, from the folder of temporary files if an earlier process compiled the same source."""
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = ["-shared", "-fPIC", "-O0", "-std=c++20", abi, *include, f"-L{root / 'lib'}"]
    command = [str(compiler()), *flags, str(SOURCE), "-lc10", "-ltorch_cpu"]
    key = hashlib.sha256(SOURCE.read_bytes() + "\0".join([torch.__version__, *command]).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"dq-fake-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to somebody else; set TMPDIR to a folder of your own")
    library = folder / f"{key}.so"
    if not library.exists():
        partial = folder / f"{key}.{os.getpid()}"
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile with torch {torch.__version__}:\n{done.stderr[:2000]}")
        partial.replace(library)  # at once, since several processes may compile
    return library
