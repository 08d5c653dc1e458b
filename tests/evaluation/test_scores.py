"""The scores of DD-Ranking against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from dq.core.errors import InputError
from dq.evaluation.dd_ranking import DDRanking, ars, hlr, ior, lrs


def formula(exponent: float) -> float:
    return (math.exp(exponent) - math.exp(-1)) / (math.e - math.exp(-1))


def test_worked_examples() -> None:
    assert lrs(0.0, 0.0) == pytest.approx(0.269, abs=5e-4)
    assert lrs(0.12, 0.20) == pytest.approx(0.252, abs=5e-4)
    assert lrs(0.05, 0.30) == pytest.approx(0.219, abs=5e-4)
    assert lrs(1.0, -1.0) == pytest.approx(1.0)
    assert lrs(-1.0, 1.0) == pytest.approx(0.0)
    assert ars(0.0, 0.0) == lrs(0.0, 0.0)
    assert ars(0.2, 0.1, weight=0.25) == pytest.approx(formula(0.125))
    assert lrs(0.2, 0.1, weight=0.25) == pytest.approx(formula(-0.025))
    assert hlr(0.84, 0.61) == pytest.approx(0.23)
    assert ior(0.70, 0.66) == pytest.approx(0.04)


def test_percentages_are_refused_since_they_saturate() -> None:
    # what the package reports for the third example above
    assert formula(0.5 * 5 - 0.5 * 30) == pytest.approx(-0.157, abs=5e-4)
    with pytest.raises(InputError, match=r"IOR=5.* divide percentages by 100"):
        lrs(5.0, 30.0)
    with pytest.raises(InputError, match=r"the accuracy full=84.* is not a fraction"):
        hlr(84.0, 0.61)
    with pytest.raises(InputError, match="divide percentages by 100"):
        ars(0.0, 3.0)
    with pytest.raises(InputError, match=r"the accuracy own=70.*divide percentages by 100"):
        DDRanking(own=(0.7, 70.0), random=(0.6, 0.6))
    with pytest.raises(InputError, match="is not a fraction"):
        ior(math.nan, 0.5)
    with pytest.raises(InputError, match="the weight of a score"):
        lrs(0.1, 0.1, weight=1.5)


def test_scores_are_averaged_over_seeds_after_the_exponential() -> None:
    r = DDRanking(full=(0.8, 0.9), hard=(0.8, 0.1), own=(0.9, 0.2), random=(0.5, 0.4))
    per_seed = r.per_seed()
    assert per_seed["hlr"] == pytest.approx((0.0, 0.8))
    assert per_seed["ior"] == pytest.approx((0.4, -0.2))
    assert per_seed["lrs"] == pytest.approx((formula(0.2), formula(-0.5)))
    mean, std = r.summary()["lrs"]
    assert mean == pytest.approx((formula(0.2) + formula(-0.5)) / 2)
    assert mean != pytest.approx(formula(-0.15), abs=1e-3)
    assert std == pytest.approx((formula(0.2) - formula(-0.5)) / 2**0.5)


def test_one_full_accuracy_serves_all_seeds_and_missing_ones_leave_scores_out() -> None:
    r = DDRanking(full=(0.8,), hard=(0.6, 0.7), own=(0.7, 0.8), random=(0.6, 0.6))
    assert r.per_seed()["hlr"] == pytest.approx((0.2, 0.1))
    assert set(r.per_seed()) == {"hlr", "ior", "lrs"}
    assert set(DDRanking(own=(0.7,), random=(0.6,)).summary()) == {"ior"}
    assert DDRanking(own=(0.7,), random=(0.6,)).summary()["ior"] == (pytest.approx(0.1), None)
    augmented = DDRanking(augmented=(0.7,), random_augmented=(0.5,), plain=(0.6,), random_plain=(0.5,), weight=0.25)
    assert augmented.per_seed() == {"ars": (pytest.approx(formula(0.125)),)}


def test_seeds_must_match() -> None:
    with pytest.raises(InputError, match=r"\{'own': 2, 'random': 1\}"):
        DDRanking(own=(0.7, 0.8), random=(0.6,))
    with pytest.raises(InputError, match=r"\{'full': 3, 'hard': 2\}"):
        DDRanking(full=(0.7, 0.8, 0.9), hard=(0.6, 0.6))
