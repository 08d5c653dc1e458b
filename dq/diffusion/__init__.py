"""Codec, prior, sampling."""
