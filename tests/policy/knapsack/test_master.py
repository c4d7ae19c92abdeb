"""The master programme against scipy's linear programming."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from gradckpt_dist.policy.knapsack.master import Master


@pytest.mark.parametrize("seed", range(30))
def test_mixture_and_prices_are_optimal(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows, choices = int(generator.integers(1, 5)), int(generator.integers(1, 15))
    costs = generator.normal(size=choices)
    activities = generator.normal(size=(rows, choices))
    activities[:, 0] = -generator.uniform(0, 1, rows)
    master = Master(costs[0], activities[:, 0])
    for cost, activity in zip(costs[1:], activities.T[1:], strict=True):
        master.add(cost, activity)
        master.solve()
    prices, value = master.solve()
    weights = master.weights()
    reference = optimize.linprog(costs, activities, np.zeros(rows), np.ones((1, choices)), [1.0])
    assert value == pytest.approx(reference.fun, abs=1e-8)
    assert costs @ weights == pytest.approx(reference.fun, abs=1e-8)
    assert (activities @ weights <= 1e-9).all()
    assert weights.sum() == pytest.approx(1)
    assert (prices >= 0).all()
    # Duality: at these prices no choice is below the value.
    assert (costs + prices @ activities).min() == pytest.approx(reference.fun, abs=1e-8)
