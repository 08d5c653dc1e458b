"""Figures of matplotlib and images as files and as HTML."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from PIL import Image

from dq.core.files import atomic_path, write_bytes


def html_table(head: list[str], rows: list[list[Any]]) -> str:
    """A table with its cells escaped."""
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    lines = ["<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row) + "</tr>" for row in rows]
    return f"<table><tr>{cells}</tr>{''.join(lines)}</table>"


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, sides in inches."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image as PNG, atomically."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def embed(path: Path) -> str:
    """A PNG file as an HTML paragraph that holds its bytes."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'
