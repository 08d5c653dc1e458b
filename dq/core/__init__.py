"""What knows nothing of images and models."""
