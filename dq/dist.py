"""Units of work, ranks and files: who does what, and how a result reaches the disk whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from dq.errors import InputError, RunError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def make_accelerator(*, cpu: bool = False, mixed_precision: str | None = None) -> Accelerator:
    """Build the one `Accelerator` of this process and check that it sees every launched process.

    Without a GPU, each launched process believes it is alone unless the accelerator is told to use the CPU; the
    result would be as many complete runs writing over one another. Hence the CPU is chosen here when no accelerator
    device exists, and the world size is compared with the launcher's.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    cpu = cpu or not torch.accelerator.is_available()
    # Stages are embarrassingly parallel, so a fast rank may wait for hours at the end of one.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision, kwargs_handlers=[patience])
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise RunError(
            f"the launcher started {expected} processes but this one sees {accelerator.num_processes}; "
            "launch with `accelerate launch --multi_gpu --num_processes N -m dq.cli ...` or torchrun"
        )
    return accelerator


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from a tuple of identities, e.g. (run seed, "generate", class, rank): never from a process rank
    or a batch index, so that results do not depend on how the work was divided."""
    digest = hashlib.blake2b("\x1f".join(str(p) for p in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def digest_of(obj: Any, *, size: int = 8) -> str:
    """Hex digest of a JSON-serialisable object, independent of key order."""
    text = json.dumps(obj, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


def digest_of_tensors(tensors: dict[str, torch.Tensor], *, size: int = 8) -> str:
    """Hex digest of named tensors: names, dtypes, shapes and bytes."""
    h = hashlib.blake2b(digest_size=size)
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name}|{t.dtype}|{tuple(t.shape)}".encode())
        if t.numel():
            h.update(t.flatten().view(torch.uint8).numpy().data)
    return h.hexdigest()


def shard(costs: Sequence[float], rank: int, world_size: int) -> list[int]:
    """Indices of the units that `rank` works on: largest first, each to the least loaded rank (ties: lowest rank).

    Every rank computes the same division from the same costs; the indices come back in ascending order.
    """
    load = [0.0] * world_size
    mine = []
    for unit in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(world_size), key=lambda r: (load[r], r))
        load[owner] += costs[unit]
        if owner == rank:
            mine.append(unit)
    return sorted(mine)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and takes the final name, on failure it is gone.

    A full disk becomes one sentence that names the file and how to go on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"the disk is full while writing {path}; free some space and give the same command again, "
                "finished work is kept"
            ) from e
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, obj: Any) -> None:
    """Write an object as indented JSON, atomically."""
    write_text(path, json.dumps(obj, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or damaged one is one sentence."""
    with readable(path):
        return json.loads(path.read_text())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Write tensors as safetensors, atomically, with JSON-encoded metadata.

    All metadata goes under one key: safetensors writes several keys in random order, and the same result must give
    the same bytes.
    """
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_bytes(path, save(contiguous, {"dq": json.dumps(metadata or {}, sort_keys=True)}))


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as e:
        raise RunError(f"{path} cannot be read ({e}); delete it and give the same command again") from e


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read tensors and metadata written by `write_tensors`."""
    with readable(path), safe_open(path, framework="pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, _metadata(f)  # noqa: SIM118  (not a dict)


def read_metadata(path: Path) -> dict[str, Any]:
    """Read only the metadata of a file written by `write_tensors`."""
    with readable(path), safe_open(path, framework="pt") as f:
        return _metadata(f)


def _metadata(f: Any) -> dict[str, Any]:
    return json.loads((f.metadata() or {}).get("dq", "{}"))


def check_name(name: str, what: str) -> None:
    """Refuse names that could not be a folder or would leave it."""
    if not re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]*", name):
        raise InputError(f"{what} {name!r} must be letters, digits and _ . + - (it names a folder); choose another")


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append one event to a JSONL log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        f.write(json.dumps(record, default=str) + "\n")


def progress(items: Iterable[T], *, desc: str, total: int | None = None, unit: str = "it", main: bool = True) -> tqdm:
    """A progress bar with ETA on standard error, shown by the main process only, and not with TQDM_DISABLE=1."""
    # tqdm itself asks the environment at its import, and not at all where `disable` is given
    hidden = not main or os.environ.get("TQDM_DISABLE") == "1"
    return tqdm(items, desc=desc, total=total, unit=unit, disable=hidden, file=sys.stderr, dynamic_ncols=True)
