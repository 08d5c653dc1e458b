"""ZCA whitening of small images as in MTT and DATM, and as in FRePo."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dq.core.errors import InputError
from dq.core.plain import PlainDict, PlainMapping

CHUNK = 1000  # images at once
WHOLE_SIDE = 64  # px; FRePo whitens larger images as interleaved ones of at most this side


@dataclass(frozen=True)
class Zca:
    """ZCA whitening x -> (x - mean) W.

    W = U diag((s + eps)^-1/2) U^T, where U diag(s) U^T is the covariance of the pixels.
    """

    mean: Tensor  # (D,) float32, D = 3 S S
    matrix: Tensor  # (D, D) float32, symmetric
    _copies: dict[torch.device, tuple[Tensor, Tensor]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __call__(self, images: Tensor) -> Tensor:
        """Return whitened images (B, 3, S, S) float32 of images that are uint8 or float in [0, 1]."""
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if x.device not in self._copies:  # not in every batch: 38 MB for images of 32 px
            self._copies[x.device] = self.mean.to(x.device), self.matrix.to(x.device)
        mean, matrix = self._copies[x.device]
        return ((x.flatten(1) - mean) @ matrix).view_as(x)

    def whitening(self) -> Whitening:
        """Return the same map with its inverse, W^-1 = U diag((s + eps)^1/2) U^T."""
        inverse = torch.linalg.inv(self.matrix.double()).float()
        return Whitening(torch.zeros(3), torch.ones(3), self.mean, self.matrix, inverse)


def fit_zca(images: Tensor, *, eps: float = 0.1) -> Zca:
    """Fit ZCA on train images (N, 3, S, S), not normalized.

    eps is 0.1 as released (MTT, Cazenavette et al. 2022). Costs N D^2 + D^3 operations; meant for images of 32 px.
    """
    n, width = len(images), images[0].numel()
    total, square = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for chunk in images.split(CHUNK):
        x = (chunk.float() / 255 if chunk.dtype == torch.uint8 else chunk.float()).flatten(1).cpu()
        total += x.sum(0)
        square += x.T @ x
    mean = total / n
    covariance = square / n - mean[:, None] * mean
    values, vectors = torch.linalg.eigh(covariance)
    matrix = (vectors * (values.clamp(min=0) + eps).rsqrt()) @ vectors.T
    return Zca(mean.float(), matrix.float())


ROOT_SHARE = 0.1  # of the mean eigenvalue, added to all (FRePo)


@dataclass(frozen=True)
class Whitening:
    """FRePo's preprocessing and its inverse.

    Channels are standardized to mean 0 and deviation 1; then (x - center) W. MTT's is the same without the first step,
    see `Zca.whitening`. W = U diag((s + 0.1 mean(s))^-1/2) U^T for the covariance U diag(s) U^T of standardized
    pixels. Images above 64 px are split into k x k interleaved images (a checkerboard of every k-th row and column; 2
    x 2 of 64 px for 128 px), all of which are multiplied by one W, of the mean of their covariances.
    """

    mean: Tensor  # (3,) float32 of the channels
    std: Tensor  # (3,)
    center: Tensor | None = None  # (D,) float32, D = 3 S S; None: only channels are standardized
    matrix: Tensor | None = None  # (D / k^2, D / k^2) W
    inverse: Tensor | None = None  # (D / k^2, D / k^2) W^-1
    _copies: dict[torch.device, Whitening] = field(init=False, repr=False, compare=False, default_factory=dict)

    def to(self, device: torch.device | str) -> Whitening:
        """Return a copy on a device, the same one in every call."""
        device = torch.device(device)
        if device not in self._copies:
            self._copies[device] = Whitening(**{k: v.to(device) for k, v in self.tensors().items()})
        return self._copies[device]

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields by name, without those that are None."""
        fields = {k: getattr(self, k) for k in ("mean", "std", "center", "matrix", "inverse")}
        return {k: v for k, v in fields.items() if v is not None}

    def __call__(self, images: Tensor) -> Tensor:
        """Return whitened images (B, 3, S, S) float32 of images that are uint8 or float, 1 being white."""
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        w = self.to(x.device)
        x = (x - w.mean.view(-1, 1, 1)) / w.std.view(-1, 1, 1)
        if w.center is None or w.matrix is None:
            return x
        return _blockwise((x.flatten(1) - w.center).view_as(x), w.matrix)

    def invert(self, x: Tensor) -> Tensor:
        """Return images (B, 3, S, S) of whitened ones; pixels may be outside [0, 1]."""
        w = self.to(x.device)
        if w.center is not None and w.inverse is not None:
            x = (_blockwise(x, w.inverse).flatten(1) + w.center).view_as(x)
        return x * w.std.view(-1, 1, 1) + w.mean.view(-1, 1, 1)

    def summary(self) -> PlainDict:
        """Return numbers that identify a whitening, as plain data."""
        # MTT's whitening leaves channels as they are
        mtt = bool((self.mean == 0).all() and (self.std == 1).all())
        facts: PlainDict = {"recipe": "standardize" if self.matrix is None else "mtt" if mtt else "frepo"}
        facts |= {"mean": self.mean.tolist(), "std": self.std.tolist()}
        if self.matrix is not None and self.center is not None:
            diagonal = self.matrix.diagonal()
            facts |= {"pixels": len(self.center), "diagonal": [float(diagonal.mean()), float(diagonal.std())]}
            if len(self.matrix) < len(self.center):
                facts["interleaved"] = len(self.center) // len(self.matrix)
        return facts


