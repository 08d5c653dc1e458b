"""One item of `gpu_session.py` in a process of its own: clock, roofline and records.

    python pipelines/gpu_measure.py gpu_items_training:students --device cuda --output OUT

An item is a function of a `Session`. It writes a row to OUT/records.jsonl as soon as a number is measured, so that a
crash or a hang loses only what comes after it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from gpu_summary import append, read_records
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).parents[1]
ROUNDS, REPEATS = 2, 5
NOT_HERE = 77  # exit code of an item that this machine cannot run
HALF = (torch.bfloat16, torch.float16)
# operations that read and write no memory, beside views
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}


class NotHere(Exception):
    """This machine lacks what an item needs."""


@dataclass(frozen=True)
class Session:
    """What an item is given."""

    device: torch.device
    tiny: bool
    output: Path
    item: str
    seed: int = 0
    command: str = ""
    ceilings: Mapping[str, float] = field(default_factory=dict)  # FLOP/s and bytes/s, see `roofline`

    def size(self, full: Any, tiny: Any) -> Any:
        """A size of the item, or of its rehearsal."""
        return tiny if self.tiny else full

    @property
    def rounds(self) -> int:
        return self.size(ROUNDS, 1)

    @property
    def repeats(self) -> int:
        return self.size(REPEATS, 2)

    def write(self, name: str, **facts: Any) -> None:
        """Append a row to the records and flush it to the disk."""
        row = {"item": self.item, "name": name, **facts, "seed": self.seed, "command": self.command, "tiny": self.tiny}
        append(self.output / "records.jsonl", {**row, **machine(self.device)})


def machine(device: torch.device) -> dict[str, Any]:
    """Card, versions and threads that numbers belong to."""
    cuda = device.type == "cuda"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if cuda and torch.backends.cudnn.is_available():
        versions["cudnn"] = str(torch.backends.cudnn.version())
    if "diffusers" in sys.modules:
        versions["diffusers"] = sys.modules["diffusers"].__version__
    return {
        "card": torch.cuda.get_device_name(device) if cuda else f"CPU {platform.machine()}",
        "versions": versions,
        "threads": torch.get_num_threads(),
    }


# --- time and memory ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat of some work, by round, and its peak memory."""

    rounds: tuple[tuple[float, ...], ...]
    peak_bytes: int | None  # allocated on the device; None on a CPU

    @property
    def facts(self) -> dict[str, Any]:
        every = [s for r in self.rounds for s in r]
        return {
            "median_s": statistics.median(every),
            "least_s": min(every),
            "most_s": max(every),
            "round_medians_s": [statistics.median(r) for r in self.rounds],
            "repeats": len(every),
            "peak_bytes": self.peak_bytes,
        }


