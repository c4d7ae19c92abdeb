"""The Lagrangian dual: a price for bytes in each block's backward, and a price for error.

Solved by column generation (Dantzig and Wolfe, 1960): the master mixes the choices found so far, its prices call
for the next choice, block by block. Of the n peaks only those that a mixture exceeds are priced (row generation).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradckpt_dist.cost.table import Choice
from gradckpt_dist.policy.knapsack.instance import Bools, Floats, Instance, take
from gradckpt_dist.policy.knapsack.master import Master

_CONVERGED = 1e-7
_EXCEEDED = 1e-9
_MOST_CHOICES = 400
_MOST_ROWS = 24


@dataclass(frozen=True, kw_only=True, eq=False)
class Relaxation:
    """The best prices found and what they say.

    ``peak_prices`` are seconds per byte in the backward of each block, [blocks]; ``error_price`` seconds per unit of
    squared error. ``bound``: no choice within the limits takes fewer seconds. ``regret`` [storages, blocks] is what an
    option adds to the bound. ``choices`` [mixed, blocks] and ``weights`` [mixed] are the mixture that meets the limits.
    """

    peak_prices: Floats
    error_price: float
    bound: float
    regret: Floats
    choices: Choice
    weights: Floats

    @property
    def held_prices(self) -> Floats:
        """Seconds per byte that a block holds, [blocks]: it is there in its own backward and in all later blocks'."""
        return held_prices(self.peak_prices)


def held_prices(peak_prices: Floats) -> Floats:
    """The prices of this block's peak and those of all later blocks, added up."""
    return np.cumsum(peak_prices[::-1])[::-1]


def relax(instance: Instance, start: Choice) -> Relaxation:
    """Solve the dual; ``start`` is a choice within the limits."""
    return _Generation(instance, start).run()


class _Generation:
    """Choices found so far, and the rows that are priced: some blocks' peaks and, if any option has one, the error."""

    def __init__(self, instance: Instance, start: Choice) -> None:
        self._instance = instance
        self._held = instance.held / max(instance.capacity, 1)
        self._working = instance.working / max(instance.capacity, 1)
        self._error = instance.error / max(instance.tolerance, 1)
        self._has_error = bool((instance.error * instance.allowed).any())
        self._choices: list[Choice] = []
        self._costs: list[float] = []
        self._excess: list[Floats] = []  # [blocks + 1]: each block's peak and the error, as shares of the limit, less 1
        self._rows = [instance.blocks - 1]
        self._best_bound = -np.inf
        self._best_prices = np.zeros(instance.blocks + 1)
        self._add(start)
        self._master = self._create_master()

    def run(self) -> Relaxation:
        while True:
            weights = self._price()
            mixture = np.einsum("c,cb->b", weights, np.array(self._excess))[:-1]
            mixture[self._rows] = -1.0
            worst = int(np.argmax(mixture))
            if mixture[worst] <= _EXCEEDED or len(self._rows) >= _MOST_ROWS or len(self._choices) >= _MOST_CHOICES:
                return self._result(weights)
            self._rows.append(worst)
            self._master = self._create_master()

    def _price(self) -> Floats:
        """Add choices until none makes the mixture cheaper; the mixture's weights."""
        while True:
            row_prices, value = self._master.solve()
            prices = np.zeros(self._instance.blocks + 1)
            prices[self._all_rows] = row_prices
            priced = self._priced(prices)
            choice = np.argmin(priced, axis=0)
            bound = float(take(priced, choice).sum()) - float(prices.sum())
            if bound > self._best_bound:
                self._best_bound, self._best_prices = bound, prices
            if value - bound <= _CONVERGED * abs(value) or len(self._choices) >= _MOST_CHOICES:
                return self._master.weights()
            self._add(choice)
            self._master.add(self._costs[-1], self._excess[-1][self._all_rows])

    @property
    def _all_rows(self) -> list[int]:
        return [*self._rows, self._instance.blocks] if self._has_error else self._rows

    def _priced(self, prices: Floats) -> Floats:
        """Seconds of every option with what it uses priced, [storages, blocks]."""
        priced = self._instance.seconds + held_prices(prices[:-1]) * self._held
        priced[:, self._rows] += prices[self._rows] * self._working[:, self._rows]
        if self._has_error:
            priced += prices[-1] * self._error
        return priced

    def _add(self, choice: Choice) -> None:
        self._choices.append(choice)
        self._costs.append(float(take(self._instance.seconds, choice).sum()))
        used = np.cumsum(take(self._held, choice)) + take(self._working, choice)
        self._excess.append(np.append(used, take(self._error, choice).sum()) - 1.0)

    def _create_master(self) -> Master:
        rows = self._all_rows
        master = Master(self._costs[0], np.minimum(self._excess[0][rows], 0.0))
        for cost, excess in zip(self._costs[1:], self._excess[1:], strict=True):
            master.add(cost, excess[rows])
        return master

    def _result(self, weights: Floats) -> Relaxation:
        instance = self._instance
        priced = self._priced(self._best_prices)
        mixed: Bools = weights > _EXCEEDED
        return Relaxation(
            peak_prices=self._best_prices[:-1] / max(instance.capacity, 1),
            error_price=float(self._best_prices[-1]) / max(instance.tolerance, 1),
            bound=self._best_bound,
            regret=priced - priced.min(axis=0),
            choices=np.array(self._choices)[mixed],
            weights=weights[mixed] / weights[mixed].sum(),
        )
