"""Selection rules on features, scores and cells: known answers, plain greedy evaluation, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dq.core.errors import InputError
from dq.data import coresets
from dq.data.coresets import (
    boundary_band,
    boundary_prototype_rows,
    facility_location,
    facility_rows,
    largest_remainder,
    median_rows,
    window_rows,
)


def features(n: int, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 0.3


def coverage(picks: list[int], points: Tensor, weights: Tensor, candidates: Tensor) -> float:
    """F(A) by its definition."""
    cosines = torch.nn.functional.cosine_similarity(points[:, None], candidates[picks][None], dim=2).clamp(min=0)
    return float((weights * cosines.amax(1)).sum())


def plain_greedy(k: int, points: Tensor, weights: Tensor, candidates: Tensor) -> list[int]:
    picks: list[int] = []
    for _ in range(k):
        free = [j for j in range(len(candidates)) if j not in picks]
        # two points that are nearest to one another gain the same, up to rounding: the lowest row wins
        picks.append(max(free, key=lambda j: round(coverage([*picks, j], points, weights, candidates), 9)))
    return picks


# --- facility location --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_lazy_picks_equal_plain_greedy_ones(weighted: bool, others: bool, seed: int) -> None:
    x = features(40, seed=seed).double()
    candidates = features(30, seed=seed + 9).double() if others else x
    w = torch.rand(40, generator=torch.Generator().manual_seed(seed)).double() if weighted else torch.ones(40)
    picks = facility_location(x, 12, weights=w if weighted else None, candidates=candidates if others else None)
    assert picks.tolist() == plain_greedy(12, x, w.double(), candidates)


def test_picks_depend_on_no_block_and_no_memory(monkeypatch) -> None:
    x, w = features(300, 8), torch.rand(300, generator=torch.Generator().manual_seed(0))
    picks = facility_location(x, 40, weights=w).tolist()
    monkeypatch.setattr(coresets, "FIRST_ROWS", 1)
    monkeypatch.setattr(coresets, "EVALUATED_ROWS", 1)
    assert facility_location(x, 40, weights=w).tolist() == picks
    monkeypatch.setattr(coresets, "SIMILARITY_BYTES", 0)
    assert facility_location(x, 40, weights=w).tolist() == picks


def test_facility_location_by_hand() -> None:
    # three along x, two along y, one along -x: lengths do not count, opposite directions are not similar
    x = torch.tensor([[0.0, 5.0], [1.0, 0.0], [2.0, 0.0], [9.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert facility_location(x, 3).tolist() == [1, 0, 5]
    assert facility_location(x, 9).tolist() == [1, 0, 5, 2, 3, 4]  # nothing is left to gain: by row
    assert facility_location(x, 2, weights=torch.tensor([1.0, 1, 1, 1, 1, 9])).tolist() == [5, 1]
    # the candidates are others than the points, and zero is similar to nothing
    assert facility_location(x, 2, candidates=torch.tensor([[0.0, 0.0], [-3.0, 0.0], [0.0, 2.0]])).tolist() == [2, 1]


def test_a_weight_counts_as_copies_and_scale_changes_nothing() -> None:
    x = features(20)
    counts = torch.randint(1, 4, (20,), generator=torch.Generator().manual_seed(0))
    copies = x.repeat_interleave(counts, 0)
    picks = facility_location(x, 8, weights=counts)
    assert picks.tolist() == facility_location(copies, 8, candidates=x).tolist()
    assert picks.tolist() == facility_location(1e200 * x.double(), 8, weights=0.25 * counts).tolist()


def test_equal_features_are_picked_by_row_and_small_classes_whole() -> None:
    labels = np.array([1, 0, 1, 1, 2, 1])
    rows = facility_rows(torch.full((6, 5), 0.3), labels, 3)
    assert rows.tolist() == [1, 0, 2, 3, 4]
    assert rows.dtype == np.int64
    assert facility_rows(torch.zeros(6, 5), labels, 9).tolist() == [1, 0, 2, 3, 5, 4]
    x, one = features(30), np.zeros(30, np.int64)
    assert facility_rows(x, one, 4).tolist() == facility_location(x, 4).tolist()
    w = torch.arange(30.0)
    assert facility_rows(x, one, 4, w).tolist() == facility_location(x, 4, weights=w).tolist() != [0, 1, 2, 3]


def test_facility_location_refuses_what_it_cannot_use() -> None:
    x, labels = features(6), np.array([0, 0, 0, 1, 1, 1])
    with pytest.raises(InputError, match=r"weights of class 1 must be \(3,\)"):
        facility_rows(x, labels, 2, torch.tensor([1.0, 1, 1, 0, 0, 0]))
    for bad in (-1.0, torch.nan):
        with pytest.raises(InputError, match="weights of the data must be"):
            facility_location(x, 2, weights=torch.tensor([1.0, 1, 1, 1, 1, bad]))
    with pytest.raises(InputError, match=r"weights must be \(6,\), one per label, not \(5,\)"):
        facility_rows(x, labels, 2, torch.ones(5))
    with pytest.raises(InputError, match="first in row 4"):
        facility_rows(torch.where(torch.arange(6)[:, None] == 4, torch.nan, x), labels, 2)
    with pytest.raises(InputError, match=r"candidates .*NaN.*row 0\b"):
        facility_location(x, 2, candidates=torch.full((2, 6), torch.inf))
    with pytest.raises(InputError, match=r"candidates .* 3 features .* 6"):
        facility_location(x, 2, candidates=torch.ones(2, 3))
    with pytest.raises(InputError, match="at least 1 image per class, not 0"):
        facility_location(x, 0)
    with pytest.raises(InputError, match=r"non-empty \(n, d\) array, not \(0, 6\)"):
        facility_location(x[:0], 2)


# --- scores -------------------------------------------------------------------------------------------------------


def test_windows_by_hand() -> None:
    scores, one = torch.tensor([0.5, 0.1, 0.3, 0.2, 0.4]), np.zeros(5, np.int64)
    assert window_rows(scores, one, 2, 0.0).tolist() == [3, 1]  # the easiest two, the harder first
    assert window_rows(scores, one, 2, 1.0).tolist() == [0, 4]
    assert window_rows(scores, one, 1, 0.5).tolist() == [2]
    assert window_rows(scores, one, 9).tolist() == [0, 4, 2, 3, 1]
    assert window_rows(torch.ones(5), one, 2, 1.0).tolist() == [0, 1]
    with pytest.raises(InputError, match=r"a window starts at a share in \[0, 1\]"):
        window_rows(scores, one, 2, 1.5)


def test_median_scores_by_hand() -> None:
    scores, labels = torch.tensor([0.5, 0.9, 0.1, 0.35, 0.3, 0.9]), np.array([0, 1, 0, 0, 0, 0])
    assert median_rows(scores, labels, 3).tolist() == [3, 4, 0, 1]  # 0.35 is the median of 0.1 0.3 0.35 0.5 0.9
    assert median_rows(torch.zeros(6), labels, 2).tolist() == [0, 2, 1]


@pytest.mark.parametrize("rule", [window_rows, median_rows])
def test_rules_by_scores_refuse_what_they_cannot_use(rule) -> None:
    labels = np.array([1, 0, 0])
    with pytest.raises(InputError, match=r"scores .*NaN.*row 2\b"):
        rule(torch.tensor([0.0, 1.0, torch.nan]), labels, 1)
    with pytest.raises(InputError, match=r"scores must be \(3,\), one per label, not \(2,\)"):
        rule(torch.zeros(2), labels, 1)
    with pytest.raises(InputError, match="at least 1 image per class, not 0"):
        rule(torch.zeros(3), labels, 0)


# --- boundary and prototype ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("masses", [np.zeros(3), np.array([1.0, -1.0]), np.array([1.0, np.nan]), np.zeros(0)])
def test_shares_of_no_mass_are_refused(masses: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"masses .*finite, non-negative"):
        largest_remainder(masses, 4)
    with pytest.raises(InputError, match=r"total .*at least 0, not -1"):
        largest_remainder(np.ones(2), -1)


def test_largest_remainders_sum_to_the_total_and_ask_for_no_more_than_there_is() -> None:
    assert largest_remainder(np.array([5, 3, 1, 1]), 5).tolist() == [3, 2, 0, 0]  # 2.5 1.5 .5 .5
    assert largest_remainder(np.array([1, 1, 1]), 2).tolist() == [1, 1, 0]
    g = np.random.default_rng(0)
    for _ in range(50):
        masses = g.integers(1, 40, g.integers(1, 9))
        total = int(g.integers(0, masses.sum() + 1))
        numbers = largest_remainder(masses, total)
        assert numbers.sum() == total
        assert (numbers <= masses).all()
        assert (np.abs(numbers - total * masses / masses.sum()) < 1).all()


def test_the_band_ends_where_the_densities_of_boundary_and_noise_cross() -> None:
    g = np.random.default_rng(0)
    easy, near, noise = (g.normal(m, s, n) for m, s, n in ((0.0, 0.01, 8000), (1.0, 0.1, 1000), (2.0, 0.1, 1000)))
    low, high = boundary_band(np.concatenate([easy, near, noise]), 0.2)
    assert low == pytest.approx(1, abs=0.02)
    assert high == pytest.approx(1.5, abs=0.02)  # equal weights and widths cross halfway
    rare = boundary_band(np.concatenate([easy[:7200], near, noise[:800]]), 0.2)[1]
    assert high < rare < 1.55  # rarer noise begins later
    assert boundary_band(np.full(100, 0.7)) == (0.7, 0.7)
    assert boundary_band(np.array([0.3])) == (0.3, 0.3)
    assert boundary_band(np.arange(20.0), 0.2) == (16, 19)  # too few for a mixture


def test_cells_give_prototypes_and_images_of_the_boundary_by_hand(monkeypatch) -> None:
    monkeypatch.setattr(coresets, "boundary_band", lambda entropy: (0.5, 0.8))
    labels = np.array([0] * 8 + [1])
    cells = np.array([0, 0, 0, 0, 0, 1, 1, 1, 0])
    distances = np.array([5.0, 4, 3, 2, 1, 1, 2, 3, 0])
    entropy = np.array([0.6, 0.9, 0.7, 0.1, 0.2, 0.3, 0.99, 0.95, 0.5])
    options = {"cells": cells, "distances": distances, "entropy": entropy}
    # 5 and 3 images share 4 as 2.5 and 1.5: 3 and 1. Of the first cell 4 and 3 are nearest, 2 has the highest entropy
    # in the band; the second cell has a prototype alone, and class 1 one image
    assert boundary_prototype_rows(labels, 4, **options).tolist() == [4, 3, 2, 5, 8]
    # 4 and 2 of 6: the second cell has but noise beside its prototype, and takes the least
    assert boundary_prototype_rows(labels, 6, **options).tolist() == [4, 3, 2, 0, 5, 7, 8]
    assert sorted(boundary_prototype_rows(labels, 99, **options).tolist()) == list(range(9))
    with pytest.raises(InputError, match="first in row 3"):
        boundary_prototype_rows(labels, 2, **options | {"entropy": np.where(np.arange(9) == 3, np.nan, entropy)})
