"""Files of tensors: safetensors and npz, and the pixels of normalized images."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dq.core.errors import InputError
from dq.core.text import short

MAX_BYTES = 16 << 30  # of the arrays in an .npz file, which may be packed a thousandfold
# what numpy and zipfile raise on damaged files
UNREADABLE = (
    EOFError,
    MemoryError,
    OSError,
    RuntimeError,  # encrypted; NotImplementedError: packed in an unknown way
    SyntaxError,
    TypeError,
    ValueError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_tensor_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` or `.npz` file by name.

    Raises:
        InputError: if the file is missing, damaged or too large.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as z:
                unpacked = sum(member.file_size for member in z.infolist())
            if unpacked > MAX_BYTES:
                raise InputError(f"{path} would unpack to {unpacked:,} bytes, and {MAX_BYTES:,} are read; split it")
            with np.load(path, allow_pickle=False) as f:
                return {k: torch.from_numpy(f[k]) for k in f.files}
        return load_file(path)
    except InputError:
        raise
    except (*UNREADABLE, SafetensorError) as e:
        raise InputError(f"{path} cannot be read ({e}); get it again, or save its tensors as safetensors") from e


def to_pixels(images: Tensor, mean: Tensor, std: Tensor, path: Path) -> Tensor:
    """Undo the normalization of images (N, 3, H, W).

    Raises:
        InputError: if mean and std are not (3,), or not those of images in [0, 1].
    """
    shapes = [tuple(mean.shape), tuple(std.shape)]
    if images.ndim != 4 or shapes != [(images.shape[1],)] * 2:
        raise InputError(
            f"mean and std of {path} must be (3,) beside images (N, 3, H, W), not {shapes[0]} and {shapes[1]} "
            f"beside {tuple(images.shape)}"
        )
    if images.dtype == torch.uint8:
        raise InputError(f"images of {path} are uint8, which no mean and std were taken from; leave these out")
    if not (torch.isfinite(std.float()).all() and (std > 0).all()):
        raise InputError(f"std of {path} must be positive, not {std.tolist()}")
    if not ((mean >= 0).all() and (mean <= 1).all() and (std <= 1).all()):
        raise InputError(
            f"mean and std of {path} must be those of images in [0, 1], not {short(mean.tolist())} and "
            f"{short(std.tolist())}; divide both by 255 if the images were in 0 to 255"
        )
    return images * std.float().view(1, -1, 1, 1) + mean.float().view(1, -1, 1, 1)
