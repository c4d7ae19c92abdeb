"""From a memory budget and a gradient tolerance to limits."""

from __future__ import annotations

import math

from cost_tables import alike

from gradckpt_dist.cost.budget import Budget


def test_a_part_of_the_gradient_tolerance_is_left_for_what_predictions_do_not_tell() -> None:
    for memory_budget in (0.5, "1KiB"):
        budget = Budget(memory_budget=memory_budget, reserve=0.1, gradient_tolerance=0.04)
        limits = budget.limits(alike(4), available_bytes=5000, planned_share=0.25)
        assert math.sqrt(limits.squared_error) == 0.01
        assert limits.peak_bytes == budget.limits(alike(4), available_bytes=5000).peak_bytes


def test_tolerance_0_leaves_exact_storages_only() -> None:
    budget = Budget(memory_budget=0.5, reserve=0.1, gradient_tolerance=0.0)
    assert budget.limits(alike(4), available_bytes=5000).squared_error == 0
