"""A multiple-choice knapsack: storages for blocks under a peak and an error limit. ``solve`` is the way in."""

from __future__ import annotations

from gradckpt_dist.policy.knapsack.in_flight import solve
from gradckpt_dist.policy.knapsack.search import GAP
from gradckpt_dist.policy.knapsack.solver import Infeasible, Solution

__all__ = ["GAP", "Infeasible", "Solution", "solve"]
