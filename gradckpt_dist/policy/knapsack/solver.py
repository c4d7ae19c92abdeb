"""The budget policy's optimiser: one storage per block, the fewest extra seconds within two limits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradckpt_dist.cost import CostTable
from gradckpt_dist.cost.table import Choice
from gradckpt_dist.policy.knapsack.feasible import SmallestPeak, smallest_peak, suffix_peaks
from gradckpt_dist.policy.knapsack.instance import (
    TOLERANCE_UNITS,
    Bools,
    Instance,
    create_instance,
    dominated,
)
from gradckpt_dist.policy.knapsack.relaxation import relax
from gradckpt_dist.policy.knapsack.search import search


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """``choice`` [blocks] are columns of the table. No choice within the limits takes fewer than ``bound`` seconds.

    ``byte_price`` is what one byte less of peak would cost, in seconds; ``error_price``, one unit less of squared
    error. Both come from the relaxation and are 0 where the limit does not bind.
    """

    choice: Choice
    extra_seconds: float
    peak_bytes: int
    squared_error: float
    bound: float
    byte_price: float
    error_price: float


@dataclass(frozen=True, kw_only=True)
class Infeasible:
    """``limit`` is what fails: ``memory`` or ``tolerance``.

    ``peak_bytes`` is the smallest peak under the tolerance, fixed bytes included; None if there is none. It is the
    smallest one if ``exact``, else one that some choice has. ``squared_error`` is the smallest whatever the peak.
    """

    limit: str
    peak_bytes: int | None
    squared_error: float
    exact: bool


def solve(costs: CostTable, *, peak_bytes: int, squared_error: float) -> Solution | Infeasible:
    """The plan of fewest extra seconds whose peak and squared error are within these limits, for one forward at a time.

    The peak is ``CostTable.peak_bytes_of`` but for other forwards in flight. Deterministic; among equal blocks those
    that hold less come first.
    """
    solved = _solve(costs, peak_bytes, squared_error, rounded_up=False)
    if isinstance(solved, Solution) and solved.squared_error > squared_error:
        # Over the tolerance by a rounding error.
        return _solve(costs, peak_bytes, squared_error, rounded_up=True)
    return solved


def _solve(costs: CostTable, peak_bytes: int, squared_error: float, *, rounded_up: bool) -> Solution | Infeasible:
    instance = create_instance(costs, peak_bytes, squared_error, rounded_up=rounded_up)
    if not instance.allowed.any(axis=0).all():
        return _infeasible(costs, None)
    instance = instance.without(dominated(instance))
    start = _start(instance)
    if start is None or start.peak_bytes > instance.capacity:
        return _infeasible(costs, start)
    instance = instance.without(_never_fits(instance))
    relaxation = relax(instance, start.choice)
    choice, bound = search(instance, relaxation, start.choice)
    return Solution(
        choice=choice,
        extra_seconds=costs.seconds_of(choice),
        peak_bytes=costs.peak_bytes_of(choice),
        squared_error=costs.squared_error_of(choice),
        bound=min(bound, costs.seconds_of(choice)),
        byte_price=float(relaxation.held_prices[0]),
        error_price=relaxation.error_price * TOLERANCE_UNITS / squared_error if squared_error else 0.0,
    )


def _start(instance: Instance) -> SmallestPeak | None:
    """A choice that fits, if there is one; else the smallest peak under the tolerance."""
    exact = instance.without(instance.error > 0)
    if exact.allowed.any(axis=0).all():
        found = smallest_peak(exact)
        if found is not None and found.peak_bytes <= instance.capacity:
            return found
    return smallest_peak(instance)


def _infeasible(costs: CostTable, found: SmallestPeak | None) -> Infeasible:
    least = np.where(costs.serves, costs.squared_error, np.inf).min(axis=1)
    return Infeasible(
        limit="tolerance" if found is None else "memory",
        peak_bytes=None if found is None else found.peak_bytes + costs.fixed_bytes,
        squared_error=float(least.sum()),
        exact=found is None or found.exact,
    )


def _never_fits(instance: Instance) -> Bools:
    """Options that exceed the capacity or the tolerance even if all other blocks take as little as they can."""
    held = np.where(instance.allowed, instance.held, np.iinfo(np.int64).max).min(axis=0)
    error = np.where(instance.allowed, instance.error, np.iinfo(np.int64).max).min(axis=0)
    before = np.cumsum(held) - held
    peak = before + instance.held + np.maximum(instance.working, suffix_peaks(instance)[1:])
    excluded: Bools = (peak > instance.capacity) | (instance.error - error > instance.tolerance - error.sum())
    return excluded
