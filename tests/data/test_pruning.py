"""Which images of a class the policies of pruning keep."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch

from dq.config.pruning import Policy, PruneConfig
from dq.core.errors import InputError
from dq.data.pruning import (
    clusters_in_band,
    easy_drop,
    hard_drop,
    minimum_size,
    policy_order,
    prune_class,
    rank_band,
)

POLICIES = get_args(Policy)
SIZES = (1, 2, 7, 60, 500, 960, 5000)


def settings(policy: str, **more) -> PruneConfig:
    return PruneConfig(policy=policy, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ipc", "n", "hard", "easy"),
    [
        (1, 5000, 0.20, 0.0),  # 0.02 %
        (10, 5000, 0.082, 0.0),  # CIFAR-10
        (1, 960, 0.116, 0.0),  # ImageNette
        (50, 960, 0.0, 0.072),
        (100, 960, 0.0, 0.10),
        (10, 1281, 0.013, 0.0),  # ImageNet-1K
        (50, 1281, 0.0, 0.059),
        (5000, 5000, 0.0, 0.10),
    ],
)
def test_the_shares_that_pad_drops(ipc: int, n: int, hard: float, easy: float) -> None:
    assert hard_drop(ipc / n) == pytest.approx(hard, abs=6e-4)
    assert easy_drop(ipc / n) == pytest.approx(easy, abs=6e-4)


def test_at_one_percent_nothing_is_dropped() -> None:
    assert hard_drop(0.01) == easy_drop(0.01) == 0
    assert rank_band(1000, 10, settings("pad")) == range(1000)


@pytest.mark.parametrize(
    ("policy", "n", "ipc", "share", "band"),
    [
        ("none", 5000, 10, None, range(5000)),
        ("pad", 5000, 1, None, range(4000)),
        ("pad", 5000, 10, None, range(5000 - 411)),  # int(0.0823 * 5000)
        ("pad", 960, 50, None, range(68, 960)),  # int(0.0717 * 960)
        ("pad", 500, 48, None, range(20, 500)),  # 9.8 % of 500 are 49, but 480 stay
        ("pad", 500, 50, None, range(500)),
        ("hard", 500, 1, None, range(400)),
        ("hard", 500, 1, 0.3, range(350)),
        ("hard", 500, 1, 0.9, range(250)),
        ("easy", 500, 1, None, range(50, 500)),
        ("easy", 500, 40, 0.4, range(100, 500)),
        ("window", 5000, 250, 0.5, range(4875 - 2500, 4875)),  # SelMatch's beta at 5 %
        ("window", 100, 10, 3.0, range(100)),
        ("window", 100, 4, 0.5, range(48, 98)),
    ],
)
def test_the_ranks_that_a_policy_keeps(policy: str, n: int, ipc: int, share: float | None, band: range) -> None:
    assert rank_band(n, ipc, settings(policy, share=share)) == band


def test_floors_hold_for_every_policy() -> None:
    for policy in POLICIES:
        for n in SIZES:
            for ipc in (1, 5, 10, 50, 500):
                p = settings(policy)
                band = rank_band(n, ipc, p)
                assert 0 <= band.start <= band.stop <= n
                assert len(band) >= minimum_size(n, ipc, p) >= min(n, max(10 * ipc, n / 2))


def test_controls_keep_as_many_as_pad() -> None:
    for n in SIZES:
        for ipc in (1, 10, 50):
            counts = {
                policy: int(prune_class(torch.randperm(n), ipc, settings(policy), 0).mask.sum())
                for policy in ("pad", "random", "reversed")
            }
            assert len(set(counts.values())) == 1, counts


@pytest.mark.parametrize("policy", POLICIES)
def test_a_class_of_one_image_keeps_it(policy: str) -> None:
    pruned = prune_class(torch.tensor([0]), 10, settings(policy), 0)
    assert pruned.mask.tolist() == [True]
    assert pruned.ranks.tolist() == [0]


def test_hard_images_go_and_reversed_drops_the_easy_ones() -> None:
    order = torch.tensor([3, 0, 4, 1, 2]).repeat_interleave(1000) * 1000 + torch.arange(1000).repeat(5)
    kept = prune_class(order, 1, settings("pad"), 0).mask
    assert kept.nonzero()[:, 0].tolist() == [i for i in range(5000) if not 2000 <= i < 3000]
    reverse = prune_class(order, 1, settings("reversed"), 0).mask
    assert reverse.nonzero()[:, 0].tolist() == [i for i in range(5000) if not 3000 <= i < 4000]


def test_random_does_not_go_by_difficulty_but_by_its_seed() -> None:
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    p = settings("random")
    drawn = policy_order(order, p, 0, 3)
    assert torch.equal(drawn, policy_order(order.flip(0), p, 0, 3))
    assert not torch.equal(drawn, policy_order(order, p, 1, 3))
    assert not torch.equal(drawn, policy_order(order, p, 0, 4))
    assert drawn.sort().values.tolist() == list(range(200))


def test_weights_are_one_inside() -> None:
    pruned = prune_class(torch.arange(100), 1, settings("hard", share=0.3))
    assert pruned.weights(0.25).tolist() == [1.0] * 70 + [0.25] * 30
    assert pruned.cells == pytest.approx(100 / 70)


def test_clusters_whose_mean_rank_is_outside_go_first() -> None:
    pruned = prune_class(torch.arange(100), 1, settings("hard", share=0.3))
    labels = torch.cat([torch.full((25,), c) for c in (2, 0, 3, 1)])  # cluster 1 has the ranks 75 to 99
    assert clusters_in_band(labels, pruned, 3).tolist() == [0, 2, 3]
    assert clusters_in_band(labels, pruned, 2).tolist() == [0, 2]  # then the one nearest to the hard end
    easy = prune_class(torch.arange(100), 1, settings("easy", share=0.3))
    assert clusters_in_band(labels, easy, 3).tolist() == [0, 1, 3]
    window = prune_class(torch.arange(100), 10, settings("window", share=2.0, keep_per_ipc=5.0))
    assert window.band == range(30, 80)
    assert clusters_in_band(labels, window, 2).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "pad", "share": 0.2}, "policy=pad has no share"),
        ({"policy": "hard", "share": 1.0}, r"share of policy=hard must be a number in \[0, 1\), not 1"),
        ({"policy": "window", "share": float("inf")}, "share must be a finite number of at least 0"),
        ({"policy": "easy", "share": -0.1}, "share must be a number of at least 0 or 'auto', not -0.1"),
        ({"keep_share": 1.5}, r"keep_share must be a number in \[0, 1\], not 1.5"),
        ({"outside_weight": 0.0}, "outside_weight must be a number of more than 0, not 0"),
        ({"score": "cad", "epochs": 10}, "score=cad is a deviation over epochs and a run has 1"),
        ({"score_epoch": 50, "epochs": 40}, "score_epoch=50 comes after the last of 40 epochs"),
        ({"runs": 0}, "runs must be a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(PruneConfig(), **changes)


def test_scores_are_taken_after_a_tenth_of_the_epochs() -> None:
    assert [PruneConfig(epochs=e).trained_epochs for e in (1, 4, 30, 200)] == [1, 1, 3, 20]
    assert PruneConfig(score_epoch=7).trained_epochs == 7
