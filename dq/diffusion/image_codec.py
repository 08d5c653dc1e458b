"""Codec as a differentiable map between latents and images."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dq.core.errors import InputError
from dq.diffusion.codec import Codec, decode_latents, encode_latents, latent_shape, to_unit

ENCODED_AT_ONCE = 32  # images


@dataclass(frozen=True)
class ImageCodec:
    """A frozen float32 autoencoder between latents and images in [0, 1]."""

    codec: Codec
    resolution: int  # px at which the autoencoder sees images
    side: int  # px of the images

    @staticmethod
    def of(codec: Codec, resolution: int, side: int, device: torch.device | str = "cpu") -> ImageCodec:
        """A frozen float32 copy of an autoencoder on a device.

        float32 whatever `codec.dtype` is: gradients through a decoder in half precision underflow.

        Raises:
            InputError: if it cannot encode or decode, or not at this resolution.
        """
        check_image_codec(codec)
        latent_shape(codec, resolution)
        return ImageCodec(copy.deepcopy(codec).float().eval().requires_grad_(False).to(device), resolution, side)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [0, 1], with gradients.

        Latents (n, C, h, w) become images (n, 3, side, side). Decoded pixels are clipped, as the generator clips them,
        so that those beyond black and white pass no gradient; then they are averaged over areas (enlarged bicubically,
        where `side` exceeds the resolution).
        """
        x = decode_latents(self.codec, latents)
        if self.side >= self.resolution:
            return to_unit(x, self.side)
        return F.interpolate(to_unit(x), size=(self.side, self.side), mode="area")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images, resized to the codec's resolution.

        Images (n, 3, S, S), uint8 or float in [0, 1], become latents (n, C, h, w): the mean where the codec gives a
        distribution.
        """
        parts = []
        for part in images.split(ENCODED_AT_ONCE):
            x = part.float() / 255 if part.dtype == torch.uint8 else part.float()
            parts.append(encode_latents(self.codec, 2 * to_unit(2 * x - 1, self.resolution) - 1))
        return torch.cat(parts)


def check_image_codec(codec: Codec) -> None:
    """Check that latents of a codec can be optimized.

    Raises:
        InputError: if it lacks the encoder or the decoder.
    """
    missing = [part for part in ("encode", "decode") if not callable(getattr(codec, part, None))]
    if missing:
        raise InputError(
            f"the codec {type(codec).__name__} cannot {missing[0]}, so that no latents of it can be learned; set "
            "codec.path to an autoencoder with encoder and decoder, or mode=pixel"
        )
