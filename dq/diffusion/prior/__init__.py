"""Training and measurement of a diffusion prior."""
