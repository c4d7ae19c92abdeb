"""From the relaxation to a plan: round, fill what rounding left, then close the gap to the bound."""

from __future__ import annotations

import numpy as np

from gradckpt_dist.cost.table import Choice
from gradckpt_dist.policy.knapsack.instance import Bools, Instance, Ints, take
from gradckpt_dist.policy.knapsack.labels import LabelSearch
from gradckpt_dist.policy.knapsack.relaxation import Relaxation
from gradckpt_dist.policy.knapsack.rounding import round_mixture

GAP = 2e-4
"""Relative distance to the optimum at which the search ends."""

# Blocks left free and labels kept:
_FILLS = ((12, 256), (32, 96))  # around the rounded mixture
_PROOF = (72, 4096)  # among all that the gap leaves open
_NEIGHBOURHOOD = 16  # around the best plan, to begin with
_NEIGHBOURHOOD_WIDTH = 384
_SMALLEST_NEIGHBOURHOOD = 6
_LARGEST_NEIGHBOURHOOD = 64
_MOST_WORK = 110_000  # in all neighbourhoods; some 50 ms


def search(instance: Instance, relaxation: Relaxation, start: Choice) -> tuple[Choice, float]:
    """The best choice found, and a bound on the seconds of any. ``start`` fits."""
    run = _Search(instance, relaxation, start)
    run.fill()
    run.close()
    return run.best, run.bound


class _Search:
    def __init__(self, instance: Instance, relaxation: Relaxation, start: Choice) -> None:
        self._instance = instance
        self._relaxation = relaxation
        self._rounded = round_mixture(instance, relaxation)
        self.best = start
        self.bound = relaxation.bound
        self._work = 0
        if instance.fits(self._rounded.choice) and self._seconds(self._rounded.choice) < self._seconds(start):
            self.best = self._rounded.choice

    def fill(self) -> None:
        """Let the blocks that are least certain make up for what rounding left over, or took too much."""
        for blocks, width in _FILLS:
            if not self._done:
                self._try(self._rounded.choice, self._rounded.order[:blocks], self._instance.allowed, width)

    def close(self) -> None:
        """Search among the options that the gap leaves open. If these are few, what is found is the optimum."""
        if self._done:
            return
        tried = self._instance.allowed & (self._relaxation.regret < self._below - self.bound)
        is_open = tried.sum(axis=0) > 1
        free = self._rounded.order[is_open[self._rounded.order]]
        blocks, width = _PROOF
        if len(free) <= blocks:
            given = np.argmin(self._relaxation.regret, axis=0)
            self.bound = max(self.bound, self._try(given, free, tried, width) if len(free) else self._below)
        self._improve(free, tried)

    def _improve(self, free: Ints, tried: Bools) -> None:
        """Search around the best plan, other blocks each time, as many as can be searched without dropping labels."""
        generator = np.random.default_rng(0)
        size = float(_NEIGHBOURHOOD)
        likely = np.linspace(1, 5, len(free))
        most_work = self._work + _MOST_WORK
        while len(free) and not self._done and self._work < most_work:
            chosen = free[np.argsort(generator.random(len(free)) * likely, kind="stable")[: int(size)]]
            below = self._below
            bound = self._try(self.best, chosen, tried, _NEIGHBOURHOOD_WIDTH)
            size = (
                min(size * 1.5, _LARGEST_NEIGHBOURHOOD) if bound >= below else max(size * 0.8, _SMALLEST_NEIGHBOURHOOD)
            )

    @property
    def _below(self) -> float:
        """A plan that is worth finding takes fewer seconds than this."""
        seconds = self._seconds(self.best)
        return seconds - GAP / 2 * abs(seconds)

    @property
    def _done(self) -> bool:
        seconds = self._seconds(self.best)
        return seconds - self.bound <= GAP * abs(seconds)

    def _try(self, given: Choice, free: Ints, tried: Bools, width: int) -> float:
        """Search; what is found becomes the best. A bound on plans with the given options."""
        open_options = tried & (self._relaxation.regret < self._below - self._relaxation.bound)
        found = LabelSearch(
            self._instance, self._relaxation, given=given, free=np.sort(free), tried=open_options, width=width
        ).run(self._below)
        self._work += found.work
        if found.choice is not None:
            self.best = found.choice
        return found.bound

    def _seconds(self, choice: Choice) -> float:
        return float(take(self._instance.seconds, choice).sum())
