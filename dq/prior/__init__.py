"""A prior of one's own: a small autoencoder and a small class-conditional DiT, trained on a source."""

from dq.diffusion.prior.train_codec import train_codec
from dq.diffusion.prior.train_denoiser import train_denoiser

__all__ = ["train_codec", "train_denoiser"]