def wait(device: torch.device) -> None:
    """Wait for the work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_in_turn(
    s: Session, ways: Mapping[str, Callable[[], Any]], *, repeats: int | None = None
) -> dict[str, Timing]:
    """Time several ways to do one piece of work, round by round in turn, after a call of each that is not timed.

    A way that returns a float gives the seconds that count. A way that runs out of memory is left out.
    """
    repeats = repeats or s.repeats
    seconds: dict[str, list[tuple[float, ...]]] = {}
    peaks: dict[str, int] = {}
    alive = dict(ways)
    for name, way in ways.items():
        try:
            way()
        except torch.OutOfMemoryError as e:
            del alive[name]
            s.write(name, status="out of memory", reason=str(e).splitlines()[0][:200])
            torch.cuda.empty_cache()
    for _ in range(s.rounds):
        for name, way in alive.items():
            if s.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(s.device)
            seconds.setdefault(name, []).append(tuple(_seconds(way, s.device) for _ in range(repeats)))
            if s.device.type == "cuda":
                peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated(s.device))
    return {name: Timing(tuple(r), peaks.get(name)) for name, r in seconds.items()}


def _seconds(way: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    reported = way()
    wait(device)
    return reported if isinstance(reported, float) else time.perf_counter() - began


def compare(
    s: Session,
    group: str,
    ways: Mapping[str, Callable[[], Any]],
    *,
    units: int,
    unit: str,
    against: str | None = None,
    parity: Mapping[str, float] | None = None,
    counted: Mapping[str, Callable[[], Any]] | None = None,
    scale: int = 1,
    repeats: int | None = None,
) -> None:
    """Time ways in turn and write a row for each.

    Args:
        s: the session.
        group: what all of them do, part of the name of their rows.
        ways: functions by name.
        units: images, steps or classes of one call.
        unit: what these are.
        against: the way that the others are compared with in the summary.
        parity: differences from a reference, by its name.
        counted: calls by way, whose operations are counted for the roofline.
        scale: how many of these calls one of a way is.
        repeats: calls of a round; None: those of the session.
    """
    bounds = {name: roofline(s.ceilings, call) for name, call in (counted or {}).items()}
    for name, timing in timed_in_turn(s, ways, repeats=repeats).items():
        facts = timing.facts
        per_second = units / facts["median_s"]
        bound = {k: scale * v for k, v in bounds.get(name, {}).items()}
        if bound:
            bound["share"] = bound["roofline_s"] / facts["median_s"]
        reference = None if against in (None, name) else f"{group}: {against}"
        rate = {"unit": unit, "units": units, "per_second": per_second, "against": reference}
        s.write(f"{group}: {name}", status="measured", **facts, **rate, **bound, parity=dict(parity or {}))


# --- roofline -----------------------------------------------------------------------------------------------------


class _Work(TorchDispatchMode):
    """Counts operations and bytes of every operation of torch within a block, forward and backward."""

    def __init__(self, ceilings: Mapping[str, float]) -> None:
        super().__init__()
        self.ceilings, self.flops, self.bytes, self.seconds = ceilings, 0, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.name.partition("::")[2] in FREE:
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        moved = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        count = flop_registry.get(func._overloadpacket)
        flops = int(count(*args, **(kwargs or {}), out_val=out)) if count else 0
        self.flops += flops
        self.bytes += moved
        kind = _unit(func._schema.name, next((t.dtype for t in tensors if t.is_floating_point()), torch.float32))
        rates = (self.ceilings.get(kind, 0.0), self.ceilings.get("copy", 0.0))
        self.seconds += max((n / r for n, r in zip((flops, moved), rates, strict=True) if r), default=0.0)
        return out


def _unit(operation: str, dtype: torch.dtype) -> str:
    """The ceiling that bounds an operation: on CUDA, float32 convolutions are TF32 unless switched off."""
    convolution = "convolution" in operation
    if dtype in HALF:
        return "conv_bf16" if convolution else "gemm_bf16"
    if convolution:
        return "conv_tf32" if torch.backends.cudnn.allow_tf32 else "gemm_float32"
    return "gemm_tf32" if torch.backends.cuda.matmul.allow_tf32 else "gemm_float32"


def roofline(ceilings: Mapping[str, float], call: Callable[[], Any]) -> dict[str, Any]:
    """Operations, bytes and the least seconds of a call, by the ceilings measured in the same session.

    Each operation of torch takes at least max(FLOP / FLOP/s, bytes / bytes/s), and nothing is fused: compiled code can
    be faster than this bound. Autocast's ceiling is that of the dtype in which an operation is done.
    """
    with _Work(ceilings) as work:
        call()
    return {"flops": work.flops, "bytes": work.bytes, "roofline_s": work.seconds}


def difference(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||, in float64 on the CPU."""
    a, b = value.detach().cpu().double(), reference.detach().cpu().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def load_script(path: str) -> ModuleType:
    """A script of this repository as a module, by its path below the root."""
    name = "script_" + Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@contextlib.contextmanager
def no_tf32() -> Iterator[None]:
    """Keep convolutions and products of float32 in float32 within a block."""
    convolutions = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("function", help="module:function of the item")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", default="")
    args = parser.parse_args()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device", file=sys.stderr)
        return NOT_HERE
    module, _, name = args.function.partition(":")
    command = args.command or shlex.join(["python", *sys.argv])
    measured = [r["ceilings"] for r in read_records(args.output / "records.jsonl") if "ceilings" in r]
    ceilings = measured[-1] if measured else {}
    session = Session(args.device, args.tiny, args.output, name, args.seed, command, ceilings)
    try:
        getattr(importlib.import_module(module), name)(session)
    except NotHere as e:
        print(e, file=sys.stderr)
        return NOT_HERE
    return 0


if __name__ == "__main__":
    # by its importable name, so that items raise the same NotHere
    from gpu_measure import main as run

    sys.exit(run())
