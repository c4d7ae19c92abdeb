"""The label search: the optimum where nothing is dropped, a bound where something is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cost_tables import table

from gradckpt_dist.bench.planner_instances import KINDS, create_planner_instance
from gradckpt_dist.policy.knapsack.feasible import smallest_peak
from gradckpt_dist.policy.knapsack.instance import Instance, create_instance, take
from gradckpt_dist.policy.knapsack.labels import LabelSearch
from gradckpt_dist.policy.knapsack.relaxation import Relaxation, relax

BLOCKS = 24


def _relaxed(kind: str, seed: int) -> tuple[Instance, Relaxation, np.ndarray]:
    made = create_planner_instance(kind, BLOCKS, np.random.default_rng(seed), lossy=True)
    instance = create_instance(made.costs, made.limits.peak_bytes, made.limits.squared_error, rounded_up=True)
    start = smallest_peak(instance.without(instance.error > 0))
    assert start is not None
    return instance, relax(instance, start.choice), start.choice


def _by_trying(instance: Instance, given: np.ndarray, free: np.ndarray) -> float:
    best = np.inf
    for options in itertools.product(*(np.flatnonzero(instance.allowed[:, i]) for i in free)):
        choice = given.copy()
        choice[free] = options
        if instance.fits(choice):
            best = min(best, float(take(instance.seconds, choice).sum()))
    return best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("free", [[0, 7, 8], [3, 11, 23], [21, 22, 23]])
def test_the_best_options_of_a_few_blocks(kind: str, free: list[int]) -> None:
    for seed in range(3):
        instance, relaxed, start = _relaxed(kind, seed)
        places = np.array(free)
        search = LabelSearch(instance, relaxed, given=start, free=places, tried=instance.allowed, width=1000)
        best = _by_trying(instance, start, places)
        found = search.run(np.inf)
        assert found.choice is not None
        assert instance.fits(found.choice)
        assert float(take(instance.seconds, found.choice).sum()) == pytest.approx(best)
        assert found.bound == pytest.approx(best)
        assert (np.delete(found.choice, places) == np.delete(start, places)).all()


def test_nothing_is_found_below_the_optimum() -> None:
    instance, relaxed, start = _relaxed("unequal", 0)
    places = np.array([3, 11, 23])
    search = LabelSearch(instance, relaxed, given=start, free=places, tried=instance.allowed, width=1000)
    best = _by_trying(instance, start, places)
    found = search.run(best)
    assert found.choice is None
    assert found.bound == best
    assert search.run(best + 1e-6).choice is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrow_search_still_bounds_a_wide_one(kind: str) -> None:
    instance, relaxed, start = _relaxed(kind, 1)
    places = np.arange(BLOCKS)
    narrow, wide = (
        LabelSearch(instance, relaxed, given=start, free=places, tried=instance.allowed, width=width).run(np.inf)
        for width in (8, 3000)
    )
    assert wide.choice is not None
    seconds = float(take(instance.seconds, wide.choice).sum())
    assert narrow.bound <= seconds + 1e-9
    assert narrow.work < wide.work
    if narrow.choice is not None:
        assert instance.fits(narrow.choice)
        assert float(take(instance.seconds, narrow.choice).sum()) >= seconds - 1e-9


def test_given_options_that_are_over_the_capacity_are_not_found() -> None:
    # Held before the first free block: 3 and then 2 more in backward, of 4.
    costs = table(
        {"keep": (0.0, 3, 2, 0.0), "recompute": (1.0, 1, 1, 0.0)},
        {"keep": (0.0, 0, 0, 0.0), "recompute": (1.0, 0, 0, 0.0)},
    )
    instance = create_instance(costs, 4, 0.0, rounded_up=False)
    fits, over = np.array([1, 1]), np.array([0, 1])
    relaxed = relax(instance, fits)
    free = np.array([1])
    for given, is_found in ((fits, True), (over, False)):
        search = LabelSearch(instance, relaxed, given=given, free=free, tried=instance.allowed, width=10)
        assert (search.run(np.inf).choice is not None) == is_found
