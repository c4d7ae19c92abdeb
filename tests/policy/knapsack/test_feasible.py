"""The smallest peak, against every choice."""

from __future__ import annotations

import numpy as np
import pytest
from cost_tables import every_choice, tables
from hypothesis import given
from hypothesis import strategies as st

from gradckpt_dist.bench.planner_instances import create_planner_instance
from gradckpt_dist.cost import CostTable
from gradckpt_dist.policy.knapsack.feasible import smallest_peak, suffix_peaks
from gradckpt_dist.policy.knapsack.instance import create_instance


@given(tables(), st.sampled_from([0.0, 0.2, 0.35, 10.0]))
def test_smallest_peak_under_a_tolerance(costs: CostTable, squared_error: float) -> None:
    instance = create_instance(costs, costs.fixed_bytes, squared_error, rounded_up=False)
    if not instance.allowed.any(axis=0).all():
        return
    peaks = [costs.peak_bytes_of(c) for c in every_choice(costs) if costs.squared_error_of(c) <= squared_error]
    found = smallest_peak(instance)
    if not peaks:
        assert found is None
        return
    assert found is not None
    assert found.exact
    assert found.peak_bytes + costs.fixed_bytes == min(peaks) == costs.peak_bytes_of(found.choice)


@given(tables())
def test_smallest_peak_of_every_suffix(costs: CostTable) -> None:
    instance = create_instance(costs, 0, 10.0, rounded_up=False)
    peaks = suffix_peaks(instance)
    assert peaks[-1] == 0
    for first in range(costs.blocks):
        rest = CostTable(
            storages=costs.storages,
            extra_seconds=costs.extra_seconds[first:],
            held_bytes=costs.held_bytes[first:],
            working_set_bytes=costs.working_set_bytes[first:],
            squared_error=costs.squared_error[first:],
        )
        assert peaks[first] == min(rest.peak_bytes_of(choice) for choice in every_choice(rest))


@pytest.mark.parametrize("kind", ["random", "unequal"])
def test_many_trade_offs_still_give_a_choice_within_the_tolerance(kind: str) -> None:
    costs = create_planner_instance(kind, 300, np.random.default_rng(0), lossy=True).costs
    squared_error = 0.01
    found = smallest_peak(create_instance(costs, 0, squared_error, rounded_up=True))
    assert found is not None
    assert costs.peak_bytes_of(found.choice) == found.peak_bytes + costs.fixed_bytes
    assert costs.squared_error_of(found.choice) <= squared_error
    loose = smallest_peak(create_instance(costs, 0, 1e6, rounded_up=True))
    exact = smallest_peak(create_instance(costs, 0, 0.0, rounded_up=True))
    assert loose is not None
    assert exact is not None
    assert loose.peak_bytes <= found.peak_bytes <= exact.peak_bytes
