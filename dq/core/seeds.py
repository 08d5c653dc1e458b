"""Seeds, generators and digests that depend on identities and never on a rank or a batch."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch


class Hash(Protocol):
    """What hashlib's and xxhash's objects have in common."""

    def update(self, data: memoryview | bytes, /) -> None: ...


def derive_seed(*parts: object) -> int:
    """Derive a 63-bit seed from identities such as (run seed, "generate", class).

    A process rank or a batch index is no identity, so that results do not depend on how work is divided.
    """
    digest = hashlib.blake2b("\x1f".join(str(p) for p in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def digest_of(obj: object, *, size: int = 8) -> str:
    """Hex digest of a JSON-serialisable object, independent of key order."""
    text = json.dumps(obj, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


def digest_of_file(path: str | Path, *, size: int = 8) -> str:
    """Hex digest of the bytes of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=size)).hexdigest()


def digest_of_tensors(tensors: dict[str, torch.Tensor], *, size: int = 8) -> str:
    """Hex digest of named tensors: names, dtypes, shapes and bytes."""
    h = hashlib.blake2b(digest_size=size)
    hash_tensors(h, tensors)
    return h.hexdigest()


def hash_tensors(h: Hash, tensors: dict[str, torch.Tensor]) -> None:
    """Feed names, dtypes, shapes and bytes of tensors to a hash, in the order of the names."""
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name}|{t.dtype}|{tuple(t.shape)}".encode())
        if t.numel():
            h.update(t.flatten().view(torch.uint8).numpy().data)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Draw global random numbers from `seed` within the block, and restore the state.

    This holds for the CPU and for a CUDA `device`.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would also reseed every other accelerator, which fork_rng does not restore
        torch.default_generator.manual_seed(seed)
        for d in devices:
            with torch.cuda.device(d):
                torch.cuda.manual_seed(seed)
        yield
