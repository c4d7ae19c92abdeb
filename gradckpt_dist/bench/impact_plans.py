"""What a plan made with a metric's errors is worth, by the true ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradckpt_dist.config import LOSSY_STORAGES
from gradckpt_dist.cost import CostTable
from gradckpt_dist.errors import BudgetError
from gradckpt_dist.policy.knapsack import Solution, solve

Array = NDArray[np.float64]

SHUFFLES = 20
_EVERY = (2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Solves the budget policy's knapsack at one peak; ``true`` [blocks, lossy] are squared errors."""

    costs: CostTable
    true: Array
    peak_bytes: int
    tolerance: float

    def by(self, errors: Array) -> dict[str, Any]:
        """The plan that these squared errors [blocks, lossy] lead to."""
        return self._judged([self._solved(errors)])

    def by_random(self, seed: int) -> dict[str, Any]:
        """Means over plans with the true errors of other blocks, drawn at random."""
        generator = np.random.default_rng(seed)
        return self._judged([self._solved(generator.permutation(self.true)) for _ in range(SHUFFLES)])

    def by_static(self) -> dict[str, Any]:
        """The fastest of the plans that look at no block, and truly keep to both limits.

        They are one storage for all, or every second, third or fourth block recomputed.
        """
        costs = self._with_errors(self.true)
        choices = [costs.choice(names) for names in _static(costs)]
        fitting = [
            choice
            for choice in choices
            if costs.peak_bytes_of(choice) <= self.peak_bytes and costs.squared_error_of(choice) <= self.tolerance**2
        ]
        return self._judged([min(fitting, key=costs.seconds_of)])

    def _solved(self, errors: Array) -> NDArray[np.int64]:
        costs = self._with_errors(errors)
        solved = solve(costs, peak_bytes=self.peak_bytes, squared_error=self.tolerance**2)
        if not isinstance(solved, Solution):
            raise BudgetError(f"bench impact plans at a peak that nothing fits: {solved}")
        return solved.choice

    def _judged(self, choices: list[NDArray[np.int64]]) -> dict[str, Any]:
        costs = self._with_errors(self.true)
        best = costs.seconds_of(self._solved(self.true))
        seconds = [costs.seconds_of(choice) for choice in choices]
        squares = [costs.squared_error_of(choice) for choice in choices]
        return {
            "extra_seconds": float(np.mean(seconds)),
            "regret_seconds": float(np.mean(seconds)) / best if best else 1.0 + float(np.mean(seconds)),
            "true_error": math.sqrt(np.mean(squares)),
            "exceeds_tolerance": float(np.mean([square > self.tolerance**2 for square in squares])),
            "storages": list(costs.names(choices[0])),
        }

    def _with_errors(self, errors: Array) -> CostTable:
        """Storages whose error is not known are not used."""
        squared, seconds = self.costs.squared_error.copy(), self.costs.extra_seconds.copy()
        columns = [self.costs.storages.index(name) for name in lossy_of(self.costs)]
        squared[:, columns] = np.where(np.isfinite(errors), errors, 0.0)
        seconds[:, columns] = np.where(np.isfinite(errors), seconds[:, columns], np.inf)
        return replace(self.costs, squared_error=squared, extra_seconds=seconds)


def lossy_of(costs: CostTable) -> tuple[str, ...]:
    """The lossy storages of the table, in its order."""
    return tuple(name for name in costs.storages if name in LOSSY_STORAGES)


def _static(costs: CostTable) -> Iterator[tuple[str, ...]]:
    for name in costs.storages:
        yield (name,) * costs.blocks
    for n in _EVERY:
        yield tuple("recompute" if block % n == 0 else "keep" for block in range(costs.blocks))
