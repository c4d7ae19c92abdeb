"""Policies by name."""

from __future__ import annotations

from gradckpt_dist.config import Config
from gradckpt_dist.policy.base import Evidence, Plan, Policy
from gradckpt_dist.policy.budget import BudgetPlan, BudgetPolicy, require_feasible
from gradckpt_dist.policy.static import StaticPolicy
from gradckpt_dist.policy.threshold import ThresholdPolicy
from gradckpt_dist.policy.transition import ChangeRules


def create_policy(config: Config) -> Policy:
    """The policy that the configuration names."""
    if config.policy == StaticPolicy.name:
        return StaticPolicy(config.every_n)
    if config.policy == BudgetPolicy.name:
        return BudgetPolicy(ChangeRules(interval=config.interval, hysteresis=config.hysteresis))
    return ThresholdPolicy(config.threshold, config.memory_budget, config.hysteresis)


__all__ = [
    "BudgetPlan",
    "BudgetPolicy",
    "Evidence",
    "Plan",
    "Policy",
    "StaticPolicy",
    "ThresholdPolicy",
    "create_policy",
    "require_feasible",
]
