"""Images of others: which are opened at all, and how one becomes a square of 8-bit RGB."""

from __future__ import annotations

import io
import struct
import threading
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dq.core.errors import InputError

Preprocess = Literal["squash", "crop", "pad"]
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
# Pillow knows many more, some through parsers that hardly anybody tests, and EPS through Ghostscript
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 100_000_000  # of one image; decoding takes four bytes for each
MAX_IMAGE_BYTES = 512 << 20
# what Pillow's decoders raise on damaged files
UNDECODABLE = (
    EOFError,
    LookupError,
    OSError,
    OverflowError,
    SyntaxError,
    TypeError,
    ValueError,
    Image.DecompressionBombError,
    struct.error,
)
_HEADERS = threading.Lock()  # the filter of warnings belongs to the whole process


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any PIL image: EXIF orientation applied, 16-bit scaled to 8, transparency laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        array = np.asarray(image)
        if image.mode == "F":
            array = array * 255.0 if array.max(initial=0.0) <= 1.0 else array
        else:
            # 16-bit grey: PNG and TIFF keep the full range 0..65535, whatever integer mode Pillow opens them in;
            # only 32-bit files may hold 8-bit values
            array = array / (1.0 if image.mode == "I" and array.max(initial=0) <= 255 else 257.0)
        return Image.fromarray(np.clip(np.rint(array), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")


def to_square(image: Image.Image, size: int, preprocess: Preprocess) -> Image.Image:
    """A `size` x `size` image: `squash` ignores the aspect ratio, `crop` takes the central square, `pad` keeps all of
    the image on black. Bicubic; Pillow widens the kernel when it shrinks, so there is no aliasing."""
    w, h = image.size
    if preprocess == "squash" or w == h:
        return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)
    if preprocess == "crop":
        return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    if preprocess == "pad":
        return ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color=(0, 0, 0))
    raise InputError(f"preprocess must be 'squash', 'crop' or 'pad', not {preprocess!r}")


def open_image(raw: Any) -> Image.Image:
    """The image in a PIL image, encoded bytes, a path or a (C, H, W) uint8 array; not yet decoded, but of a size that
    can be. The one door for images of others.

    Raises:
        ValueError: if it is of no format in `FORMATS`, or has no pixels, or more than `MAX_PIXELS`.
    """
    if isinstance(raw, Image.Image):
        return raw
    if isinstance(raw, np.ndarray):
        return Image.fromarray(raw[0] if raw.shape[0] == 1 else raw.transpose(1, 2, 0))
    size = raw.stat().st_size if isinstance(raw, Path) else len(raw)
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"it has {size:,} bytes, more than the {MAX_IMAGE_BYTES:,} that are read; shrink it")
    file = io.BytesIO(raw.read_bytes() if isinstance(raw, Path) else raw)
    with _HEADERS, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"it is none of {', '.join(FORMATS)}") from None
    w, h = image.size
    if not 0 < w * h <= MAX_PIXELS:
        raise ValueError(f"it has {w} x {h} pixels, and from 1 to {MAX_PIXELS:,} are read; resize it")
    return image
