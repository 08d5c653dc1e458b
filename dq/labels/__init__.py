"""Soft labels of every view of every image."""
