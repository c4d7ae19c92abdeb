"""``budget``: the best mask at set-up, at once when a limit is exceeded, step by step otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cost_tables import alike, table

from gradckpt_dist import Mask
from gradckpt_dist.bench.planner_instances import create_planner_instance
from gradckpt_dist.cost import CostTable, Limits
from gradckpt_dist.errors import BudgetError
from gradckpt_dist.policy import Evidence, Plan
from gradckpt_dist.policy.budget import BudgetPlan, BudgetPolicy, require_feasible
from gradckpt_dist.policy.transition import ChangeRules

RULES = ChangeRules(interval=50, relaxed_share=1.0)


def _evidence(storages: tuple[str, ...], **given: Any) -> Evidence:
    mask = Mask(blocks=tuple(f"b{i}" for i in range(len(storages))), storages=storages)
    return Evidence(current=mask, impacts=(), stored_bytes={}, **given)


def _plan(
    costs: CostTable, storages: tuple[str, ...], limits: Limits, rules: ChangeRules = RULES, headroom: int | None = None
) -> BudgetPlan:
    plan = BudgetPolicy(rules).plan(_evidence(storages, costs=costs, limits=limits, headroom_bytes=headroom))
    assert isinstance(plan, BudgetPlan)
    return plan


def test_nothing_changes_before_costs_are_measured() -> None:
    plan = BudgetPolicy(RULES).plan(_evidence(("recompute", "keep")))
    assert plan == Plan(storages=("recompute", "keep"), theta=None, reason="unchanged: costs not measured yet")


def test_the_first_mask_is_full_recompute() -> None:
    assert BudgetPolicy(RULES).initial(3) == ("recompute",) * 3


def test_the_plan_is_the_fastest_within_the_limits_and_says_what_it_predicts() -> None:
    costs = alike(10)
    plan = _plan(costs, ("recompute",) * 10, Limits(peak_bytes=1550))
    assert plan.storages == ("recompute",) * 5 + ("keep",) * 5
    assert (plan.extra_seconds, plan.peak_bytes, plan.squared_error, plan.feasible) == (5.0, 1550, 0.0, True)
    assert plan.theta == pytest.approx(1 / 90)
    assert plan.error_price == 0.0
    assert plan.reason == "5 blocks changed, 5 s a step saved; 0 blocks from the best"


def test_the_reserve_stays_free() -> None:
    costs = alike(10)
    plan = _plan(costs, ("recompute",) * 10, Limits(peak_bytes=1550, reserve_bytes=90))
    assert plan.storages == ("recompute",) * 6 + ("keep",) * 4


def test_relaxing_takes_several_decisions_and_ends_at_the_best() -> None:
    instance = create_planner_instance("unequal", 24, np.random.default_rng(5), lossy=True)
    costs = instance.costs
    limits = Limits(peak_bytes=costs.fixed_bytes + 6 * 2**27, squared_error=0.02)
    best = _plan(costs, ("recompute",) * 24, limits)
    storages, seconds = ("recompute",) * 24, []
    for _ in range(12):
        plan = _plan(costs, storages, limits, ChangeRules(interval=50, hysteresis=0.0, relaxed_share=0.25))
        assert sum(old != new for old, new in zip(storages, plan.storages, strict=True)) <= 6
        assert plan.peak_bytes <= limits.peak_bytes
        assert plan.squared_error <= limits.squared_error
        storages = plan.storages
        seconds.append(plan.extra_seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert len(set(seconds)) >= 4
    assert seconds[-1] == pytest.approx(best.extra_seconds, rel=1e-3)


def test_a_smaller_limit_is_met_at_once() -> None:
    costs = alike(10)
    slow = ChangeRules(interval=50, relaxed_share=0.1)
    plan = _plan(costs, ("keep",) * 10, Limits(peak_bytes=1550), slow)
    assert plan.storages == ("recompute",) * 5 + ("keep",) * 5
    assert plan.reason == "tightened at once: a peak of 2000 bytes was predicted, 1550 may be planned"


def test_a_smaller_tolerance_is_met_at_once() -> None:
    costs = alike(10)
    plan = _plan(costs, ("compress8",) * 10, Limits(peak_bytes=1400, squared_error=0.0501))
    assert plan.squared_error <= 0.0501
    assert plan.reason == "tightened at once: a gradient error of 0.316 was predicted, 0.224 is allowed"


def test_less_free_than_predicted_tightens_by_as_much() -> None:
    costs, limits = alike(10), Limits(peak_bytes=1600, reserve_bytes=50)
    storages = ("recompute",) * 5 + ("keep",) * 5  # 1550 predicted
    assert _plan(costs, storages, limits, headroom=50).storages == storages
    assert _plan(costs, storages, limits, headroom=500).storages == storages
    tightened = _plan(costs, storages, limits, headroom=49)
    assert tightened.peak_bytes <= 1549
    assert tightened.reason == "tightened at once: a peak of 1550 bytes was predicted, 1549 may be planned"
    assert _plan(costs, storages, limits, headroom=-100).peak_bytes <= 1400


def test_a_storage_that_serves_no_longer_is_left_at_once() -> None:
    costs = table({"recompute": (1.0, 1, 0, 0.0)}, {"keep": (0.0, 2, 0, 0.0), "recompute": (1.0, 1, 0, 0.0)})
    plan = _plan(costs, ("keep", "recompute"), Limits(peak_bytes=10))
    assert plan.storages == ("recompute", "keep")
    assert plan.reason == "tightened at once: a storage does not serve its block"


def test_what_is_best_stays() -> None:
    costs = alike(10)
    storages = ("recompute",) * 5 + ("keep",) * 5
    plan = _plan(costs, storages, Limits(peak_bytes=1550))
    assert plan.storages == storages
    assert plan.reason == "unchanged: no change pays within the next interval"


def test_infeasible_while_training_is_full_recompute() -> None:
    costs = alike(10)
    plan = _plan(costs, ("keep",) * 10, Limits(peak_bytes=1150, reserve_bytes=10))
    assert plan.storages == ("recompute",) * 10
    assert (plan.feasible, plan.theta, plan.error_price) == (False, None, None)
    assert plan.reason == (
        "full recompute: no mask fits 1150 bytes; the smallest feasible is 1200 (reserve 10 included), or 1180 with a "
        "larger gradient_tolerance; raise memory_budget, allow more storages, or make the batch smaller"
    )


def test_infeasible_at_set_up_is_an_error_that_says_what_is_feasible() -> None:
    costs = alike(10)
    with pytest.raises(BudgetError, match="no mask fits 1199 bytes; the smallest feasible is 1200"):
        require_feasible(costs, Limits(peak_bytes=1199, reserve_bytes=10))
    require_feasible(costs, Limits(peak_bytes=1200, reserve_bytes=10))


def test_infeasible_tolerance_at_set_up() -> None:
    costs = table({"compress8": (0.0, 1, 0, 0.04)})
    with pytest.raises(BudgetError, match=r"no mask keeps to an error of 0.1, .*; the least of any is 0.2;"):
        require_feasible(costs, Limits(peak_bytes=10, squared_error=0.01))
    require_feasible(costs, Limits(peak_bytes=10, squared_error=0.04))
