"""Figures of matplotlib and images as files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from dq.core.files import atomic_path, write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty matplotlib figure, sides in inches."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image as PNG, atomically."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
