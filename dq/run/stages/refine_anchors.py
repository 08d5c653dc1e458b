"""Anchors and candidates of a job of the refine stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dq.core.errors import InputError
from dq.core.files import is_done, read_tensors, write_tensors
from dq.distilled.external import load_set
from dq.networks.patches import PatchRecipe
from dq.networks.teacher import Teacher
from dq.refine.anchors import anchors_by_class, patch_anchors
from dq.refine.method import AnchorNeeds
from dq.run.folder import Run, class_file
from dq.run.stages.image_files import as_bytes


def file_anchors(run: Run, path: str, counts: Sequence[int]) -> list[Tensor]:
    """Read the first images (n_c, 3, S, S) uint8 of every class of a set."""
    side = run.config.image_size
    names, on_bad = run.source.class_names, run.source.on_bad_image
    s = load_set(path, names, image_size=side, label_kind="logits", on_bad_image=on_bad)  # its labels are not read
    if s.images.shape[-1] != side:
        raise InputError(f"the anchors in {path} have {s.images.shape[-1]} px, the images {side}; resize them")
    return anchors_by_class(s.images_uint8(), s.labels, counts, run.source.class_names, path)


def prepare_anchors(
    run: Run, needs: AnchorNeeds, folder: Path, counts: Sequence[int], teachers: Sequence[Teacher]
) -> None:
    """Write anchors and candidates by class: real patches, and images of a set.

    Args:
        run: whose processes divide the classes.
        needs: which of them.
        folder: of the job.
        counts: images of each class.
        teachers: matched ones, of which the first scores patches.
    """
    for label in run.local_units([float(n) for n in counts]):
        for name, number in needs.patches.items():
            path = class_file(folder / name, label)
            if not is_done(path):
                recipe, size = PatchRecipe(run.config.image_size, rank=needs.rank), number or counts[label]
                images = patch_anchors(run.source, label, size, recipe, teacher=teachers[0], seed=run.config.seed)
                write_tensors(path, {"images": images})
    if needs.file and run.main:
        for label, images in enumerate(file_anchors(run, needs.file, counts)):
            write_tensors(class_file(folder / "file", label), {"images": images})


def read_candidates(needs: AnchorNeeds, source: Path, folder: Path, classes: int) -> tuple[Tensor, ...] | None:
    """Read candidate anchors (P_c, 3, S, S) uint8 by class."""
    if not needs.candidates:
        return None
    base = source if needs.candidates == "set" else folder / needs.candidates
    files = [class_file(base, i) for i in range(classes)]
    return tuple(as_bytes(read_tensors(f)[0]["images"]) for f in files)
