"""Regression labels (centered class vectors) and their conversion to probabilities."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from dq.core.errors import InputError

TEMPERATURES = (1e-3, 1e3)  # between which one is fitted
HALVINGS = 50  # of that interval, on a logarithmic scale


def centered_targets(labels: Tensor, classes: int) -> Tensor:
    """Return one-hot vectors (N, C) minus 1/C, FRePo's targets of real images.

    Raises:
        InputError: for one class, whose targets would all be zero.
    """
    if classes < 2:
        raise InputError("a regression on labels needs at least two classes to tell apart, but there is one")
    return F.one_hot(labels, classes).float() - 1 / classes


def first_labels(targets: Tensor) -> Tensor:
    """Return initial learned labels (n, C): targets / sqrt(C/10).

    As in the released code; the division keeps their norm moderate relative to a step.
    """
    return targets / (targets.shape[1] / 10) ** 0.5


def probabilities_to_labels(probabilities: Tensor) -> Tensor:
    """Return regression labels (n, C) of a teacher's probabilities (n, C): (p - 1/C) / sqrt(C/10)."""
    return first_labels(probabilities - 1 / probabilities.shape[1])


def labels_to_probabilities(labels: Tensor, temperature: float) -> Tensor:
    """Return probabilities (n, C) of regression labels (n, C): softmax(y / temperature).

    Raises:
        InputError: unless the temperature is positive.
    """
    if not temperature > 0:
        raise InputError(f"the temperature of soft labels must be more than 0, not {temperature:g}")
    return (labels / temperature).softmax(1)


def fit_temperature(predictions: Tensor, classes: Tensor) -> float:
    """Fit the temperature of least cross-entropy of softmax(predictions / temperature) (Guo et al. 2017).

    The cross-entropy is convex in 1 / temperature; the root of its derivative is found by bisection in float64.

    Args:
        predictions: (N, C) of images that were not learned from, on the scale of the labels.
        classes: (N,) of these images.

    Returns:
        A number from 1e-3 (all predictions are right) to 1e3 (predictions are uninformative).
    """
    p = predictions.double()
    hit = p.gather(1, classes[:, None].to(p.device))[:, 0]

    def slope(inverse: float) -> float:  # d cross-entropy / d inverse
        return float(((inverse * p).softmax(1).mul(p).sum(1) - hit).mean())

    low, high = (math.log(t) for t in TEMPERATURES)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        # too cold: softer predictions would have less cross-entropy
        low, high = (middle, high) if slope(math.exp(-middle)) > 0 else (low, middle)
    return math.exp((low + high) / 2)
