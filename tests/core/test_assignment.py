"""Properties of the division of units over processes, for costs that Hypothesis draws."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dq.core.processes import assign_units, cut

COSTS = st.lists(st.floats(0, 1e9), max_size=40)
WORLDS = st.integers(1, 12)


def loads(costs: list[float], world_size: int) -> list[float]:
    return [sum(costs[i] for i in assign_units(costs, rank, world_size)) for rank in range(world_size)]


@given(COSTS, WORLDS)
def test_every_unit_goes_to_one_process(costs: list[float], world_size: int) -> None:
    assigned = [assign_units(costs, rank, world_size) for rank in range(world_size)]
    assert all(units == sorted(units) for units in assigned)
    assert sorted(i for units in assigned for i in units) == list(range(len(costs)))


@given(COSTS, WORLDS)
def test_loads_differ_by_the_largest_unit_at_most(costs: list[float], world_size: int) -> None:
    load = loads(costs, world_size)
    assert max(load) - min(load) <= max(costs, default=0.0) + 1e-9 * sum(costs)
    # Graham's bound of list scheduling
    bound = sum(costs) / world_size + (1 - 1 / world_size) * max(costs, default=0.0)
    assert max(load) <= bound * (1 + 1e-9)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=6), st.integers(1, 3))
def test_the_largest_load_is_within_a_third_of_the_least_possible(costs: list[int], world_size: int) -> None:
    """Graham's bound of largest first: 4/3 - 1/(3 m)."""
    divisions = itertools.product(range(world_size), repeat=len(costs))
    best = min(
        max(sum(c for c, r in zip(costs, d, strict=True) if r == rank) for rank in range(world_size))
        for d in divisions
    )
    assert max(loads([float(c) for c in costs], world_size)) <= best * (4 / 3 - 1 / (3 * world_size)) + 1e-9


@given(st.lists(st.integers(0, 1000), max_size=30), WORLDS, st.randoms(use_true_random=False))
def test_the_order_of_units_does_not_matter_to_the_loads(costs: list[int], world_size: int, rng) -> None:
    mixed = rng.sample(costs, len(costs))
    assert sorted(loads(mixed, world_size)) == sorted(loads(costs, world_size))


@given(st.integers(0, 300), WORLDS)
def test_equal_units_are_spread_evenly(number: int, world_size: int) -> None:
    sizes = [len(assign_units([1.0] * number, rank, world_size)) for rank in range(world_size)]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 20_000), st.integers(1, 64), st.integers(0, 1000))
def test_stretches_cover_all_and_are_nearly_equal(n: int, least: int, more: int) -> None:
    most = least + more
    stretches = cut(n, smallest=least, largest=most)
    assert [i for s in stretches for i in s] == list(range(n))
    sizes = {len(s) for s in stretches}
    if n:
        assert 1 <= min(sizes) <= max(sizes) <= min(min(sizes) + 1, most)
    assert len(stretches) <= max(64, -(-n // most))
    if n > 64 * least and n <= 64 * most:
        assert -(-n // len(stretches)) == -(-n // 64)
