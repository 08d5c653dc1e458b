"""Evaluation of sets: students trained on them and on real images."""
