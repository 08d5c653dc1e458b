"""torch.compile where it is equal and faster, and the eager result everywhere else."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

log = logging.getLogger("dq")

MIN_GAIN = 1.05  # times as fast as eager code, from which compiled code is used
REPEATS = 3  # of each, to find out
OLDEST = (7, 0)  # compute capability that Triton supports
# units of rounding by which results may differ; float32 has those of TF32, in which CUDA multiplies
UNITS = 4
EPSILON = {torch.float32: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile needs for a device and this machine lacks, or None."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if torch.cuda.get_device_capability(device) < OLDEST:
            return f"{torch.cuda.get_device_name(device)} is too old for triton"
        names = [os.environ["CC"]] if "CC" in os.environ else ["cc", "gcc", "clang"]
    elif device.type != "cpu":
        return f"torch.compile is not used on {device.type}"
    return None if any(shutil.which(n) for n in names) else f"there is no compiler ({', '.join(names)})"


def compile_if_faster(
    what: str,
    blocks: Sequence[nn.Module],
    call: Callable[[], Tensor],
    device: torch.device,
    *,
    dtype: torch.dtype,
    min_gain: float = MIN_GAIN,
    backend: str | Callable[..., Any] = "inductor",
) -> bool:
    """Compile modules in place if their model then gives an equal result in less time.

    Equal is a relative difference of at most four units of rounding of the dtype. In every other case, a compiler that
    is missing or fails included, the modules are left as they were and one line is logged.

    Args:
        what: the model, named in the log.
        blocks: modules of it to compile; blocks of equal code are compiled once.
        call: the model's result for typical inputs, in the shapes that it will see.
        device: of the model.
        dtype: in which the model computes.
        min_gain: times as fast as without, at least.
        backend: of torch.compile.

    Returns:
        Whether the modules are compiled.
    """
    missing = missing_compiler(device) if backend == "inductor" else None
    if missing:
        log.info("compile: %s is not compiled, as %s", what, missing)
        return False
    reason, gain = None, 0.0
    try:
        eager = call()
        before = _seconds(call, device)
        for block in blocks:
            block.compile(backend=backend, dynamic=False)
        gap = _difference(call(), eager)
        bound = UNITS * EPSILON.get(dtype, 2.0**-10)
        gain = before / _seconds(call, device)
        if not gap <= bound:
            reason = f"its result then differs by {gap:.1e}, more than {bound:.1e}"
        elif gain < min_gain:
            reason = f"it is then {gain:.2f} times as fast, less than {min_gain:.2f}"
    except Exception as e:  # whatever a compiler raises, memory included: the eager code does not need it
        reason = f"that fails ({type(e).__name__}: {' '.join(str(e).split())[:150]})"
    if reason:
        undo(blocks)
        log.info("compile: %s is not compiled, as %s", what, reason)
        return False
    log.info("compile: %s is compiled, %.2f times as fast", what, gain)
    return True


def undo(blocks: Sequence[nn.Module]) -> None:
    """Let modules run as they did before `nn.Module.compile`."""
    for block in blocks:
        block._compiled_call_impl = None  # what nn.Module.compile sets


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Median seconds of some calls."""
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _difference(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||."""
    a, b = value.float(), reference.float()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


@contextlib.contextmanager
def fixed_rows(model: nn.Module, sizes: Sequence[int]) -> Iterator[None]:
    """Pad the batches of a model within a block; see `fix_rows`."""
    handles = fix_rows(model, sizes)
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def fix_rows(model: nn.Module, sizes: Sequence[int]) -> list[RemovableHandle]:
    """Pad batches to one of `sizes` rows by their last row, and cut the results, so that code is compiled once a size.

    Every tensor argument whose first axis is the batch is padded. Rows must not depend on one another. Batches larger
    than all sizes pass as they are.

    Returns:
        Handles of the hooks, whose `remove` undoes it.
    """
    pending: list[tuple[int, int]] = []  # rows of the call, and after padding

    def pad(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        n = next((len(a) for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim() > 1), 0)
        size = min((s for s in sizes if s >= n), default=n)
        pending.append((n, size))
        if n:
            args, kwargs = tree_map_only(Tensor, lambda a: _padded(a, n, size), (args, kwargs))
        return args, kwargs

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        n, size = pending.pop()
        if n in (0, size):
            return output
        return tree_map_only(Tensor, lambda a: a[:n] if a.dim() and len(a) == size else a, output)

    return [model.register_forward_pre_hook(pad, with_kwargs=True), model.register_forward_hook(cut)]


def _padded(a: Tensor, n: int, size: int) -> Tensor:
    """A batch with `size` rows in the layout of memory that a full batch has, since code is compiled for a layout."""
    if not a.dim() or len(a) != n:
        return a
    if n == size:
        return a.contiguous() if 0 in a.stride() else a  # one number for all rows
    last = a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last) and not a.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    out = torch.empty((size, *a.shape[1:]), dtype=a.dtype, device=a.device, memory_format=layout)
    out[:n] = a
    out[n:] = a[-1:]
    return out
