"""The master programme of the column generation: which mixture of choices is best?

A linear programme with a handful of rows, solved by the primal simplex method from where it last stood.
"""

from __future__ import annotations

import numpy as np

from gradckpt_dist.policy.knapsack.instance import Floats

_OPTIMAL = 1e-10  # relative reduced cost
_PIVOT = 1e-9
_PIVOTS_PER_ROW = 40


class Master:
    """Minimise sum(weight * cost), such that sum(weight * activity) <= 0 in every row and the weights add up to 1.

    The first column's activity, [rows], is at most 0, so that it is a solution by itself.
    """

    def __init__(self, cost: float, activity: Floats) -> None:
        rows = len(activity)
        self._rows = rows
        self._costs = np.zeros(rows)  # the slacks come first
        self._matrix = np.eye(rows + 1, rows)
        self._target = np.eye(rows + 1)[rows]
        self._basis = [*range(rows), rows]
        self.add(cost, activity)

    def add(self, cost: float, activity: Floats) -> None:
        """One more choice that may be mixed in."""
        self._costs = np.append(self._costs, cost)
        self._matrix = np.column_stack([self._matrix, np.append(activity, 1.0)])

    def solve(self) -> tuple[Floats, float]:
        """The rows' prices, [rows] and not negative, and the value of the best mixture."""
        inverse = np.linalg.inv(self._matrix[:, self._basis])
        for _ in range(_PIVOTS_PER_ROW * (self._rows + 1)):
            duals = self._costs[self._basis] @ inverse
            reduced = self._costs - duals @ self._matrix
            reduced[self._basis] = 0.0
            entering = int(np.argmin(reduced))
            if reduced[entering] >= -_OPTIMAL * (abs(duals[-1]) + abs(self._costs[entering])):
                break
            direction = inverse @ self._matrix[:, entering]
            values = np.maximum(inverse @ self._target, 0.0)
            ratios = np.full(len(values), np.inf)
            np.divide(values, direction, out=ratios, where=direction > _PIVOT)
            leaving = int(np.argmin(ratios))
            if not np.isfinite(ratios[leaving]):
                break
            basis = [*self._basis[:leaving], entering, *self._basis[leaving + 1 :]]
            try:
                inverse = np.linalg.inv(self._matrix[:, basis])
            except np.linalg.LinAlgError:  # nearly the same choice twice: the basis stays, its prices are still a bound
                break
            self._basis = basis
        return np.maximum(-duals[: self._rows], 0.0), float(duals[-1])

    def weights(self) -> Floats:
        """The best mixture, [choices added]."""
        weights = np.zeros(len(self._costs))
        weights[self._basis] = np.linalg.solve(self._matrix[:, self._basis], self._target)
        mixture: Floats = np.maximum(weights[self._rows :], 0.0)
        mixture /= mixture.sum()
        return mixture
