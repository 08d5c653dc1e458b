"""Images of a set as PNG files by class."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from dq.core.errors import InputError
from dq.core.files import as_path, write_text

log = logging.getLogger("dq")
WEIGHTS = "weights.csv"
UNSAFE = re.compile(r'[\x00-\x1f<>:"/\\|?*]|^[. ]|[. ]$|^$')


def save_images(
    folder: str | Path, images: Tensor, labels: Tensor, weights: Tensor, class_names: Sequence[str]
) -> Path:
    """Write images to `folder`/CLASS/0000.png, and their weights to `folder`/weights.csv.

    `load_set(folder)` and most trainers read such folders. The number in a name counts the images of a class. Where a
    class name cannot name a folder on every system (T-shirt/top), all folders are called by the class numbers.

    Args:
        folder: must be empty or not exist.
        images: (N, 3, H, W) uint8.
        labels: (N,) int64.
        weights: (N,) float.
        class_names: in the order of the labels.

    Returns:
        The folder.

    Raises:
        InputError: if the folder holds something.
    """
    folder = as_path(folder, "the folder of the images")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something already; choose a folder that is empty or not there")
    names = _folder_names(class_names)
    ranks = [0] * len(names)
    rows = []
    for image, label, weight in zip(images, labels.tolist(), weights.tolist(), strict=True):
        path = folder / names[label] / f"{ranks[label]:04d}.png"
        ranks[label] += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        rows.append([path.relative_to(folder).as_posix(), label, class_names[label], f"{weight:.6g}"])
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([["file", "label", "class", "weight"], *rows])
    write_text(folder / WEIGHTS, table.getvalue())
    return folder


def _folder_names(class_names: Sequence[str]) -> list[str]:
    """Names of class folders: those of the classes, or their numbers where some are no names of folders."""
    unsafe = [n for n in class_names if UNSAFE.search(n) or len(n.encode()) > 200]
    if not unsafe and len({n.casefold() for n in class_names}) == len(class_names):
        return list(class_names)
    example = (unsafe or class_names)[0]
    log.info("class folders are called by numbers, since class names such as %r cannot name folders", example)
    return [f"{label:0{len(str(len(class_names)))}d}" for label in range(len(class_names))]
