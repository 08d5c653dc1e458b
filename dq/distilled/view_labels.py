"""Stored labels of views of the sets of a run, which a push may take along."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from dq.config.reader import from_dict
from dq.core.cards import public
from dq.core.errors import InputError
from dq.core.files import is_done, read_json
from dq.core.plain import PlainMapping
from dq.core.seeds import digest_of_tensors
from dq.core.text import format_bytes, plural
from dq.distilled.format import PROVENANCE, shard_files
from dq.distilled.parquet import read_shard
from dq.labels.files import MANIFEST, shard_file
from dq.labels.plan import LabelPlan

log = logging.getLogger("dq")

FOLDER = "view_labels"  # in the folder of a set of a repository
Files = dict[str, Path | bytes]  # by path in a repository


def view_labels(sets: Path, names: list[str]) -> dict[str, Files]:
    """Complete labels of the images of sets, by the name of the set, from `labels/` beside the folder of sets.

    Labels of earlier images of a set of the same name are left out.
    """
    labels: dict[str, Files] = {}
    digests: dict[str, str] = {}  # of images, by set
    for manifest in sorted((sets.parent / "labels").glob(f"*/{MANIFEST}")):
        record = read_json(manifest) if is_done(manifest) else {}
        name = f"ipc{record.get('ipc')}-{record.get('set')}"
        plan = _plan(record) if name in names else None
        if plan is None or not all(file.is_file() for file in _shards(plan, manifest.parent)):
            continue
        if name not in digests:
            digests[name] = _image_digest(sets / name)
        if plan.image_digest == digests[name]:
            labels.setdefault(name, {}).update(_files(name, manifest.parent, record, plan))
    return labels


def _plan(record: PlainMapping) -> LabelPlan | None:
    """The plan of a manifest, unless another version made it."""
    try:
        return from_dict(LabelPlan, record["plan"])
    except (InputError, KeyError):
        return None


def _shards(plan: LabelPlan, folder: Path) -> list[Path]:
    return [shard_file(folder, span.start) for span in plan.shards()]


def _files(name: str, folder: Path, record: PlainMapping, plan: LabelPlan) -> Iterator[tuple[str, Path | bytes]]:
    plain = {k: v for k, v in public(record).items() if k != "checksum"}
    yield f"{name}/{FOLDER}/{folder.name}/{MANIFEST}", (json.dumps(plain, indent=2) + "\n").encode()
    for shard in _shards(plan, folder):
        yield f"{name}/{FOLDER}/{folder.name}/{shard.name}", shard


def _image_digest(folder: Path) -> str:
    """Digest of the images of a set whose files are intact, as a plan of labels has it."""
    tables = [read_shard(path.read_bytes()) for path, _ in shard_files(folder, read_json(folder / PROVENANCE))]
    return digest_of_tensors(
        {"images": torch.cat([table["pixels" if "pixels" in table else "image"] for table in tables])}
    )


def labels_bytes(files: Files) -> int:
    """Bytes of files."""
    return sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in files.values())


def announce(labels: dict[str, Files], *, pushed: bool) -> None:
    """Log the size of labels of views, and whether they are pushed; nothing without any."""
    size, number = sum(map(labels_bytes, labels.values())), sum(map(len, labels.values()))
    if labels and pushed:
        log.info("labels of views: %s in %s go with the sets", format_bytes(size), plural(number, "file"))
    elif labels:
        log.info("labels of views (%s) are not pushed; --set hub.view_labels=true adds them", format_bytes(size))
    elif pushed:
        raise InputError(
            "hub.view_labels=true, but no complete labels of views of these sets are stored; make them with "
            "`dq label`, or leave the setting out"
        )
