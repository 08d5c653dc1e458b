"""From the tensor that is learned to images as networks see them: whitened pixels, or latents of a codec."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq.data.zca import Whitening
from dq.diffusion.image_codec import ImageCodec


@dataclass(frozen=True)
class Rendering:
    """Whitened images of latents z, whiten(resize(decode(z))); without a codec, the whitened images themselves."""

    whitening: Whitening
    codec: ImageCodec | None = None
    chunk: int | None = None  # images that are decoded at once where there is no graph; None: all

    def __call__(self, values: Tensor) -> Tensor:
        """Whitened images (n, 3, S, S), with a graph."""
        return values if self.codec is None else self.whitening(self.codec.decode(values))

    @torch.no_grad()
    def images(self, values: Tensor) -> Tensor:
        """Whitened images (n, 3, S, S), without a graph."""
        return values if self.codec is None else torch.cat([self(part) for part in self._parts(values)])

    @torch.no_grad()
    def pixels(self, values: Tensor) -> Tensor:
        """Images (n, 3, S, S) before whitening; those of a codec are in [0, 1]."""
        if self.codec is None:
            return self.whitening.invert(values)
        return torch.cat([self.codec.decode(part) for part in self._parts(values)])

    def _parts(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.split(self.chunk or len(values))
