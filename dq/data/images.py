"""Opening of untrusted images, and conversion to a square of 8-bit RGB."""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dq.core.devices import reader_threads
from dq.core.errors import InputError
from dq.core.text import printable
from dq.data.source import Preprocess, Split


@contextlib.contextmanager
def _opened(split: Split, row: int) -> Iterator[Image.Image]:
    """Open the image of a row; `InputError` names it if it cannot be read."""
    raw = None
    try:
        raw = split.read(row)
        yield open_image(raw)
    except UNDECODABLE as e:
        if isinstance(e, InputError):
            raise
        where = printable(raw) if isinstance(raw, Path) else split.where(row)
        raise InputError(
            f"the image in {where} cannot be read ({type(e).__name__}: {printable(e)[:240]}); "
            "replace it, or set it aside with --set source.on_bad_image=skip"
        ) from e


def read_image(split: Split, row: int, size: int, preprocess: Preprocess) -> np.ndarray:
    """Read a row as a (3, size, size) uint8 array.

    Raises:
        InputError: that names the row, if it cannot be read.
    """
    with _opened(split, row) as image:
        image.load()
        array = np.asarray(to_square(to_rgb(image), size, preprocess))
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def image_side(split: Split, sample: int = 32) -> int:
    """Return the median of the shorter sides in px of readable images of a split.

    Args:
        split: the images, of which only headers are read where the format has one.
        sample: how many are looked at, evenly over the rows.

    Raises:
        InputError: if none of them, nor of the first hundred, can be read.
    """
    spread = np.unique(np.linspace(0, len(split) - 1, sample).astype(int)).tolist() if len(split) else []
    problem: InputError | None = None
    for rows in (spread, range(min(100, len(split)))):
        sides: list[int] = []
        for row in rows:
            try:
                with _opened(split, row) as image:
                    sides.append(min(image.size))
            except InputError as e:
                problem = problem or e
        if sides:
            return int(np.median(sides))
    raise problem or InputError("there are no images to take the size of")


def read_images(
    split: Split,
    rows: Sequence[int] | np.ndarray,
    size: int,
    preprocess: Preprocess,
    *,
    on_bad: Literal["raise", "skip"] = "raise",
    threads: int | None = None,
) -> tuple[Tensor, list[int], list[str]]:
    """Read many rows in parallel.

    `threads` read and decode; None: one for each core of this process.

    Returns:
        Images (n, 3, size, size) uint8, the rows that were read, and one sentence per bad image.
    """

    def one(row: int) -> np.ndarray | InputError:
        try:
            return read_image(split, int(row), size, preprocess)
        except InputError as e:
            return e

    with ThreadPoolExecutor(threads or reader_threads()) as pool:
        results = list(pool.map(one, rows))
    problems = [r for r in results if isinstance(r, InputError)]
    if problems and on_bad == "raise":
        raise problems[0]
    good = [(int(row), r) for row, r in zip(rows, results, strict=True) if not isinstance(r, InputError)]
    stack = np.stack([a for _, a in good]) if good else np.zeros((0, 3, size, size), np.uint8)
    return torch.from_numpy(stack), [row for row, _ in good], [str(p) for p in problems]


IMAGE_SUFFIXES = {
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm",
}  # fmt: skip
# Pillow reads many more, some by little tested parsers, and EPS by Ghostscript
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
    """Convert any PIL image to 8-bit RGB.

    EXIF orientation is applied, 16 bits are scaled to 8, and transparency is blended with white.
    """
    image = ImageOps.exif_transpose(image)
    transparent = "transparency" in image.info
    if image.mode == "RGB" and not transparent:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        array = np.asarray(image)
        if image.mode == "F":
            array = array * 255.0 if array.max(initial=0.0) <= 1.0 else array
        else:
            # 16-bit gray: PNG and TIFF keep the full range 0..65535, whatever integer mode Pillow opens them in;
            # only 32-bit files may hold 8-bit values
            array = array / (1.0 if image.mode == "I" and array.max(initial=0) <= 255 else 257.0)
        return Image.fromarray(np.clip(np.rint(array), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or transparent:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")


def to_square(image: Image.Image, size: int, preprocess: Preprocess) -> Image.Image:
    """Resize an image to `size` x `size`.

    `squash` ignores the aspect ratio, `crop` takes the central square, `pad` keeps all of the image on black. Bicubic;
    Pillow widens the kernel when it shrinks, so there is no aliasing.
    """
    w, h = image.size
    if preprocess == "squash" or w == h:
        return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)
    if preprocess == "crop":
        return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    if preprocess == "pad":
        return ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color=(0, 0, 0))
    raise InputError(f"preprocess must be 'squash', 'crop' or 'pad', not {preprocess!r}")


def open_image(raw: Any) -> Image.Image:
    """Open a PIL image, encoded bytes, a path or a (C, H, W) uint8 array.

    All untrusted images are opened here. The image is not yet decoded, but small enough to be.

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
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"it is none of {', '.join(FORMATS)}") from None
    w, h = image.size
    if not 0 < w * h <= MAX_PIXELS:
        raise ValueError(f"it has {w} x {h} pixels, and from 1 to {MAX_PIXELS:,} are read; resize it")
    return image
