"""Processes: the accelerator, and which process works on which unit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from dq.core.devices import launcher_arguments, set_threads
from dq.core.errors import RunError
from dq.core.memory import keep_freed_memory
from dq.core.text import plural

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(
    *, cpu: bool = False, share_gpus: bool = False, mixed_precision: str | None = None
) -> Accelerator:
    """Build the one `Accelerator` of this process and check that it sees every launched process.

    Without a GPU, each launched process believes it is alone unless the accelerator is told to use the CPU; the
    result would be as many complete runs writing over one another. Hence the CPU is chosen here when there is no CUDA
    device, and the world size is compared with the launcher's. Other devices are taken only if the variable
    ACCELERATE_TORCH_DEVICE names one: Apple's `mps` has no float64, which k-means and the denoiser's schedule use.

    With `share_gpus` there may be more processes than GPUs on a machine: they meet by gloo on the CPU, since NCCL
    refuses two processes on a card, and the device of each is that of `shared_gpu`. Small students and refinements
    leave most of a GPU idle when one process waits for its own launches.

    Torch's threads are bounded by the share of the cores that this process has, and freed memory is kept.

    Raises:
        RunError: if the processes on this machine are more than its GPUs without `share_gpus`, or do not see one
            another.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    cpu = cpu or not (torch.cuda.is_available() or os.environ.get("ACCELERATE_TORCH_DEVICE"))
    local, gpus = os.environ.get("LOCAL_WORLD_SIZE", "1"), torch.cuda.device_count()
    crowded = not cpu and bool(gpus) and local.isdigit() and int(local) > gpus
    if crowded and not share_gpus:
        raise RunError(
            f"{local} processes on this machine would share {plural(gpus, 'GPU')}; start at most {gpus}, or give "
            "--share_gpus where many small networks are trained or images refined, or --cpu"
        )
    # Stages are embarrassingly parallel, so a fast rank may wait for hours at the end of one.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=cpu or crowded, mixed_precision=mixed_precision, kwargs_handlers=[patience])
    if crowded:
        accelerator.state.device = shared_gpu(accelerator.local_process_index, gpus)
        torch.cuda.set_device(accelerator.device)
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise RunError(
            f"the launcher started {expected} processes but this one sees {accelerator.num_processes}; "
            "launch with `accelerate launch --multi_gpu --num_processes N -m dq.cli ...` or torchrun"
        )
    set_threads()
    keep_freed_memory()
    return accelerator


def shared_gpu(local_rank: int, gpus: int) -> torch.device:
    """Return the GPU of a process, by its rank on this machine: they are dealt out in turn."""
    return torch.device("cuda", local_rank % gpus)


def hardware_line(accelerator: Accelerator) -> str:
    """How many processes run, on which device, with how many threads."""
    device, number = accelerator.device, accelerator.num_processes
    name = f"{torch.cuda.get_device_name(device)} ({device.type})" if device.type == "cuda" else device.type
    threads = torch.get_num_threads()
    processes = plural(number, "process")
    return f"{processes} on {name}, {threads} thread{'s' * (threads > 1)}{' each' * (number > 1)}"


def check_launch(accelerator: Accelerator) -> str | None:
    """The message on a launcher that started one process of several, None otherwise.

    On a machine without several GPUs, `accelerate launch --num_processes 2` starts one process, with or without --cpu.
    """
    requested = _launcher_processes(launcher_arguments())
    if accelerator.num_processes > 1 or requested < 2:
        return None
    if accelerator.device.type == "cuda":
        return (
            f"accelerate launch was asked for {requested} processes but started 1; "
            "this machine has too few GPUs for more"
        )
    return (
        f"accelerate launch was asked for {requested} processes but started 1, since without GPUs it needs "
        f"--multi_gpu; launch with `accelerate launch --multi_gpu --num_processes {requested} -m dq.cli ...` or "
        f"`torchrun --nproc_per_node {requested} -m dq.cli ...`"
    )


def _launcher_processes(arguments: Sequence[str]) -> int:
    """Number of processes in the arguments of `accelerate launch`, or in its file.

    0 if it is not given.
    """
    names = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli")
    first = next((i + 1 for i, a in enumerate(arguments) if a in names or os.path.basename(a) in names), None)
    if first is None:
        return 0
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    options: dict[str, str] = {}
    for option, following in zip(arguments[first:], [*arguments[first + 1 :], ""], strict=True):
        name, separator, value = option.partition("=")
        options.setdefault(name.replace("-", "_"), value if separator else following)
        if option == "-m":  # what follows belongs to the program
            break
    number = options.get("__num_processes", "")
    if number.isdigit():
        return int(number)
    file = options.get("__config_file", default_config_file)
    try:
        return int(load_config_from_file(file).num_processes) if os.path.isfile(file) else 0
    except (OSError, ValueError, TypeError, KeyError):  # the launcher has read it, so that it says nothing here
        return 0


def assign_units(costs: Sequence[float], rank: int, world_size: int) -> list[int]:
    """Indices of the units that `rank` works on.

    The largest unit goes first, each to the least loaded rank; the lowest rank wins ties.

    Every rank computes the same division from the same costs; the indices come back in ascending order.
    """
    load = [0.0] * world_size
    assigned = []
    for unit in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(world_size), key=lambda r: (load[r], r))
        load[owner] += costs[unit]
        if owner == rank:
            assigned.append(unit)
    return sorted(assigned)


def cut(n: int, *, smallest: int, largest: int) -> list[range]:
    """Cut 0, ..., n - 1 into nearly equal ranges, the same for any number of processes.

    There are 64, unless that makes one shorter than `smallest` or longer than `largest`.
    """
    size = min(max(-(-n // 64), smallest), largest)
    number = -(-n // size)
    return [range(i * n // number, (i + 1) * n // number) for i in range(number)]
