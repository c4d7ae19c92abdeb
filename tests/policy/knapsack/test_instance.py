"""The instance: rounded errors, and options that no plan needs."""

from __future__ import annotations

import numpy as np
from cost_tables import every_choice, tables
from hypothesis import given
from hypothesis import strategies as st

from gradckpt_dist.bench.planner_instances import create_planner_instance
from gradckpt_dist.cost import CostTable
from gradckpt_dist.policy.knapsack.instance import create_instance, dominated


@given(tables(most_blocks=4, most_storages=3), st.integers(0, 40), st.sampled_from([0.0, 0.1, 0.35, 0.36]))
def test_rounding_errors_down_keeps_what_fits_and_up_keeps_only_that(
    costs: CostTable, peak_bytes: int, squared_error: float
) -> None:
    down, up = (create_instance(costs, peak_bytes, squared_error, rounded_up=up) for up in (False, True))
    for choice in every_choice(costs):
        allowed = bool(down.allowed[choice, np.arange(costs.blocks)].all())
        truly = costs.peak_bytes_of(choice) <= peak_bytes and costs.squared_error_of(choice) <= squared_error
        assert not truly or (allowed and down.fits(choice))
        assert truly or not (allowed and up.fits(choice))


def test_options_that_are_never_better_are_dominated() -> None:
    made = create_planner_instance("random", 30, np.random.default_rng(0), lossy=True)
    instance = create_instance(made.costs, made.limits.peak_bytes, made.limits.squared_error, rounded_up=False)
    result = dominated(instance)
    arrays = (instance.seconds, instance.held, instance.working, instance.error)
    for block in range(30):
        for option in np.flatnonzero(instance.allowed[:, block]):
            others = [o for o in np.flatnonzero(instance.allowed[:, block]) if o != option]
            worse = any(all(array[o, block] <= array[option, block] for array in arrays) for o in others)
            assert result[option, block] == worse
