"""Plans for several forwards in flight: they fit whenever another does, and are nearly the best."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from cost_tables import alike, every_choice, tables
from hypothesis import given
from hypothesis import strategies as st

from gradckpt_dist.cost import CostTable
from gradckpt_dist.policy.knapsack import Infeasible, Solution, solve


def _least_seconds(costs: CostTable, peak_bytes: int, squared_error: float) -> float:
    fitting = [
        costs.seconds_of(choice)
        for choice in every_choice(costs)
        if costs.peak_bytes_of(choice) <= peak_bytes and costs.squared_error_of(choice) <= squared_error
    ]
    return min(fitting, default=math.inf)


def test_later_blocks_of_other_forwards_count_in_the_peak() -> None:
    costs = dataclasses.replace(alike(3), forwards_in_flight=4)
    keep, recompute = (np.full(3, column, dtype=np.int64) for column in (0, 1))
    assert costs.peak_bytes_of(keep) == 1000 + 300
    # The last block: 30 held, 90 come back; the first: 10, and 15 of the later 20 stay for the other three forwards.
    assert costs.peak_bytes_of(recompute) == 1000 + 30 + 90
    mixed = np.array([1, 0, 0], dtype=np.int64)
    assert costs.peak_bytes_of(mixed) == 1000 + 10 + 150 + 90
    assert dataclasses.replace(costs, forwards_in_flight=1).peak_bytes_of(mixed) == 1000 + 10 + 200


@given(tables(most_blocks=4), st.integers(2, 5), st.integers(0, 40), st.sampled_from([0.0, 0.3, 1.0]))
def test_plans_fit_and_are_never_better_than_the_best(
    costs: CostTable, forwards: int, peak_bytes: int, squared_error: float
) -> None:
    costs = dataclasses.replace(costs, forwards_in_flight=forwards)
    least = _least_seconds(costs, peak_bytes, squared_error)
    solved = solve(costs, peak_bytes=peak_bytes, squared_error=squared_error)
    if isinstance(solved, Infeasible):
        return
    assert costs.peak_bytes_of(solved.choice) == solved.peak_bytes <= peak_bytes
    assert costs.squared_error_of(solved.choice) <= squared_error * (1 + 1e-9)
    assert solved.bound - 1e-9 <= least <= solved.extra_seconds + 1e-9


@pytest.mark.parametrize("forwards", [2, 4])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_identical_blocks_come_near_the_best(forwards: int, share: float) -> None:
    costs = dataclasses.replace(alike(8), forwards_in_flight=forwards)
    limit = int(1000 + 80 + 90 + share * (800 - 170))
    solved = solve(costs, peak_bytes=limit, squared_error=0.0)
    assert isinstance(solved, Solution)
    assert solved.peak_bytes <= limit
    assert solved.extra_seconds <= _least_seconds(costs, limit, 0.0) + 1.0


def test_what_cannot_fit_names_a_peak_that_can() -> None:
    costs = dataclasses.replace(alike(3), forwards_in_flight=4)
    solved = solve(costs, peak_bytes=1050, squared_error=0.0)
    assert isinstance(solved, Infeasible)
    assert solved.peak_bytes == 1120
    assert not solved.exact
    assert isinstance(solve(costs, peak_bytes=1120, squared_error=0.0), Solution)
