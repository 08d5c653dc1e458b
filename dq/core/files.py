"""Files that are whole under their final name and carry a checksum."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dq.core.errors import InputError, RunError
from dq.core.plain import PlainDict
from dq.core.seeds import digest_of, digest_of_tensors, hash_tensors
from dq.core.text import printable, similar_names

log = logging.getLogger("dq")


class Damaged(RunError):
    """A file that is there but does not hold what was written to it."""


def as_path(value: object, name: str) -> Path:
    """A path that a caller gives, with its ~ expanded.

    Raises:
        InputError: if it is neither text nor a path, or empty.
    """
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise InputError(f"{name} is a path, not {value!r}")
    path = Path(value)
    if "\0" in str(path) or any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise InputError(f"{name} is no possible path: {str(path)[:60]!r}...; shorten it")
    return path.expanduser() if str(path).startswith("~/") else path


def check_place(folder: str | Path, name: str, *, reads: bool = False) -> None:
    """Check that files can be written to a folder, which need not exist.

    Nothing is created.

    Args:
        folder: the folder.
        name: the setting that names it, for messages.
        reads: whether a folder that is there and may not be written to will do, as its files may be all one needs.

    Raises:
        InputError: if it is a file or under one, or writing is not allowed.
    """
    folder = Path(folder)
    existing = folder.absolute()
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        what = "is" if existing == folder.absolute() else f"lies under {existing}, which is"
        raise InputError(f"{name}={folder} {what} not a folder; choose another")
    if not os.access(existing, os.W_OK | os.X_OK) and not (reads and existing == folder.absolute()):
        raise InputError(f"{name}={folder} cannot be written, as {existing} may not be; choose another, or allow it")


def temporary_beside(path: Path) -> Path:
    """The hidden name under which this process writes `path`.

    It includes the host, since another host may have a process of the same number.
    """
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def sweep(folder: Path) -> None:
    """Remove what killed processes of this host left half-written in `folder` and below."""
    for file in folder.rglob(".*.tmp"):
        host, _, pid = file.name.removesuffix(".tmp").rpartition("-")
        if host.endswith(f".{socket.gethostname()}") and pid.isdigit() and not _is_alive(int(pid)):
            file.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed on success and removed on failure.

    A full disk becomes one sentence that names the file and how to go on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
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


def write_json(path: Path, obj: object, *, checksum: bool = True) -> None:
    """Write an object as indented JSON, atomically.

    With `checksum` a mapping gets a `checksum` of its other entries; files that other programs read go without.
    """
    if checksum and isinstance(obj, dict):
        plain = json.loads(json.dumps(obj, default=str))
        obj = {**plain, "checksum": digest_of(plain)}
    write_text(path, json.dumps(obj, indent=2, default=str) + "\n")


def parse_json(text: str) -> Any:
    """Plain data of JSON text that can be written again.

    Raises:
        ValueError, RecursionError: if it is no such text. Half of a surrogate pair is JSON, and no text in UTF-8.
    """
    data = json.loads(text)
    if "\\ud" in text.lower():
        json.dumps(data, ensure_ascii=False).encode()
    return data


def read_json(path: Path) -> Any:
    """Read a JSON file, without the checksum, which is verified."""
    with readable(path):
        data = parse_json(path.read_text())
        if isinstance(data, dict) and data.pop("checksum", None) not in (None, digest_of(data)):
            raise ValueError("its checksum is that of another content")
    return data


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: PlainDict | None = None, *, identity: bool = True
) -> None:
    """Write tensors as safetensors, atomically, with JSON-encoded metadata and checksums of all of it.

    All metadata goes under one key: safetensors writes several keys in random order, and the same result must give
    the same bytes. `integrity` is a fast checksum, of which reading makes sure, and `checksum` a cryptographic one, by
    which digests of what is made of the file name its content. With `identity` False, for caches that no digest
    names, the latter is left out.
    """
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    meta = json.loads(json.dumps(metadata or {}))
    record = {"meta": meta}
    if identity:
        record["checksum"] = _checksum(contiguous, meta)
    record["integrity"] = f"{INTEGRITY}:{_integrity(contiguous, record)}"
    write_bytes(path, save(contiguous, {"dq": json.dumps(record, sort_keys=True)}))


INTEGRITY = "xxh3_128"  # before the checksum itself, so that it can be told from one of another algorithm


def _integrity(tensors: dict[str, torch.Tensor], record: PlainDict) -> str:
    """XXH3 of tensors and record: a tenth of the time of a cryptographic checksum, against accidents alone."""
    rest = {k: v for k, v in record.items() if k != "integrity"}
    h = xxhash.xxh3_128(json.dumps(rest, sort_keys=True).encode())
    hash_tensors(h, tensors)
    return h.hexdigest()


def _checksum(tensors: dict[str, torch.Tensor], meta: object) -> str:
    return digest_of([digest_of_tensors(tensors), meta])


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RecursionError, ValueError, SafetensorError) as e:
        raise Damaged(f"{path} cannot be read ({e}); delete it and give the same command again") from e


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], PlainDict]:
    """Read tensors and metadata written by `write_tensors`.

    Raises:
        Damaged: if it is missing, or anything in it is not as it was written.
    """
    with readable(path), safe_open(path, framework="pt") as f:
        tensors, meta = _tensors(f), _compared(f)
    _intact[path] = _stamp(path)
    return tensors, meta


def read_metadata(path: Path) -> PlainDict:
    """Read only the metadata of a file written by `write_tensors`."""
    with open_tensors(path) as f:
        return _record(f)["meta"]


def read_checksum(path: Path) -> str:
    """The cryptographic checksum of a file written by `write_tensors`, which stands for all of its content."""
    with open_tensors(path) as f:
        record = _record(f)
        return str(record.get("checksum") or _checksum(_tensors(f), record["meta"]))


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a file of `write_tensors` for reading slices.

    Its checksum is verified when this process first opens it.
    """
    with readable(path), safe_open(path, framework="pt") as f:
        if _intact.get(path) != (stamp := _stamp(path)):
            _compared(f)
            _intact[path] = stamp
        yield f


