"""Statistics over seeds: means, paired differences, and their format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dq.core.errors import InputError


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for a single value.

    The deviation is sqrt(sum_i (v_i - mean)^2 / (n - 1)).
    """
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


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with a confidence interval."""

    mean: float
    low: float  # -inf with a single pair
    high: float
    pairs: int
    confidence: float
    p_value: float | None = None  # two-sided, of no difference; None with a single pair

    @property
    def verdict(self) -> str:
        """Say "better" or "worse" if the interval leaves zero out, else "undecided"."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "undecided"


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, test_images: int | None = None, confidence: float = 0.95
) -> Difference:
    """Student's interval of paired differences a - b.

    Students of the same seed start from the same weights and see batches in the same order. The interval is mean +-
    t(n - 1) sqrt(std^2 / n + v), for differences that are about normal. The draw of the test images adds at least v =
    (|mean| - mean^2) / test_images, McNemar's variance if all images on which the two differ speak for one side.
    Without it, equal differences by chance of few seeds would look certain.

    The interval covers the seeds of training (and of the draw, for random subsets), not the making of the two sets;
    several comparisons of one table are not corrected for one another: see `holm`.

    Raises:
        InputError: if the numbers of values differ.
    """
    if len(a) != len(b):
        raise InputError(f"a paired difference needs the same seeds on both sides, not {len(a)} and {len(b)}")
    mean, std = mean_std([x - y for x, y in zip(a, b, strict=True)])
    if std is None:
        return Difference(mean, -math.inf, math.inf, 1, confidence)
    from scipy.stats import t

    drawn = (abs(mean) - mean**2) / test_images if test_images else 0.0
    error = math.sqrt(std**2 / len(a) + drawn)
    half = float(t.ppf(0.5 + confidence / 2, len(a) - 1)) * error
    p_value = 2 * float(t.sf(abs(mean) / error, len(a) - 1)) if error else float(mean == 0)
    return Difference(mean, mean - half, mean + half, len(a), confidence, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p values, which control the familywise error rate.

    The i-th smallest of m becomes max_{j <= i} min(1, (m - j + 1) p_j) (Holm, "A simple sequentially rejective
    multiple test procedure", Scandinavian Journal of Statistics 6, 1979). scipy has no function for it.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
