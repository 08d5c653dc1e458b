"""Images pasted into a grid, without smoothing."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

GAP = 2  # px of white between images


def image_grid(rows: list[list[Tensor]], *, scale: int = 1) -> Image.Image:
    """Paste images (3, H, W) uint8 into a grid and scale it without smoothing.

    Rows may differ in length.
    """
    # not torchvision's make_grid: torchvision is optional, and its rows have one length
    height, width = rows[0][0].shape[-2:]
    columns = max(len(r) for r in rows)
    canvas = Image.new("RGB", (columns * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            canvas.paste(picture, (j * (width + GAP), i * (height + GAP)))
    return canvas.resize((canvas.width * scale, canvas.height * scale), Image.Resampling.NEAREST)