def stride_of(side: int) -> int:
    """Return the stride of interleaved images: 1 up to 64 px, 2 up to 128 px.

    Raises:
        InputError: if images of this side cannot be divided so.
    """
    stride = -(-side // WHOLE_SIDE)
    if side % stride:
        raise InputError(
            f"images of {side} px are whitened as {stride} x {stride} interleaved ones and must be divisible by "
            f"{stride}; set source.image_size to {side - side % stride}"
        )
    return stride


def interleaved(images: Tensor) -> Tensor:
    """Split images (B, 3, S, S) into k x k interleaved ones.

    Returns (B k^2, 3, S / k, S / k), row offset first.
    """
    k, (b, c, side) = stride_of(images.shape[-1]), images.shape[:3]
    parts = F.pixel_unshuffle(images, k).view(b, c, k * k, side // k, side // k)
    return parts.transpose(1, 2).reshape(b * k * k, c, side // k, side // k)


def _blockwise(images: Tensor, matrix: Tensor) -> Tensor:
    """The interleaved images of (B, 3, S, S) times a matrix, put together again."""
    k, (b, c, side) = stride_of(images.shape[-1]), images.shape[:3]
    parts = (interleaved(images).flatten(1) @ matrix).view(b, k * k, c, side // k, side // k)
    return F.pixel_shuffle(parts.transpose(1, 2).reshape(b, c * k * k, side // k, side // k), k)


def same_whitening(a: PlainMapping, b: PlainMapping, *, tolerance: float = 0.02) -> bool:
    """Return whether two summaries are of the same preprocessing.

    Up to rounding and a few left-out images.
    """
    if a.get("recipe") != b.get("recipe") or a.get("pixels") != b.get("pixels"):
        return False
    rows = [(a[k], b[k]) for k in ("mean", "std", "diagonal") if k in a]
    return all(  # summaries of damaged records may have other lengths
        abs(x - y) <= tolerance * abs(y) for left, right in rows for x, y in zip(left, right, strict=False)
    )  # a record may be malformed


def is_gray(images: Tensor) -> bool:
    """Return whether the three channels of all images (N, 3, S, S) are equal."""
    return bool((images[:, :1] == images[:, 1:]).all())


def fit_whitening(images: Tensor, *, zca: bool | None = None) -> Whitening:
    """Fit FRePo's preprocessing on train images (N, 3, S, S), as released.

    The ridge of the covariance is a tenth of its mean eigenvalue, and with N below the rows of W the scalings beyond
    the N largest eigenvalues are 1. Channel means and deviations are measured here; the released code has constants
    for its data sets. W has 3 s^2 rows for (interleaved) images of s px, 12,288 at 64 and at 128 px, and costs their
    third power. `zca` is whether to whiten after the channels; None: unless the images are gray, as the released code
    does not whiten MNIST and Fashion-MNIST.

    Raises:
        InputError: for a side above 64 px that cannot be divided.
    """
    n = len(images)
    sums, squares = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for chunk in images.split(CHUNK):
        c = (chunk.double() / 255 if chunk.dtype == torch.uint8 else chunk.double()).cpu()
        sums += c.sum((0, 2, 3))
        squares += c.square().sum((0, 2, 3))
    mean = sums / (n * images[0, 0].numel())
    # a constant channel (white paper) would divide by zero
    std = (squares / (n * images[0, 0].numel()) - mean.square()).clamp(min=1e-4).sqrt()
    plain = Whitening(mean.float(), std.float())
    if not (not is_gray(images) if zca is None else zca):
        return plain
    blocks = stride_of(images.shape[-1]) ** 2
    width = images[0].numel() // blocks
    total = torch.zeros(images[0].numel(), dtype=torch.float64)
    products = torch.zeros(width, width, dtype=torch.float64)
    for chunk in images.split(CHUNK):
        x = plain(chunk).cpu()
        total += x.flatten(1).sum(0)
        x = interleaved(x).flatten(1)
        products += x.T @ x
    center = total / n
    means = interleaved(center.view(1, *images.shape[1:])).flatten(1)
    values, vectors = torch.linalg.eigh(products / (n * blocks) - means.T @ means / blocks)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)  # largest first
    scaling = (values + ROOT_SHARE * values.mean()).rsqrt()
    scaling[n:] = 1.0
    matrix, inverse = (vectors * scaling) @ vectors.T, (vectors / scaling) @ vectors.T
    return Whitening(plain.mean, plain.std, center.float(), matrix.float(), inverse.float())
