"""The relaxation: a bound, prices, and a mixture within the limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from gradckpt_dist.bench.planner_instances import KINDS, create_planner_instance
from gradckpt_dist.policy.knapsack.feasible import smallest_peak
from gradckpt_dist.policy.knapsack.instance import Instance, create_instance, take
from gradckpt_dist.policy.knapsack.relaxation import relax

SEEDS = st.integers(0, 2**32 - 1)


def _instance(kind: str, blocks: int, seed: int, *, lossy: bool) -> Instance:
    made = create_planner_instance(kind, blocks, np.random.default_rng(seed), lossy=lossy)
    return create_instance(made.costs, made.limits.peak_bytes, made.limits.squared_error, rounded_up=False)


def _linear_optimum(instance: Instance) -> float:
    """The same with fractions of storages allowed, by scipy."""
    storages, blocks = instance.seconds.shape
    before = np.tril(np.ones((blocks, blocks)))
    peaks = np.einsum("ik,sk->isk", before, instance.held / instance.capacity)
    peaks += np.einsum("ik,sk->isk", np.eye(blocks), instance.working / instance.capacity)
    limits = np.vstack([peaks.reshape(blocks, -1), (instance.error / instance.tolerance).reshape(1, -1)])
    one_each = np.einsum("ik,s->isk", np.eye(blocks), np.ones(storages)).reshape(blocks, -1)
    bounds = [(0, 1 if allowed else 0) for allowed in instance.allowed.ravel()]
    seconds = np.where(instance.allowed, instance.seconds, 0).ravel()
    solved = optimize.linprog(seconds, limits, np.ones(blocks + 1), one_each, np.ones(blocks), bounds=bounds)
    return float(solved.fun)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lossy", [False, True])
def test_the_bound_is_the_linear_programme_s(kind: str, lossy: bool) -> None:
    for seed in range(4):
        instance = _instance(kind, 20, seed, lossy=lossy)
        start = smallest_peak(instance.without(instance.error > 0))
        assert start is not None
        assert relax(instance, start.choice).bound == pytest.approx(_linear_optimum(instance), rel=1e-5, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(list(KINDS)), st.integers(1, 80), SEEDS, st.booleans())
def test_a_choice_costs_the_bound_its_regret_and_the_slack_it_leaves(
    kind: str, blocks: int, seed: int, lossy: bool
) -> None:
    instance = _instance(kind, blocks, seed, lossy=lossy)
    start = smallest_peak(instance.without(instance.error > 0))
    assert start is not None
    relaxed = relax(instance, start.choice)
    slack = (instance.capacity - instance.usage(start.choice)) @ relaxed.peak_prices
    slack += (instance.tolerance - take(instance.error, start.choice).sum()) * relaxed.error_price
    seconds = take(instance.seconds, start.choice).sum()
    assert relaxed.bound + take(relaxed.regret, start.choice).sum() + slack == pytest.approx(seconds, rel=1e-6)
    assert (relaxed.regret >= 0).all()
    assert relaxed.weights.sum() == pytest.approx(1)
    mixture = sum(
        weight * instance.usage(choice) for weight, choice in zip(relaxed.weights, relaxed.choices, strict=True)
    )
    assert np.max(mixture) <= instance.capacity * (1 + 1e-6)
