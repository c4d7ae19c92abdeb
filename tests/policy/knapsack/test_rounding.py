"""Rounding: the mixture's shares, by position."""

from __future__ import annotations

import numpy as np

from gradckpt_dist.bench.planner_instances import create_planner_instance
from gradckpt_dist.policy.knapsack.feasible import smallest_peak
from gradckpt_dist.policy.knapsack.instance import create_instance, take
from gradckpt_dist.policy.knapsack.relaxation import relax
from gradckpt_dist.policy.knapsack.rounding import round_mixture


def test_identical_blocks_share_the_mixture_and_hold_less_first() -> None:
    made = create_planner_instance("structured", 200, np.random.default_rng(1), lossy=False)
    instance = create_instance(made.costs, made.limits.peak_bytes, 0.0, rounded_up=False)
    start = smallest_peak(instance)
    assert start is not None
    relaxed = relax(instance, start.choice)
    rounded = round_mixture(instance, relaxed)
    held = take(instance.held, rounded.choice)
    assert (np.diff(held) >= 0).all()
    mixed = sum(w * take(instance.held, c).sum() for w, c in zip(relaxed.weights, relaxed.choices, strict=True))
    assert abs(held.sum() - mixed) <= 2 * instance.held.max()
    assert sorted(rounded.order.tolist()) == list(range(200))
    # The least certain blocks are those at which the option changes.
    switches = np.flatnonzero(np.diff(rounded.choice))
    assert min(abs(rounded.order[0] - place) for place in switches) <= 1
