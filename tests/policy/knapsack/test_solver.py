"""The knapsack: never over a limit, and the optimum."""

from __future__ import annotations

import numpy as np
import pytest
from cost_tables import alike, every_choice, table, tables
from hypothesis import given, settings
from hypothesis import strategies as st

from gradckpt_dist.bench.milp import solve_milp
from gradckpt_dist.bench.planner_instances import KINDS, create_planner_instance
from gradckpt_dist.cost import CostTable
from gradckpt_dist.policy.knapsack import GAP, Infeasible, Solution, solve

LIMITS = {"peak_bytes": st.integers(0, 50), "squared_error": st.sampled_from([0.0, 0.1, 0.2, 0.35, 1.0])}


def _solved(costs: CostTable, peak_bytes: int, squared_error: float = 0.0) -> Solution:
    solved = solve(costs, peak_bytes=peak_bytes, squared_error=squared_error)
    assert isinstance(solved, Solution)
    return solved


@settings(max_examples=400)
@given(tables(), LIMITS["peak_bytes"], LIMITS["squared_error"])
def test_small_ones_against_every_choice(costs: CostTable, peak_bytes: int, squared_error: float) -> None:
    within_error = [choice for choice in every_choice(costs) if costs.squared_error_of(choice) <= squared_error]
    fitting = [choice for choice in within_error if costs.peak_bytes_of(choice) <= peak_bytes]
    solved = solve(costs, peak_bytes=peak_bytes, squared_error=squared_error)
    if fitting:
        assert isinstance(solved, Solution)
        best = min(costs.seconds_of(choice) for choice in fitting)
        assert costs.peak_bytes_of(solved.choice) == solved.peak_bytes <= peak_bytes
        assert costs.squared_error_of(solved.choice) == solved.squared_error <= squared_error
        assert solved.extra_seconds == costs.seconds_of(solved.choice)
        assert best - 1e-9 <= solved.extra_seconds <= best + GAP * abs(best) + 1e-9
        assert solved.bound <= best + 1e-9
    else:
        assert isinstance(solved, Infeasible)
        assert solved.exact
        peaks = [costs.peak_bytes_of(choice) for choice in within_error]
        assert solved.peak_bytes == (min(peaks) if peaks else None)
        assert solved.limit == ("memory" if peaks else "tolerance")
        least = min(costs.squared_error_of(choice) for choice in every_choice(costs))
        assert solved.squared_error == pytest.approx(least)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(KINDS)), st.integers(1, 300), st.integers(0, 2**32 - 1), st.booleans())
def test_larger_ones_are_never_over_a_limit(kind: str, blocks: int, seed: int, lossy: bool) -> None:
    instance = create_planner_instance(kind, blocks, np.random.default_rng(seed), lossy=lossy)
    costs, limits = instance.costs, instance.limits
    solved = _solved(costs, limits.peak_bytes, limits.squared_error)
    assert costs.peak_bytes_of(solved.choice) <= limits.peak_bytes
    assert costs.squared_error_of(solved.choice) <= limits.squared_error
    assert np.isfinite(solved.extra_seconds)
    assert solved.bound <= solved.extra_seconds


@pytest.mark.parametrize("kind", KINDS)
def test_within_a_thousandth_of_the_milp_optimum(kind: str) -> None:
    compared = 0
    for seed in range(12):
        generator = np.random.default_rng(seed)
        instance = create_planner_instance(kind, int(generator.integers(5, 61)), generator, lossy=seed % 4 > 0)
        costs, limits = instance.costs, instance.limits
        milp = solve_milp(costs, peak_bytes=limits.peak_bytes, squared_error=limits.squared_error, time_limit_s=5)
        if milp.optimal and milp.seconds is not None:
            compared += 1
            solved = _solved(costs, limits.peak_bytes, limits.squared_error)
            assert solved.extra_seconds <= milp.seconds * 1.001 + 1e-9
            assert solved.bound <= milp.seconds * (1 + 1e-5) + 1e-9
    assert compared > 6


def test_many_unequal_blocks_come_near_the_bound() -> None:
    for lossy in (False, True):
        instance = create_planner_instance("unequal", 2000, np.random.default_rng(0), lossy=lossy)
        solved = _solved(instance.costs, instance.limits.peak_bytes, instance.limits.squared_error)
        assert solved.extra_seconds <= solved.bound * 1.001


