"""The optimiser where several forwards wait for their backward at once, as in the first stages of a pipeline."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from gradckpt_dist.cost import CostTable
from gradckpt_dist.cost.table import Choice
from gradckpt_dist.policy.knapsack.solver import Infeasible, Solution
from gradckpt_dist.policy.knapsack.solver import solve as solve_one

_GRID = 9
_ROUNDS = 2


def solve(costs: CostTable, *, peak_bytes: int, squared_error: float) -> Solution | Infeasible:
    """The plan of fewest extra seconds whose peak and squared error are within these limits.

    The peak is ``CostTable.peak_bytes_of``. With F forwards in flight, F - 1 hold all their blocks whatever block of
    the other is in backward. If one forward holds at most u bytes, (F - 1) u bytes are taken, and the rest is the
    problem of one forward under a smaller limit. The best u is looked for on a grid, then on a finer one; so the plan
    fits, and may be short of the best. ``Solution.bound`` is that without the other forwards, and ``Infeasible`` not
    exact.
    """
    solved = solve_one(costs, peak_bytes=peak_bytes, squared_error=squared_error)
    if costs.forwards_in_flight == 1 or (isinstance(solved, Infeasible) and solved.peak_bytes is None):
        return solved
    if isinstance(solved, Solution) and solved.peak_bytes <= peak_bytes:
        return solved
    least = _least_held(costs)
    found = None
    if isinstance(solved, Solution):
        found = _searched(costs, peak_bytes, squared_error, least)
    if found is not None and isinstance(solved, Solution):
        return dataclasses.replace(found, peak_bytes=costs.peak_bytes_of(found.choice), bound=solved.bound)
    return Infeasible(
        limit="memory", peak_bytes=costs.peak_bytes_of(least), squared_error=_smallest_error(costs), exact=False
    )


def _searched(costs: CostTable, peak_bytes: int, squared_error: float, least: Choice) -> Solution | None:
    forwards = costs.forwards_in_flight
    one = dataclasses.replace(costs, held_bytes=-(-costs.held_bytes // forwards), forwards_in_flight=1)
    best = _only(costs, least, peak_bytes, squared_error)
    low, high = one.held_bytes_of(least), int(one.held_bytes.max(axis=1).sum())
    for _ in range(_ROUNDS):
        grid = np.unique(np.linspace(low, high, _GRID).astype(np.int64))
        place = 0
        for number, held in enumerate(grid):
            found = _at_most(one, int(held), peak_bytes - (forwards - 1) * int(held), squared_error)
            if found is not None and (best is None or found.extra_seconds < best.extra_seconds):
                best, place = found, number
        low, high = int(grid[max(place - 1, 0)]), int(grid[min(place + 1, len(grid) - 1)])
    return best


def _at_most(one: CostTable, held_bytes: int, peak_bytes: int, squared_error: float) -> Solution | None:
    """The best plan of one forward that holds at most so much, by one more block that only fits behind such."""
    room = peak_bytes - one.fixed_bytes - held_bytes
    if room < 0:
        return None

    def extended(array: Any, value: float, others: float) -> Any:
        return np.vstack([array, [value, *[others] * (len(one.storages) - 1)]]).astype(array.dtype)

    behind = dataclasses.replace(
        one,
        extra_seconds=extended(one.extra_seconds, 0.0, np.inf),
        held_bytes=extended(one.held_bytes, 0, 0),
        working_set_bytes=extended(one.working_set_bytes, room, 0),
        squared_error=extended(one.squared_error, 0.0, 0.0),
    )
    solved = solve_one(behind, peak_bytes=peak_bytes, squared_error=squared_error)
    return dataclasses.replace(solved, choice=solved.choice[:-1]) if isinstance(solved, Solution) else None


def _only(costs: CostTable, choice: Choice, peak_bytes: int, squared_error: float) -> Solution | None:
    """This choice, if it keeps to the limits."""
    peak, error, seconds = costs.peak_bytes_of(choice), costs.squared_error_of(choice), costs.seconds_of(choice)
    if peak > peak_bytes or error > squared_error:
        return None
    return Solution(
        choice=choice,
        extra_seconds=seconds,
        peak_bytes=peak,
        squared_error=error,
        bound=seconds,
        byte_price=0.0,
        error_price=0.0,
    )


def _least_held(costs: CostTable) -> Choice:
    """By block the option that holds least, an exact one where there is one."""
    held = np.where(costs.serves, costs.held_bytes.astype(float), np.inf)
    exact = np.where(costs.squared_error == 0, held, np.inf)
    choice: Choice = np.where(np.isfinite(exact).any(axis=1), exact.argmin(axis=1), held.argmin(axis=1))
    return choice


def _smallest_error(costs: CostTable) -> float:
    return float(np.where(costs.serves, costs.squared_error, np.inf).min(axis=1).sum())
