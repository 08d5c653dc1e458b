"""Mean and spread over seeds, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dq.errors import InputError


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, sqrt(sum_i (v_i - mean)^2 / (n - 1)); None for a single value."""
    if not values:
        raise InputError("there are no results to average; evaluate at least one seed")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def format_mean_std(values: Sequence[float], *, digits: int = 1) -> str:
    """Text such as "12.3 ± 0.4", or "12.3" for a single value."""
    mean, std = mean_std(values)
    return f"{mean:.{digits}f}" if std is None else f"{mean:.{digits}f} ± {std:.{digits}f}"