def test_the_same_input_gives_the_same_plan() -> None:
    instance = create_planner_instance("structured", 120, np.random.default_rng(3), lossy=True)
    plans = [_solved(instance.costs, instance.limits.peak_bytes, instance.limits.squared_error) for _ in range(2)]
    assert (plans[0].choice == plans[1].choice).all()


def test_among_equal_blocks_the_first_hold_less() -> None:
    costs = alike(12)
    solved = _solved(costs, costs.fixed_bytes + 6 * 100 + 6 * 10)
    assert costs.names(solved.choice) == ("recompute",) * 6 + ("keep",) * 6


def test_the_last_block_is_kept_where_full_recompute_fits() -> None:
    # Recomputed, it would need what it keeps at the very moment at which most is held.
    costs = alike(12)
    full = costs.peak_bytes_of(costs.choice(("recompute",) * 12))
    assert costs.names(_solved(costs, full).choice) == ("recompute",) * 11 + ("keep",)


def test_no_tolerance_leaves_exact_storages_only() -> None:
    costs = alike(20)
    assert "compress8" not in costs.names(_solved(costs, costs.fixed_bytes + 900).choice)
    lossy = _solved(costs, costs.fixed_bytes + 900, 0.05)
    assert costs.names(lossy.choice).count("compress8") == 5
    assert lossy.squared_error == pytest.approx(0.05)


def test_prices_are_what_a_limit_costs() -> None:
    costs = create_planner_instance("unequal", 400, np.random.default_rng(1), lossy=True).costs
    peak_bytes, squared_error = costs.fixed_bytes + 8 * 2**30, 0.02
    solved = _solved(costs, peak_bytes, squared_error)
    more, less = (_solved(costs, peak_bytes + step, squared_error).extra_seconds for step in (2**28, -(2**28)))
    assert solved.byte_price == pytest.approx((less - more) / 2**29, rel=0.1)
    more, less = (_solved(costs, peak_bytes, squared_error * share).extra_seconds for share in (1.05, 0.95))
    assert solved.error_price == pytest.approx((less - more) / (0.1 * squared_error), rel=0.1)


def test_a_limit_that_does_not_bind_has_no_price() -> None:
    costs = alike(10)
    solved = _solved(costs, costs.fixed_bytes + 1000, 1.0)
    assert costs.names(solved.choice) == ("keep",) * 10
    assert (solved.byte_price, solved.error_price, solved.extra_seconds) == (0.0, 0.0, 0.0)


def test_nothing_to_hold_fits_in_nothing() -> None:
    costs = table({"keep": (1.0, 0, 0, 0.0), "recompute": (2.0, 0, 0, 0.0)})
    assert costs.names(_solved(costs, 0).choice) == ("keep",)


def test_infeasible_says_what_is_feasible() -> None:
    costs = alike(10)
    solved = solve(costs, peak_bytes=costs.fixed_bytes + 100, squared_error=0.0)
    assert solved == Infeasible(limit="memory", peak_bytes=costs.fixed_bytes + 190, squared_error=0.0, exact=True)
    assert isinstance(solve(costs, peak_bytes=costs.fixed_bytes + 190, squared_error=0.0), Solution)
    # The last two may be compressed: 8 * 10 + 2 * 30 + 20 in their backward, and 8 * 10 + 90 in that of the one before.
    lossy = solve(costs, peak_bytes=0, squared_error=0.02)
    assert isinstance(lossy, Infeasible)
    assert lossy.peak_bytes == costs.fixed_bytes + 170
    assert isinstance(solve(costs, peak_bytes=lossy.peak_bytes, squared_error=0.02), Solution)


def test_a_tolerance_that_no_choice_keeps_is_named() -> None:
    costs = table({"compress8": (0.0, 1, 0, 0.1), "compress4": (1.0, 1, 0, 0.04)})
    solved = solve(costs, peak_bytes=10, squared_error=0.01)
    assert solved == Infeasible(limit="tolerance", peak_bytes=None, squared_error=0.04, exact=True)
