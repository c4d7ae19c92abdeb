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
    Ints,
    create_instance,
    dominated,
    take,
)
from gradckpt_dist.policy.knapsack.labels import LabelSearch
from gradckpt_dist.policy.knapsack.relaxation import Relaxation, relax
from gradckpt_dist.policy.knapsack.rounding import round_mixture

GAP = 2e-4
"""Relative distance to the optimum at which the search ends."""

_FIRST = (32, 96)  # blocks left free and labels kept, in the search that fills what rounding left
_SECOND = (72, 1024)  # in the search that closes the gap


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
    """The plan of fewest extra seconds whose peak and squared error are within these limits.

    The peak is ``CostTable.peak_bytes_of``. Deterministic; among equal blocks those that hold less come first.
    """
    instance = create_instance(costs, peak_bytes, squared_error)
    if not instance.allowed.any(axis=0).all():
        return _infeasible(costs, None)
    instance = instance.without(dominated(instance))
    start = _start(instance)
    if start is None or start.peak_bytes > instance.capacity:
        return _infeasible(costs, start)
    instance = instance.without(_never_fits(instance))
    relaxation = relax(instance, start.choice)
    choice, bound = _search(instance, relaxation, start.choice)
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
    return (peak > instance.capacity) | (instance.error - error > instance.tolerance - error.sum())


def _search(instance: Instance, relaxation: Relaxation, start: Choice) -> tuple[Choice, float]:
    """The best choice found, and a bound on any."""
    rounded = round_mixture(instance, relaxation)
    best = rounded.choice if instance.fits(rounded.choice) else start
    best = min(best, start, key=lambda choice: _seconds(instance, choice))
    blocks, width = _FIRST
    search = LabelSearch(
        instance,
        relaxation,
        given=rounded.choice,
        free=np.sort(rounded.order[:blocks]),
        tried=instance.allowed,
        width=width,
    )
    found = search.run(_seconds(instance, best))
    best = best if found.choice is None else found.choice
    return _closed(instance, relaxation, best, rounded.order)


def _closed(instance: Instance, relaxation: Relaxation, best: Choice, order: Ints) -> tuple[Choice, float]:
    """Search among the options that the gap leaves open; if these are not too many, what is found is the optimum."""
    seconds, bound = _seconds(instance, best), relaxation.bound
    below = seconds - GAP / 2 * abs(seconds)
    if bound >= below - GAP / 2 * abs(seconds):
        return best, bound
    tried = instance.allowed & (relaxation.regret < below - bound)
    open_blocks = tried.sum(axis=0) > 1
    blocks, width = _SECOND
    free = order[open_blocks[order]]
    given = np.where(open_blocks, best, np.argmin(relaxation.regret, axis=0))
    if not len(free):
        free = order[:1]
    search = LabelSearch(instance, relaxation, given=given, free=np.sort(free[:blocks]), tried=tried, width=width)
    found = search.run(below)
    if len(free) <= blocks:
        bound = max(bound, found.bound)
    return (best if found.choice is None else found.choice), bound


def _seconds(instance: Instance, choice: Choice) -> float:
    return float(take(instance.seconds, choice).sum())
