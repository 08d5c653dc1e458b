"""Files, record and columns of a distilled set."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from dq.config.students import LabelKind
from dq.core.bounded_yaml import MAX_DEPTH
from dq.core.errors import InputError
from dq.core.files import Damaged, is_done, read_json
from dq.core.plain import PlainDict
from dq.core.seeds import digest_of_file
from dq.core.text import short

log = logging.getLogger("dq")
PROVENANCE = "provenance.json"  # of a complete set
RUN_CONFIG = "config.yaml"  # of a run folder
GRID = "grid.png"
SHARDS = "train-*-of-*.parquet"
DIGEST_BYTES = 16
GRID_CLASSES, GRID_COLUMNS = 20, 10
# of a record
SECTIONS = ("source", "method", "prune", "cluster", "generate", "codec", "labels", "licenses", "selection")
# those that a card reads entries of, and the entry that text in their place stands for
NAMED = {"source": "origin", "method": "name", "generate": "mode", "codec": "path", "labels": "by", "licenses": None}


def checked_provenance(provenance: PlainDict) -> PlainDict:
    """Return a provenance with text expanded to sections, if it is valid.

    `source: "CIFAR-10"` becomes `source: {origin: "CIFAR-10"}`.

    Raises:
        InputError: if it could not be written and read again.
    """
    if not isinstance(provenance, dict):
        raise InputError(f"the provenance of a set is a mapping, not {type(provenance).__name__}; give a dict")
    checked = dict(provenance)
    for section, entry in NAMED.items():
        value = checked.get(section)
        if isinstance(value, str) and entry is not None:
            checked[section] = {entry: value}
        elif not isinstance(value, dict | None):
            raise InputError(
                f"{section} in the provenance of a set is a mapping, not {short(value)}; "
                f"give a dict{f' such as {{{entry!r}: ...}}' if entry else ''}, or leave it out"
            )
    ipc = checked.get("ipc")
    if ipc is not None and not (type(ipc) is int and ipc > 0):
        raise InputError(f"ipc in the provenance of a set is a whole number above 0, not {short(ipc)}; leave it out")
    try:
        plain = json.loads(json.dumps(checked, default=str))
    except (TypeError, ValueError, RecursionError) as e:
        raise InputError(f"the provenance of a set cannot be written as JSON ({e}); give plain values") from e
    if depth(plain) > MAX_DEPTH:
        raise InputError(
            f"the provenance of a set has {depth(plain)} mappings or lists in each other; at most {MAX_DEPTH} can be "
            "read again"
        )
    return checked


def depth(value: object) -> int:
    """Nesting depth of lists and mappings of plain data."""
    levels, level = 0, [value]
    while level := [x for x in level if isinstance(x, dict | list)]:
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
        levels += 1
    return levels


def is_set(folder: Path) -> bool:
    """Whether a folder is that of one set.

    A run folder has a record of the same name, and a configuration.
    """
    return (folder / PROVENANCE).is_file() and not (folder / RUN_CONFIG).is_file()


def set_names(folder: Path) -> list[str]:
    """The names of the sets in a folder."""
    return sorted(p.parent.name for p in folder.glob(f"*/{PROVENANCE}") if is_set(p.parent))


def find_set(path: Path, config_name: str | None) -> tuple[Path, str]:
    """The folder that holds a set, and its name in that folder.

    Args:
        path: the set's own folder, a folder of sets, or a run folder, whose sets are in `dataset/`.
        config_name: of one set among several; None stands for the only one.

    Raises:
        InputError: if there is no such set; lists the available ones.
    """
    absolute = Path(os.path.abspath(path))  # "." has no name
    if is_set(absolute) and config_name in (None, absolute.name):
        return absolute.parent, absolute.name
    folder = next((f for f in (path, path / "dataset") if set_names(f)), path)
    names = set_names(folder)
    if config_name is not None:
        if config_name not in names:
            raise InputError(f"{folder} has no set {config_name!r}; it has {', '.join(names) or 'none'}")
        return folder, config_name
    if len(names) == 1:
        return folder, names[0]
    if names:
        raise InputError(
            f"{folder} has several sets, and none is named; it has {', '.join(names)}: give the path of one, such as "
            f"{folder / names[0]}"
        )
    siblings = set_names(absolute.parent)
    if not absolute.exists() and siblings:
        raise InputError(f"there is no set {path}; {path.parent} has {', '.join(siblings)}")
    raise InputError(
        f"{path} has no distilled set; give the folder of a set, one of several sets, or that of a run "
        "after `dq label`"
    )


def has_set(folder: Path, config_name: str, recipe: str) -> bool:
    """Whether a set exists, made by this recipe, and intact.

    Damage is logged, and the record removed.
    """
    path = folder / config_name / PROVENANCE
    if not is_done(path) or (record := read_json(path)).get("recipe") != recipe:
        return False
    for file, facts in all_files(folder / config_name, record):
        if not file.is_file() or file_facts(file)["blake2b"] != facts["blake2b"]:
            log.warning("%s is damaged or gone, and the set is made again", file)
            path.unlink()  # it is no set any more
            return False
    return True


def shard_files(folder: Path, record: PlainDict) -> list[tuple[Path, PlainDict]]:
    """The files of a set in row order, each with its facts.

    Facts are those of `file_facts` as recorded; empty in sets of older versions.
    """
    files = record.get("files") or {p.name: {} for p in sorted(folder.glob(SHARDS))}
    if not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
        raise Damaged(
            f"{folder / PROVENANCE} does not say which files are its own; make the set again with `dq label`"
        )
    return [(folder / name, facts) for name, facts in files.items()]


def all_files(folder: Path, record: PlainDict) -> list[tuple[Path, PlainDict]]:
    """`shard_files` and the image grid of the set."""
    return shard_files(folder, record) + ([(folder / GRID, record["grid"])] if record.get("grid") else [])


def set_features(record: PlainDict) -> Any:
    """The columns of a set by its record.

    They follow from `classes`, `soft_labels`, and `pixels`, the shape of float images.
    """
    from datasets import Array3D, ClassLabel, Features, List, Value
    from datasets import Image as ImageFeature

    features: PlainDict = {
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


def file_facts(path: Path) -> PlainDict:
    """Digest and size of a file."""
    return {"blake2b": digest_of_file(path, size=DIGEST_BYTES), "bytes": path.stat().st_size}


@functools.cache
def _log_assumed(what: str) -> None:
    """Log once per set that its label kind is assumed."""
    log.warning(
        "%s does not say what its label vectors are, as it was written before sets did; they are taken for logits. "
        "`load_set` and `save` write it again",
        what,
    )


def recorded_kind(record: PlainDict, what: str) -> LabelKind:
    """The kind of a set's label vectors by its record.

    A record with label vectors but no kind was written before there was a choice, when all were logits; that is
    logged.

    Raises:
        Damaged: if the record names an unknown kind.
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
    """The label kind in the metadata of Parquet files below a folder."""
    import pyarrow.parquet as pq

    for path in sorted(folder.rglob("*.parquet")):
        kind = ((pq.read_metadata(path).metadata or {}).get(b"dq.label_kind") or b"").decode(errors="replace")
        if kind in get_args(LabelKind):
            return kind  # type: ignore[return-value]
    return None


def shown_ipc(ipcs: Sequence[int]) -> int:
    """The images per class that a report or a card shows first: ten if available, else the most up to 20."""
    return 10 if 10 in ipcs else max((i for i in ipcs if i <= 20), default=min(ipcs))
