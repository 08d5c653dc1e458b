"""Regression labels and probabilities."""

from __future__ import annotations

import pytest
import torch

from dq.core.errors import InputError
from dq.data.regression_labels import (
    centered_targets,
    first_labels,
    fit_temperature,
    labels_to_probabilities,
    probabilities_to_labels,
)


def test_labels_start_centered_and_scaled_by_the_number_of_classes() -> None:
    targets = centered_targets(torch.tensor([1, 0]), 40)
    assert targets[0, 1] == pytest.approx(1 - 1 / 40)
    assert targets[0, 0] == pytest.approx(-1 / 40)
    torch.testing.assert_close(first_labels(targets), targets / 2)
    with pytest.raises(InputError, match="at least two classes"):
        centered_targets(torch.tensor([0, 0]), 1)


def test_soft_labels_are_converted_both_ways() -> None:
    p = torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(1)
    y = probabilities_to_labels(p)
    torch.testing.assert_close(y.sum(1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    q = labels_to_probabilities(y, 0.1)
    torch.testing.assert_close(q.sum(1), torch.ones(6, dtype=torch.float64))
    assert torch.equal(q.argmax(1), p.argmax(1))
    with pytest.raises(InputError, match=r"temperature .*more than 0, not 0"):
        labels_to_probabilities(y, 0.0)


def test_the_temperature_of_calibrated_predictions_is_fitted() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 5, generator=g)
    classes = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
    assert fit_temperature(logits, classes) == pytest.approx(1, rel=0.05)
    assert fit_temperature(0.2 * logits + 3, classes) == pytest.approx(0.2, rel=0.05)
    # the least cross-entropy, and not near it
    t = fit_temperature(logits, classes)
    losses = [float(torch.nn.functional.cross_entropy(logits / (t * k), classes)) for k in (0.99, 1, 1.01)]
    assert losses[1] < min(losses[0], losses[2])


def test_the_fitted_temperature_ends_where_predictions_are_all_right_or_tell_nothing() -> None:
    classes = torch.arange(4)
    assert fit_temperature(torch.eye(4), classes) == pytest.approx(1e-3)
    assert fit_temperature(-torch.eye(4), classes) == pytest.approx(1e3)