_intact: dict[Path, tuple[int, ...]] = {}  # files that this process has compared with their checksums


def _stamp(path: Path) -> tuple[int, ...]:
    s = path.stat()
    return s.st_ino, s.st_size, s.st_mtime_ns


def _record(f: Any) -> PlainDict:
    record = json.loads((f.metadata() or {}).get("dq", "{}"))
    if not isinstance(record, dict) or not isinstance(record.get("meta"), dict):
        raise ValueError("it has no checksum")
    return record


def _compared(f: Any) -> PlainDict:
    """Metadata of an open file whose checksum is right."""
    record = _record(f)
    algorithm, _, expected = str(record.get("integrity", "")).partition(":")
    if record.keys() == {"meta", "checksum"}:  # a file from before there was a fast checksum
        intact = record["checksum"] == _checksum(_tensors(f), record["meta"])
    else:
        intact = algorithm == INTEGRITY and expected == _integrity(_tensors(f), record)
    if not intact:
        raise ValueError("its checksum is that of another content")
    return record["meta"]


def _tensors(f: Any) -> dict[str, torch.Tensor]:
    return {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  (not a dict)


def is_done(path: Path) -> bool:
    """Whether the file of a unit of work exists and is intact.

    A damaged one is reported and removed, so that it is computed again, unless another process has replaced it.
    """
    if not path.is_file():
        return False
    try:
        stamp = _stamp(path)
        if path.suffix == ".json":
            read_json(path)
        else:
            with open_tensors(path):
                pass
    except FileNotFoundError:
        return False
    except Damaged as e:
        with contextlib.suppress(FileNotFoundError):
            if _stamp(path) == stamp:
                log.warning("%s is damaged (%s) and is made again", path, e.__cause__)
                path.unlink()
        return False
    return True


def append_jsonl(path: Path, record: PlainDict) -> None:
    """Append one event to a JSONL log.

    It begins a line of its own even if a killed process left half a line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, default=str).encode() + b"\n"
    with open(path, "ab+") as f:
        if f.tell():
            f.seek(-1, os.SEEK_END)
            line = line if f.read(1) == b"\n" else b"\n" + line
        f.write(line)


def read_jsonl(path: Path) -> list[PlainDict]:
    """Read the events of a JSONL log; [] without a file.

    Incomplete lines of killed processes are left out.
    """
    events = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return [e for e in events if isinstance(e, dict)]


def is_same_folder(path: str | Path, other: str | Path) -> bool:
    """Whether both are one folder that is there, whatever links lead to it."""
    a, b = (Path(p).expanduser() for p in (path, other))
    return bool(str(path)) and a.is_dir() and b.is_dir() and a.samefile(b)


def existing(path: Path) -> Path:
    """The path itself, or the nearest thing above it that is there."""
    path = path.expanduser().absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def suggest_folder(path: str | Path) -> str:
    """Text such as " (did you mean photos or photos2?)" for a path that is no folder; empty without similar names.

    The first part of the path that is not there is compared with the folders beside it.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return ""
    missing = next((p for p in (path, *path.parents) if p.parent.is_dir()), path)
    with contextlib.suppress(OSError):
        names = sorted(p.name for p in missing.parent.iterdir() if p.is_dir() and not p.name.startswith("."))
        rest = path.relative_to(missing)
        similar = [missing.with_name(name) for name in similar_names(missing.name, names, count=3, cutoff=0.6)]
        folders = [printable(p / rest if (p / rest).is_dir() else p) for p in similar]
        return f" (did you mean {' or '.join(folders)}?)" if folders else ""
    return ""
