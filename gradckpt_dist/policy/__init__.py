"""Policies by name."""

from __future__ import annotations

from gradckpt_dist.config import Config
from gradckpt_dist.policy.base import Evidence, Plan, Policy
from gradckpt_dist.policy.static import StaticPolicy
from gradckpt_dist.policy.threshold import ThresholdPolicy


def create_policy(config: Config) -> Policy:
    """The policy that the configuration names."""
    if config.policy == StaticPolicy.name:
        return StaticPolicy(config.every_n)
    return ThresholdPolicy(config.threshold, config.memory_budget, config.hysteresis)


__all__ = ["Evidence", "Plan", "Policy", "StaticPolicy", "ThresholdPolicy", "create_policy"]
