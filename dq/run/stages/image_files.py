"""Images of class files as bytes and as floats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dq.core.files import open_tensors
from dq.run.folder import class_file


def count_images(path: Path) -> int:
    """Number of images in a class file."""
    with open_tensors(path) as f:
        return int(f.get_slice("images").get_shape()[0])


def holds_floats(path: Path) -> bool:
    """Whether the images of a class file are floats."""
    with open_tensors(path) as f:
        return f.get_slice("images").get_dtype() != "U8"


def as_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8; those that are bytes stay."""
    return images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)


def read_images_at(folder: Path, rows: Sequence[tuple[int, int]]) -> Tensor:
    """Read the images of (class, rank) pairs as float32 in [0, 1]."""
    by_row: dict[tuple[int, int], Tensor] = {}
    for label in sorted({c for c, _ in rows}):
        with open_tensors(class_file(folder, label)) as f:
            images = f.get_slice("images")
            for c, r in rows:
                if c == label:
                    by_row[(c, r)] = images[r : r + 1]
    x = torch.cat([by_row[row] for row in rows])
    return x.float() / 255 if x.dtype == torch.uint8 else x
