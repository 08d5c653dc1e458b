"""What this process may use: cores, threads, number formats that are fast, rounding of float32 products."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

Use = Literal["inference", "training"]

CGROUPS = Path("/sys/fs/cgroup")
CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # flags of CPUs that compute in bfloat16: x86 and ARM


# --- cores and threads --------------------------------------------------------------------------------------------


def available_cores() -> int:
    """Cores that this process may use, at least 1.

    The minimum of the CPU affinity and the quotas of its control groups.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *_quotas()]))


def _quotas() -> Iterator[int]:
    """Whole cores that the control groups (version 2 and 1) of this process grant it."""
    groups = [line.rpartition(":")[2].strip("/") for line in read_text("/proc/self/cgroup").splitlines()]
    for path in dict.fromkeys(["", *groups]):
        parts = Path(path).parts
        for depth in range(len(parts) + 1):
            group = Path(*parts[:depth])
            quota = read_text(CGROUPS / group / "cpu.max").split()
            if len(quota) != 2:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                quota = [read_text(CGROUPS / "cpu" / group / name).strip() for name in names]
            if quota[0].isdigit() and quota[1].isdigit() and int(quota[1]):
                yield int(quota[0]) // int(quota[1])


def cores_per_process() -> int:
    """`available_cores` divided by the processes that a launcher started on this machine, at least 1."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, available_cores() // (int(processes) if processes.isdigit() and int(processes) else 1))


def set_threads() -> int:
    """Bound torch's threads by this process's share of the cores; returns their number.

    A user's own OMP_NUM_THREADS or `torch.set_num_threads` to fewer is left as it is. torchrun and `accelerate launch`
    set OMP_NUM_THREADS=1 where the user set nothing: such a 1 is replaced by the share.
    """
    if "OMP_NUM_THREADS" not in os.environ or _launcher_chose_threads():
        share = cores_per_process()
        if torch.get_num_threads() > share or _launcher_chose_threads():
            torch.set_num_threads(share)
    return torch.get_num_threads()


def _launcher_chose_threads() -> bool:
    """Whether OMP_NUM_THREADS=1 comes from the launcher, whose own environment and arguments lack it."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if not launched or os.environ.get("OMP_NUM_THREADS") != "1":
        return False
    variables, arguments = launcher_environment(), launcher_arguments()
    named = any(a.replace("-", "_").startswith("__num_cpu_threads_per_process") for a in arguments)
    return not named and not any(v.startswith("OMP_NUM_THREADS=") for v in variables)


def launcher_environment() -> list[str]:
    """NAME=VALUE of the parent process as it was started; empty where there is no /proc."""
    return read_text(f"/proc/{os.getppid()}/environ").split("\0")


def launcher_arguments() -> list[str]:
    """The command line of the parent process; empty where there is no /proc."""
    return [a for a in read_text(f"/proc/{os.getppid()}/cmdline").split("\0") if a]


def reader_threads(device: torch.device | str | None = None) -> int:
    """Number of threads that read images.

    All cores of this process, or a quarter of them while `device` computes on the CPU.
    """
    busy = device is not None and torch.device(device).type == "cpu"
    return max(1, cores_per_process() // 4) if busy else cores_per_process()


def read_text(path: str | Path) -> str:
    """Text of a file of the system, empty if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def default_device() -> torch.device:
    """The CUDA device if there is one, else the CPU.

    Not Apple's MPS, which lacks float64.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- number formats -----------------------------------------------------------------------------------------------


def has_native_bfloat16(device: torch.device | str) -> bool:
    """Whether the device has instructions for bfloat16.

    These are CUDA from Ampere on, and CPUs with AVX512-BF16, AMX or ARM's bf16. Elsewhere bfloat16 is emulated, at a
    multiple of the time of float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = set(read_text("/proc/cpuinfo").split()) if kind == "cpu" else set()
    return not flags.isdisjoint(CPU_BFLOAT16)


def resolve_dtype(dtype: str, device: torch.device | str, use: Use) -> str:
    """The dtype of a setting on a device; "auto" is the fastest that is safe.

    auto is bfloat16 where it is native; else float32, except float16 on CUDA for inference. Training in float16 would
    need loss scaling. Other devices (MPS) get float32.
    """
    if dtype != "auto":
        return dtype
    if has_native_bfloat16(device):
        return "bfloat16"
    return "float16" if torch.device(device).type == "cuda" and use == "inference" else "float32"


def is_slow(dtype: str, device: torch.device | str) -> bool:
    """Whether the device computes in `dtype` at a multiple of the time of float32."""
    kind = torch.device(device).type
    if dtype == "bfloat16":
        return kind in ("cpu", "cuda") and not has_native_bfloat16(device)
    return dtype == "float16" and kind == "cpu"


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    """CUDA's float32 matrix products in TF32 (10 bits of mantissa) for the time of a block.

    For networks whose images differ by less than a gray level for it. Never for the whole process: products of crops
    and the distances of k-means would lose bits.
    """
    matmul = torch.backends.cuda.matmul
    # from torch 2.9 on; the older switch raises where a user has set only this one, but writing it serves both
    current = hasattr(matmul, "fp32_precision")
    before = matmul.fp32_precision if current else matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = before in (True, "tf32")
        if current:
            matmul.fp32_precision = before
