"""From what was gathered to the expected error of the whole gradient, by block and lossy storage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradckpt_dist.impact.probe import block_fields

Array = NDArray[np.float64]

MEMORY = 2
"""A new probe weighs at least 1 / MEMORY against the older ones of its block and storage."""


class ExpectedErrors:
    """Folds probes in at each decision, the same on all ranks. ``kinds`` is by block, the number of its kind.

    The squared relative error of the whole gradient, if storage s holds block i's activations, is

        err^2(i, s) = (own(i, s) q_i + passed(i, s) sum_{j < i} q_j) / sum_j q_j

    with q_j the squared norm of the gradient of block j, or of what stands before all blocks or after: what block i
    hands down, relatively wrong by ``passed``, is taken to make all earlier gradients wrong by as much. Errors of
    several blocks add up, being independent. Where ``GradientWeights`` finds no gradients, q comes from the probes, and
    what is outside of blocks is left out, which makes errors look larger.

    The metrics differ in where ``own`` comes from; x_i is the gathered squared norm of the gradient at block i's output
    and z_i its signal (``InfluenceImpact``):

    ``probe``      as last probed there
    ``influence``  e^2(kind, s) x_i / z_i, with e^2 the mean over the kind's probes, as is ``passed``
    ``norm``       c^2(kind, s) from the kind's probes; q is x_i, and nothing is passed: c_s^2 times the share of I_i^2

    A block that was not probed yet takes the largest value of its kind; a kind that was not, infinity.
    """

    def __init__(self, kinds: Sequence[int], lossy: Sequence[str]) -> None:
        blocks = len(kinds)
        self.lossy = tuple(lossy)
        self._kinds = np.array(kinds)
        self.dropped_probes = 0
        self._gradients = _Means(blocks, 2)
        self._weights = _Means(1, blocks + 2)
        self._errors = [_Means(blocks, 3) for _ in lossy]

    def update(self, sums: Sequence[float], weights: Sequence[float] = ()) -> None:
        """Fold in a window as ``ProbeStatistics`` and ``GradientWeights`` give it, summed over ranks."""
        if weights:
            self._weights.update(np.array(weights[-1:]), np.array(weights[:-1])[None])
        *rows, dropped = sums
        self.dropped_probes += int(dropped) if math.isfinite(dropped) and dropped > 0 else 0
        table = np.array(rows, dtype=np.float64).reshape(len(self._kinds), block_fields(len(self.lossy)))
        self._gradients.update(table[:, 0], table[:, 1:3])
        for number, errors in enumerate(self._errors):
            start = 3 + 4 * number
            errors.update(table[:, start], table[:, start + 1 : start + 4])

    def probes(self) -> NDArray[np.int64]:
        """[blocks, lossy]: the windows that held a probe."""
        return np.stack([errors.updates for errors in self._errors], axis=1)

    def own(self, storage: str) -> Array:
        """[blocks]: squared relative error of the block's own gradients, as last probed; NaN before."""
        return self._errors[self.lossy.index(storage)].values[:, 0].copy()

    def squared(self, metric: str, values: Sequence[float]) -> Array:
        """[blocks, lossy]; ``values`` are running means of ``Impact.step_values``, flat, and empty before the first."""
        blocks = len(self._kinds)
        gathered = np.array(values, dtype=np.float64).reshape(-1, blocks)
        if not gathered.size or not self.lossy:
            return np.full((blocks, len(self.lossy)), math.inf)
        squares, signal = gathered[0], gathered[-1]
        if metric == "norm":
            own = np.stack([self._of_kind(errors.values[:, 0], np.nanmean) for errors in self._errors], axis=1)
            return _infinite_where_unknown(own * (squares / squares.sum())[:, None])
        by_kind = metric == "influence"
        weights = self._shares(signal, by_kind)
        earlier = np.cumsum(weights)[:-2]
        incoherence = np.divide(squares, signal, out=np.ones(blocks), where=signal > 0)
        columns = []
        for errors in self._errors:
            own = self._carried(errors.values[:, 1], True) * incoherence
            own = own if by_kind else self._carried(errors.values[:, 0], False)
            columns.append(own * weights[1:-1] + self._carried(errors.values[:, 2], by_kind) * earlier)
        return _infinite_where_unknown(np.stack(columns, axis=1))

    def _shares(self, signal: Array, by_kind: bool) -> Array:
        """Of the whole gradient's squared norm: before all blocks, by block, after; the sum is 1."""
        weights = self._weights.values[0]
        if self._weights.updates[0]:
            return weights / weights.sum()
        own = self._carried(self._gradients.values[:, 1], by_kind) * signal
        return np.concatenate(([0.0], own, [0.0])) / own.sum()

    def _carried(self, column: Array, by_kind: bool) -> Array:
        """By block: the mean of its kind, or its own value, or else the largest of its kind; NaN if there is none."""
        if by_kind:
            return self._of_kind(column, np.nanmean)
        return np.where(np.isnan(column), self._of_kind(column, np.nanmax), column)

    def _of_kind(self, column: Array, summary: object) -> Array:
        result = np.full(len(column), math.nan)
        for kind in np.unique(self._kinds):
            members = self._kinds == kind
            known = column[members & ~np.isnan(column)]
            if known.size:
                result[members] = known.max() if summary is np.nanmax else known.mean()
        return result


class _Means:
    """Running means [blocks, fields], NaN before a block's first sample."""

    def __init__(self, blocks: int, fields: int) -> None:
        self.values: Array = np.full((blocks, fields), math.nan)
        self.updates: NDArray[np.int64] = np.zeros(blocks, dtype=np.int64)

    def update(self, counts: Array, sums: Array) -> None:
        sound = (counts >= 1) & np.isfinite(counts) & np.isfinite(sums).all(axis=1) & (sums >= 0).all(axis=1)
        for block in np.flatnonzero(sound):
            self.updates[block] += 1
            weight = 1 / min(int(self.updates[block]), MEMORY)
            old = self.values[block] if self.updates[block] > 1 else 0.0
            self.values[block] = (1 - weight) * old + weight * sums[block] / counts[block]


def _infinite_where_unknown(errors: Array) -> Array:
    return np.where(np.isnan(errors), math.inf, errors)
