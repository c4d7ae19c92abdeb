"""A multiple-choice knapsack: storages for blocks under a peak and an error limit. ``solve`` is the way in."""

from __future__ import annotations

from gradckpt_dist.policy.knapsack.solver import GAP, Infeasible, Solution, solve

__all__ = ["GAP", "Infeasible", "Solution", "solve"]
