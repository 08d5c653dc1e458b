"""Latents of a class to points with masses."""
