"""Rules that select among candidates: known answers, exhaustive search, and bounds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dq.cluster.selection import (
    lower_bounds,
    nearest_of_cells,
    select_confident,
    select_correct,
    select_facility,
    select_transport,
)
from dq.cluster.transport import exact_transport, squared_cost
from dq.core.errors import InputError

# draws of three prototypes in the order of the pool: the first of each, then the second of each, ...
PROTOTYPE = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
P = torch.tensor([0.2, 0.6, 0.1, 0.7, 0.9, 0.3, 0.8, 0.5, 0.3])


def test_confident_keeps_the_highest_probability_of_each_and_the_earlier_of_equals() -> None:
    assert select_confident(P, PROTOTYPE, [1, 1, 1]).rows.tolist() == [6, 4, 5]
    assert select_confident(P, PROTOTYPE, [2, 1, 3]).rows.tolist() == [3, 6, 4, 2, 5, 8]
    assert select_confident(P, PROTOTYPE, [0, 1, 1]).rows.tolist() == [4, 5]


def test_correct_keeps_the_first_that_is_right_and_fills_up_with_the_most_confident() -> None:
    right = P > 0.4
    chosen = select_correct(right, P, PROTOTYPE, [1, 1, 1])
    assert chosen.rows.tolist() == [3, 1, 5]  # prototype 2 has none: the most confident stands in
    assert chosen.facts == {"lacking": 1}
    chosen = select_correct(right, P, PROTOTYPE, [3, 2, 1])
    assert chosen.rows.tolist() == [0, 3, 6, 1, 4, 5]
    assert chosen.facts == {"lacking": 2}


def test_the_nearest_of_each_cell_are_in_order_and_no_point_twice() -> None:
    g = torch.Generator().manual_seed(0)
    x, centroids = torch.randn(40, 3, generator=g), torch.randn(5, 3, generator=g)
    centroids[4] = 100.0  # nobody's nearest
    distance = torch.cdist(x.double(), centroids.double())
    cell = distance.argmin(1)
    rows, owner = nearest_of_cells(x, centroids, 3)
    expected = []
    for k in range(5):
        own = (cell == k).nonzero()[:, 0]
        expected += [(int(i), k) for i in own[distance[own, k].argsort()][:3]]
    assert list(zip(rows.tolist(), owner.tolist(), strict=True)) == expected
    assert len(expected) < 15
    everything, _ = nearest_of_cells(x, centroids, 40)
    assert sorted(everything.tolist()) == list(range(40))


def test_too_few_candidates_are_refused() -> None:
    with pytest.raises(InputError, match="prototype 1 has 3 candidates and keeps 4"):
        select_confident(P, PROTOTYPE, [1, 4, 1])
    with pytest.raises(InputError, match="prototype 2 has 3 candidates and keeps 0"):
        select_confident(P, PROTOTYPE, [1, 1])
    with pytest.raises(InputError, match="prototype 1 has no mass"):
        x = torch.zeros(2, 2)
        select_transport(x, x, [0, 1], [1, 1], [1, 0], centers=x)


NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prototype": [0, 1, 2, 0, 1, 2, 0, 1, -1]}, "prototype must be .* whole numbers of at least 0"),
        ({"prototype": PROTOTYPE[:, None]}, "prototype must be a non-empty list"),
        ({"prototype": PROTOTYPE.double()}, "prototype must be .* whole numbers"),
        ({"prototype": []}, "prototype must be a non-empty list"),
        ({"numbers": [-1, 1, 1]}, "numbers must be .* whole numbers of at least 0"),
        ({"numbers": [0.5, 1, 1]}, "numbers must be .* whole numbers of at least 0"),
        ({"numbers": []}, "numbers must be a non-empty list"),
        ({"numbers": [0, 0, 0]}, "numbers must keep a candidate of at least one prototype"),
        ({"probability": P[:4]}, r"probability must be \(9,\) and finite, one for every candidate, not \(4,\)"),
        ({"probability": torch.cat([P[:8], torch.tensor([NAN])])}, r"probability must be \(9,\) and finite"),
        ({"correct": torch.ones(10, dtype=torch.bool)}, r"correct must be \(9,\)"),
        ({"candidates": torch.ones(7, 2)}, r"candidates must be \(9, 2\), a row for every entry .* not \(7, 2\)"),
        ({"candidates": torch.ones(9, 3)}, r"candidates must be \(9, 2\), .* not \(9, 3\)"),
        ({"real": torch.full((4, 2), NAN)}, "real has NaN or infinite values"),
        ({"weights": torch.ones(3)}, r"weights of real images must be \(4,\)"),
        ({"masses": [1.0, 1.0]}, r"masses of prototypes must be \(3,\)"),
        ({"centers": torch.ones(2, 2)}, r"centers must be \(3, 2\), one for every prototype, not \(2, 2\)"),
        ({"centers": torch.ones(3, 5)}, r"centers must be \(3, 2\)"),
        ({"centers": torch.full((3, 2), NAN)}, "centers has NaN or infinite values"),
    ],
)
def test_pools_of_another_shape_are_refused_in_one_sentence(change: dict[str, Any], message: str) -> None:
    (name,) = change
    pool = {"prototype": PROTOTYPE, "numbers": [1, 1, 1]}
    teacher = {**pool, "probability": P}
    features = {**pool, "real": torch.rand(4, 2), "candidates": torch.rand(9, 2), "weights": torch.ones(4)}
    transport = {**features, "masses": torch.ones(3), "centers": torch.rand(3, 2)}
    rules = [(select_confident, teacher), (select_correct, {**teacher, "correct": P > 0.4})]
    rules += [(select_facility, features), (select_transport, transport)]
    refusing = [(rule, arguments) for rule, arguments in rules if name in arguments]
    assert refusing
    for rule, arguments in refusing:
        rule(**arguments)
        with pytest.raises(InputError, match=message):
            rule(**{**arguments, **change})


@pytest.mark.parametrize("seed", range(4))
def test_facility_is_greedy_within_the_prototypes_and_over_all(seed: int) -> None:
    k, m = 3, 4
    p = problem(seed, k, m)
    real, pool = (torch.nn.functional.normalize(p[name].double(), dim=1) for name in ("real", "candidates"))
    cosines = (real @ pool.T).clamp(min=0)
    w = p["weights"].double()

    def coverage(rows: list[int]) -> float:
        return float((w * cosines[:, rows].amax(1)).sum() / w.sum())

    def greedy(quota: int) -> list[int]:
        rows: list[int] = []
        for _ in range(k):
            free = [j for j in range(k * m) if j not in rows and sum(i % k == j % k for i in rows) < quota]
            rows.append(max(free, key=lambda j: coverage([*rows, j])))
        return rows

    arguments = (p["real"], p["candidates"], p["prototype"], [1] * k)
    each = select_facility(*arguments, weights=p["weights"])
    assert p["prototype"][each.rows].tolist() == [0, 1, 2]
    assert sorted(each.rows.tolist()) == sorted(greedy(1))
    free = select_facility(*arguments, weights=p["weights"], one_per_prototype=False)
    assert sorted(free.rows.tolist()) == sorted(greedy(k))
    assert free.facts["unrepresented"] == k - len(set((free.rows % k).tolist()))
    assert each.facts["unrepresented"] == 0
    for chosen in (each, free):
        assert chosen.facts["coverage"] == pytest.approx(coverage(chosen.rows.tolist()))
        assert chosen.facts["coverage_first"] == pytest.approx(coverage([0, 1, 2]))
    combinations = itertools.product(*([i + k * d for d in range(m)] for i in range(k)))
    assert each.facts["coverage"] >= max(coverage(list(c)) for c in combinations) / 2


def problem(seed: int, k: int, m: int, n: int = 12, d: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(k, d, generator=g)
    cells = torch.arange(n) % k
    real = centers[cells] + torch.randn(n, d, generator=g)
    return {
        "real": real,
        "candidates": centers.repeat(m, 1) + 1.5 * torch.randn(k * m, d, generator=g),
        "prototype": torch.arange(k).repeat(m),
        "masses": torch.bincount(cells),
        "centers": torch.stack([real[cells == i].mean(0) for i in range(k)]),
        "weights": torch.rand(n, generator=g) + 0.1,
    }


def cost_of(p: dict[str, Tensor], rows: Tensor, b: Tensor) -> float:
    return exact_transport(squared_cost(p["real"].double(), p["candidates"][rows].double()), p["weights"], b).value


@pytest.mark.parametrize("seed", range(6))
def test_no_change_of_one_image_lowers_the_transport_cost(seed: int) -> None:
    k, m = 3, 4
    p = problem(seed, k, m)
    chosen = select_transport(numbers=[1] * k, **p)
    assert p["prototype"][chosen.rows].tolist() == [0, 1, 2]
    cost = cost_of(p, chosen.rows, p["masses"])
    assert chosen.facts["w2"] ** 2 == pytest.approx(cost, rel=1e-9)
    assert chosen.facts["w2"] <= chosen.facts["w2_start"]
    every = {
        draws: cost_of(p, torch.tensor([k * d + i for i, d in enumerate(draws)]), p["masses"])
        for draws in itertools.product(range(m), repeat=k)
    }
    own = tuple((chosen.rows // k).tolist())
    neighbors = [c for draws, c in every.items() if sum(a != b for a, b in zip(draws, own, strict=True)) == 1]
    assert cost <= min(neighbors) * (1 + 1e-9)
    assert cost <= min(every.values()) * 1.05  # no guarantee, but near on all of these
    assert chosen.facts["w2_first"] ** 2 == pytest.approx(every[0, 0, 0], rel=1e-9)


def test_coordinate_descent_moves_away_from_its_start() -> None:
    changes = [select_transport(numbers=[1] * 4, **problem(seed, 4, 6)).facts for seed in range(6)]
    assert sum(c["changes"] for c in changes) > 0
    assert all((c["w2"] < c["w2_start"]) == (c["changes"] > 0) for c in changes)


def test_one_image_has_the_best_of_all_candidates_and_two_of_a_prototype_differ() -> None:
    p = problem(1, 1, 5)
    best = min(range(5), key=lambda i: cost_of(p, torch.tensor([i]), torch.ones(1)))
    assert select_transport(numbers=[1], **p).rows.tolist() == [best]
    p = problem(2, 2, 4)
    chosen = select_transport(numbers=[2, 1], **p)
    assert p["prototype"][chosen.rows].tolist() == [0, 0, 1]
    assert len(set(chosen.rows.tolist())) == 3
    share = p["masses"].double() / torch.tensor([2, 1])  # the images of a prototype share its mass
    cost = cost_of(p, chosen.rows, share.repeat_interleave(torch.tensor([2, 1])))
    assert chosen.facts["w2"] ** 2 == pytest.approx(cost, rel=1e-9)


def test_a_weight_is_a_repeated_image_and_a_shift_changes_nothing() -> None:
    p = problem(3, 3, 4)
    p["weights"] = torch.tensor([1, 2, 3] * 4)
    chosen = select_transport(numbers=[1] * 3, **p)
    repeated = {**p, "real": p["real"].repeat_interleave(p["weights"], 0), "weights": None}
    assert torch.equal(select_transport(numbers=[1] * 3, **repeated).rows, chosen.rows)
    moved = {k: v + 100 if k in ("real", "candidates", "centers") else v for k, v in p.items()}
    assert torch.equal(select_transport(numbers=[1] * 3, **moved).rows, chosen.rows)


def test_bounds_are_below_the_costs_and_tight_for_the_present_image() -> None:
    p = problem(4, 4, 5)
    cost = squared_cost(p["real"].double(), p["candidates"].double())
    a, b = (p[name].double() / p[name].double().sum() for name in ("weights", "masses"))
    rows = torch.tensor([0, 1, 2, 3])
    solved = exact_transport(cost[:, rows], a, b)
    for i in range(4):
        options = (p["prototype"] == i).nonzero()[:, 0]
        bounds = lower_bounds(cost, rows, i, options, a, b, solved.potentials)
        for option, bound in zip(options, bounds, strict=True):
            exact = exact_transport(cost[:, torch.where(torch.arange(4) == i, option, rows)], a, b).value
            assert bound <= exact * (1 + 1e-9)
        assert bounds[0] == pytest.approx(solved.value, rel=1e-9)
