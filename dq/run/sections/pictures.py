"""Images within a page: data URIs, and rows of images of one class."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

LOSSLESS_PX = 96  # side up to which an image is stored as PNG, pixel by pixel
LARGEST_PX = 192  # of an image of the page; larger ones are made smaller


@dataclass(frozen=True)
class Picture:
    """An image with its description and a caption."""

    src: str  # data URI
    alt: str  # in words, for screen readers and the enlarged view
    caption: str = ""  # below it


@dataclass(frozen=True)
class PictureRow:
    """Images of a class that are shown side by side."""

    kind: str  # what they are, such as "nearest real"
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class PictureClass:
    """Rows of images of one class."""

    name: str
    rows: tuple[PictureRow, ...]


def data_uri(image: Tensor) -> str:
    """A data URI of an image (3, H, W) uint8: PNG, or JPEG where a side is above 96 px."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    buffer = io.BytesIO()
    if max(picture.size) <= LOSSLESS_PX:
        picture.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((LARGEST_PX, LARGEST_PX), Image.Resampling.LANCZOS)
        picture.save(buffer, format="JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_row(kind: str, images: Iterable[Tensor], alts: Iterable[str], captions: Iterable[str] = ()) -> PictureRow:
    """A row of pictures; without captions where none are given."""
    texts = list(captions)
    pairs = list(zip(images, alts, strict=True))
    texts = texts or [""] * len(pairs)
    pictures = (Picture(data_uri(x), alt, text) for (x, alt), text in zip(pairs, texts, strict=True))
    return PictureRow(kind, tuple(pictures))
