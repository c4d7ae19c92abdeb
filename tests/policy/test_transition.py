"""From one mask to the next: what pays, and not too much at once."""

from __future__ import annotations

import numpy as np
import pytest
from cost_tables import alike, table
from hypothesis import given
from hypothesis import strategies as st

from gradckpt_dist.bench.planner_instances import KINDS, create_planner_instance
from gradckpt_dist.cost.table import Choice
from gradckpt_dist.policy.knapsack import Solution, solve
from gradckpt_dist.policy.transition import ChangeRules, next_choice


def _always(choice: Choice) -> bool:
    return True


def test_a_saving_within_the_hysteresis_is_not_worth_a_change() -> None:
    costs = alike(10)
    current = costs.choice(("recompute",) * 10)
    aim = costs.choice(("recompute",) * 9 + ("keep",))
    for hysteresis, changes in ((0.11, False), (0.1, False), (0.09, True)):
        rules = ChangeRules(interval=50, hysteresis=hysteresis, relaxed_share=1.0)
        assert (next_choice(costs, current, aim, rules, _always) != current).any() == changes


@pytest.mark.parametrize(
    ("seconds_per_change", "seconds_at_once", "pays"),
    [(49.9, 0, True), (50.1, 0, False), (40, 19, True), (40, 21, False)],
)
def test_what_a_change_costs_must_be_saved_within_the_interval(
    seconds_per_change: float, seconds_at_once: float, pays: bool
) -> None:
    costs = alike(4)
    current, aim = costs.choice(("recompute",) * 4), costs.choice(("recompute", "recompute", "keep", "keep"))
    rules = ChangeRules(
        interval=50,
        hysteresis=0.0,
        seconds_at_once=seconds_at_once,
        seconds_per_change=seconds_per_change,
        relaxed_share=1.0,
    )
    assert next_choice(costs, current, aim, rules, _always).tolist() == (aim if pays else current).tolist()


def test_the_most_saving_blocks_change_first() -> None:
    rows = [{"keep": (0.0, 100, 0, 0.0), "recompute": (seconds, 10, 90, 0.0)} for seconds in (1.0, 3.0, 2.0, 3.0)]
    costs = table(*rows)
    current, aim = costs.choice(("recompute",) * 4), costs.choice(("keep",) * 4)
    rules = ChangeRules(interval=50, relaxed_share=0.5)
    assert costs.names(next_choice(costs, current, aim, rules, _always)) == ("recompute", "keep", "recompute", "keep")


def test_room_is_made_where_a_faster_storage_needs_it() -> None:
    rows = [{"keep": (0.0, 100, 0, 0.0), "recompute": (seconds, 10, 0, 0.0)} for seconds in (9.0, 1.0, 8.0, 2.0)]
    costs = table(*rows)
    current = costs.choice(("recompute", "keep", "recompute", "keep"))
    aim = costs.choice(("keep", "recompute", "keep", "recompute"))
    rules = ChangeRules(interval=50, relaxed_share=0.5)

    def fits(choice: Choice) -> bool:
        return costs.peak_bytes_of(choice) <= 220

    # One block can be kept in place of the cheapest that is; two changes are all that this decision may make.
    assert costs.names(next_choice(costs, current, aim, rules, fits)) == ("keep", "recompute", "recompute", "keep")


def test_at_the_peak_of_full_recompute_the_last_blocks_change_first() -> None:
    costs = alike(4)
    full = costs.choice(("recompute",) * 4)
    aim = costs.choice(("compress8",) * 4)
    peak_bytes = costs.peak_bytes_of(full) + 20

    def fits(choice: Choice) -> bool:
        return costs.peak_bytes_of(choice) <= peak_bytes

    assert fits(aim)
    assert not fits(costs.choice(("compress8", "compress8", "recompute", "recompute")))
    step = next_choice(costs, full, aim, ChangeRules(interval=50, relaxed_share=0.5), fits)
    assert costs.names(step) == ("recompute", "recompute", "compress8", "compress8")


@given(st.sampled_from(list(KINDS)), st.integers(2, 60), st.integers(0, 2**32 - 1), st.floats(0.01, 1))
def test_every_step_fits_saves_and_is_small_or_the_last(kind: str, blocks: int, seed: int, share: float) -> None:
    instance = create_planner_instance(kind, blocks, np.random.default_rng(seed), lossy=True)
    costs, limits = instance.costs, instance.limits
    tight = solve(costs, peak_bytes=limits.peak_bytes, squared_error=0.0)
    best = solve(costs, peak_bytes=limits.peak_bytes, squared_error=limits.squared_error)
    assert isinstance(tight, Solution)
    assert isinstance(best, Solution)

    def fits(choice: Choice) -> bool:
        return costs.peak_bytes_of(choice) <= limits.peak_bytes and costs.squared_error_of(choice) <= (
            limits.squared_error
        )

    rules = ChangeRules(interval=50, relaxed_share=share)
    step = next_choice(costs, tight.choice, best.choice, rules, fits)
    assert fits(step)
    most = max(1, np.ceil(share * blocks))
    assert (step != tight.choice).sum() <= most or (step == best.choice).all()
    assert set(np.flatnonzero(step != tight.choice)) <= set(np.flatnonzero(best.choice != tight.choice))
    if (step != tight.choice).any():
        assert costs.seconds_of(step) < costs.seconds_of(tight.choice)
