"""Rendering of learned whitened pixels, or latents of a codec, as images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq.core.errors import InputError
from dq.data.zca import Whitening
from dq.diffusion.image_codec import ImageCodec


@dataclass(frozen=True)
class Rendering:
    """Whitened images whiten(resize(decode(z))) of latents z; without a codec, z itself."""

    whitening: Whitening
    codec: ImageCodec | None = None
    chunk: int | None = None  # images that `images`, `pixels` and `pull_back` decode at once; None: all

    @staticmethod
    def of(stage: str, mode: str, whitening: Whitening, codec: ImageCodec | None, chunk: int | None) -> Rendering:
        """The rendering of a stage's mode: latents for "latent", else whitened images.

        Raises:
            InputError: if latents are learned and there is no codec.
        """
        if mode == "latent" and codec is None:
            raise InputError(
                f"{stage} with mode=latent learns latents of a codec, and there is none; give one, or mode=pixel"
            )
        return Rendering(whitening, codec if mode == "latent" else None, chunk)

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

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (n, 3, S, S), uint8 or float, as whitened pixels or latents."""
        return self.whitening(images) if self.codec is None else self.codec.encode(images)

    def pull_back(self, values: Tensor, gradient: Tensor) -> Tensor:
        """Pull a gradient with respect to `images(values)` back to `values`.

        A vector-Jacobian product. Every chunk is decoded once more, with a graph, so that the activations of one chunk
        are in memory, whatever the gradient of the images came through. That is exact, since each image is decoded by
        itself.

        Args:
            values: (n, C, h, w) latents, or whitened images.
            gradient: (n, 3, S, S).
        """
        if self.codec is None:
            return gradient
        products: list[Tensor] = []
        for part, g in zip(self._parts(values), self._parts(gradient), strict=True):
            leaf = part.detach().requires_grad_(True)
            with torch.enable_grad():
                decoded = self(leaf)
            products += torch.autograd.grad(decoded, [leaf], g)
        return torch.cat(products)

    def _parts(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.split(self.chunk or len(values))
