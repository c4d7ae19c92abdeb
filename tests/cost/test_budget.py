"""From a memory budget and a gradient tolerance to limits."""

from __future__ import annotations

import math

from cost_tables import alike

from gradckpt_dist.cost.budget import PLANNED_SHARE, Budget


def test_a_part_of_the_gradient_tolerance_is_left_for_what_a_mean_does_not_tell() -> None:
    for memory_budget in (0.5, "1KiB"):
        budget = Budget(memory_budget=memory_budget, reserve=0.1, gradient_tolerance=0.04)
        planned = math.sqrt(budget.limits(alike(4), available_bytes=5000).squared_error)
        assert planned == PLANNED_SHARE * 0.04 < 0.04


def test_tolerance_0_leaves_exact_storages_only() -> None:
    budget = Budget(memory_budget=0.5, reserve=0.1, gradient_tolerance=0.0)
    assert budget.limits(alike(4), available_bytes=5000).squared_error == 0
