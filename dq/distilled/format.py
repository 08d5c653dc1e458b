"""Files, record and columns of a distilled set."""

from __future__ import annotations

import functools
import hashlib
import logging
from pathlib import Path
from typing import Any, get_args

from dq.config.students import LabelKind
from dq.core.errors import InputError
from dq.core.files import Damaged, is_done, read_json

log = logging.getLogger("dq")
PROVENANCE = "provenance.json"  # makes a set whole
GRID = "grid.png"
SHARDS = "train-*-of-*.parquet"
DIGEST_BYTES = 16
GRID_CLASSES, GRID_COLUMNS = 20, 10


def find_set(folder: Path, config_name: str | None) -> str:
    """The name of a set in the folder; None stands for the only one.

    Raises:
        InputError: if there is no such set.
    """
    known = sorted(p.parent.name for p in folder.glob(f"*/{PROVENANCE}"))
    if config_name is None and len(known) == 1:
        config_name = known[0]
    if config_name not in known:
        raise InputError(f"{folder} has no set {config_name!r}; it has {', '.join(known) or 'none'}")
    return config_name


def has_set(folder: Path, config_name: str, recipe: str) -> bool:
    """Whether the set is there, made by this recipe, and intact. Damage is reported."""
    path = folder / config_name / PROVENANCE
    if not is_done(path) or (record := read_json(path)).get("recipe") != recipe:
        return False
    for file, known in all_files(folder / config_name, record):
        if not file.is_file() or file_facts(file)["blake2b"] != known["blake2b"]:
            log.warning("%s is damaged or gone, and the set is made anew", file)
            path.unlink()  # it is no set any more
            return False
    return True


def shard_files(folder: Path, record: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """The files of a set in row order, each with what its record says of it (nothing in sets of old)."""
    files = record.get("files") or {p.name: {} for p in sorted(folder.glob(SHARDS))}
    if not isinstance(files, dict) or not all(isinstance(known, dict) for known in files.values()):
        raise Damaged(
            f"{folder / PROVENANCE} does not say which files are its own; make the set again with `dq label`"
        )
    return [(folder / name, known) for name, known in files.items()]


def all_files(folder: Path, record: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """`shard_files` and the picture of the set."""
    return shard_files(folder, record) + ([(folder / GRID, record["grid"])] if record.get("grid") else [])


def set_features(record: dict[str, Any]) -> Any:
    """The columns of a set by its record: `classes`, `soft_labels`, and `pixels`, the shape of float images."""
    from datasets import Array3D, ClassLabel, Features, List, Value
    from datasets import Image as ImageFeature

    features: dict[str, Any] = {
        "image": ImageFeature(),
        "label": ClassLabel(names=list(record["classes"])),
        "weight": Value("float32"),
        "prototype": Value("int32"),
        "count": Value("int64"),
        "source_row": Value("int64"),
    }
    if record.get("soft_labels"):
        features["soft_label"] = List(Value("float16"), length=len(record["classes"]))
    if record.get("pixels"):
        features["pixels"] = Array3D(shape=tuple(record["pixels"]), dtype="float32")
    return Features(features)


def file_facts(path: Path) -> dict[str, Any]:
    """Digest and size of a file."""
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES))
    return {"blake2b": digest.hexdigest(), "bytes": path.stat().st_size}


@functools.cache
def _log_assumed(what: str) -> None:
    """Say it once of each set."""
    log.warning(
        "%s does not say what its label vectors are, as it was written before sets did; they are taken for logits. "
        "`load_set` and `save` write it anew",
        what,
    )


def recorded_kind(record: dict[str, Any], what: str) -> LabelKind:
    """What the label vectors of a set are, by its record.

    A record with label vectors that does not say was written before there was a choice, when all were logits; that is
    logged.

    Raises:
        Damaged: if the record names no kind there is.
    """
    kind = record.get("label_kind")
    if kind is None:
        if record.get("soft_labels"):
            _log_assumed(what)
        return "logits"
    if kind not in get_args(LabelKind):
        kinds = ", ".join(get_args(LabelKind))
        raise Damaged(f"the record of {what} has label_kind={kind!r}, which is none of {kinds}; make the set again")
    return kind


def parquet_kind(folder: Path) -> LabelKind | None:
    """What the metadata of the Parquet files below a folder say of its label vectors; None: nothing."""
    import pyarrow.parquet as pq

    for path in sorted(folder.rglob("*.parquet")):
        kind = ((pq.read_metadata(path).metadata or {}).get(b"dq.label_kind") or b"").decode(errors="replace")
        if kind in get_args(LabelKind):
            return kind  # type: ignore[return-value]
    return None
