"""From what was gathered to the expected error of the whole gradient, by block and lossy storage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradckpt_dist.impact.base import LARGEST_SUM
from gradckpt_dist.impact.influence import first_order
from gradckpt_dist.impact.probe import block_fields

Array = NDArray[np.float64]

MEMORY = 2
"""A new window weighs at least 1 / MEMORY against the older ones, in how the gradient is shared out."""
TREND = 0.5
"""How much of what probes find above or below the expected is put down to training, the rest to block and storage."""
_LARGEST_RISE = 4.0


class ExpectedErrors:
    """Folds probes in at each decision, the same on all ranks. ``kinds`` is by block, the number of its kind.

    The squared relative error of the whole gradient, if storage s holds block i's activations, is

        err^2(i, s) = (own(i, s) q_i + passed(i, s) sum_{j < i} q_j) / sum_j q_j

    with q_j the squared norm of the gradient of block j, or of what stands before all blocks or after: what block i
    hands down, relatively wrong by ``passed``, is taken to make all earlier gradients wrong by as much. Errors of
    several blocks add up, being independent. Where ``GradientWeights`` finds no gradients, q comes from the probes, and
    what is outside of blocks is left out, which makes errors look larger.

    The metrics differ in where ``own`` comes from and ``passed`` come from:

    ``influence``  first order: e^2(kind, s) / c_i, and f^2(kind, s) b_i passed, with c and b as gathered since, and the
                   constants e^2 and f^2 from all probes of the kind
    ``probe``      the same with e^2(i, s) and f^2(i, s) from the block's own last probe; just after it these are the
                   errors that it measured
    ``norm``       c^2(kind, s) from the kind's probes; q is I_i^2, and nothing is passed: c_s^2 times its share

    Errors rise by orders of magnitude as training goes on, and a probe sees one block under one storage. So the change
    that it finds moves all that is known of its kind under any storage, to the power of ``TREND``.

    A block that was not probed yet takes the largest value of its kind; a kind that was not, infinity.
    """

    def __init__(self, kinds: Sequence[int], lossy: Sequence[str]) -> None:
        blocks = len(kinds)
        self.lossy = tuple(lossy)
        self._kinds = np.array(kinds)
        self.dropped_probes = 0
        self._gradients = _Means(blocks, 2, MEMORY)
        self._weights = _Means(1, blocks + 2, MEMORY)
        self._errors = [_Means(blocks, 4, memory=1) for _ in lossy]

    def update(self, sums: Sequence[float], weights: Sequence[float] = ()) -> None:
        """Fold in a window as ``ProbeStatistics`` and ``GradientWeights`` give it, summed over ranks."""
        if weights and all(0 <= value <= LARGEST_SUM for value in weights) and sum(weights[:-1]) > 0:
            *squares, steps = weights
            self._weights.update(np.array([steps]), steps * _shared_out(np.array([squares])))
        *rows, dropped = sums
        self.dropped_probes += int(dropped) if 0 < dropped <= LARGEST_SUM else 0
        table = np.array(rows, dtype=np.float64).reshape(len(self._kinds), block_fields(len(self.lossy)))
        self._gradients.update(table[:, 0], table[:, 1:3])
        changes = np.full((len(self.lossy), len(self._kinds), 4), math.nan)
        for number, errors in enumerate(self._errors):
            expected = np.stack([self._own_or_mean(column) for column in errors.values.T], axis=1)
            start = 3 + 5 * number
            for block in errors.update(table[:, start], table[:, start + 1 : start + 5]):
                changes[number, block] = _change(errors.values[block], expected[block])
        self._follow(changes)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        means = {name: errors.plain() for name, errors in zip(self.lossy, self._errors, strict=True)}
        return {
            "gradients": self._gradients.plain(),
            "weights": self._weights.plain(),
            "errors": means,
            "dropped_probes": self.dropped_probes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``; a storage that it does not have is probed anew."""
        self._gradients.restore(state["gradients"])
        self._weights.restore(state["weights"])
        for number, name in enumerate(self.lossy):
            if name in state["errors"]:
                self._errors[number].restore(state["errors"][name])
        self.dropped_probes = state["dropped_probes"]

    def probes(self) -> NDArray[np.int64]:
        """[blocks, lossy]: the windows that held a probe."""
        return np.stack([errors.updates for errors in self._errors], axis=1)

    def own(self, storage: str) -> Array:
        """[blocks]: squared relative error of the block's own gradients, as probed; NaN before."""
        return self._errors[self.lossy.index(storage)].values[:, 0].copy()

    def squared(self, metric: str, values: Sequence[float]) -> Array:
        """[blocks, lossy]; ``values`` are running means of ``Impact.step_values``, flat, and empty before the first."""
        blocks = len(self._kinds)
        gathered = np.array(values, dtype=np.float64).reshape(-1, blocks)
        if not gathered.size or not self.lossy:
            return np.full((blocks, len(self.lossy)), math.inf)
        if metric == "norm":
            share = gathered[0] / gathered[0].sum()
            columns = [self._mean_of_kind(errors.values[:, 0]) * share for errors in self._errors]
            return _infinite_where_unknown(np.stack(columns, axis=1))
        signal, coherence, branch = (part.numpy() for part in first_order(torch.from_numpy(gathered)))
        weights = self._shares(signal, metric == "influence")
        earlier = np.cumsum(weights)[:-2]
        columns = []
        constant = self._mean_of_kind if metric == "influence" else self._most_of_kind
        for errors in self._errors:
            e_squared, f_squared = (constant(column) for column in errors.values.T[2:])
            columns.append(e_squared / coherence * weights[1:-1] + f_squared * branch * earlier)
        return _infinite_where_unknown(np.stack(columns, axis=1))

    def _shares(self, signal: Array, by_kind: bool) -> Array:
        """Of the whole gradient's squared norm: before all blocks, by block, after; the sum is 1."""
        if self._weights.updates[0]:
            weights: Array = self._weights.values[0]
            return _shared_out(weights)
        gain = self._gradients.values[:, 1]
        own = (self._mean_of_kind(gain) if by_kind else self._most_of_kind(gain)) * signal
        return _shared_out(np.concatenate(([0.0], own, [0.0])))

    def _follow(self, changes: Array) -> None:
        """What was not probed changes with what was: [lossy, blocks, fields], NaN where there was no probe."""
        for kind in np.unique(self._kinds):
            twins = self._kinds == kind
            found = changes[:, twins].reshape(-1, changes.shape[2])
            found = found[~np.isnan(found[:, 0])]
            if not len(found):
                continue
            rise = np.exp(TREND * found.mean(axis=0))
            for errors, probed in zip(self._errors, ~np.isnan(changes[:, :, 0]), strict=True):
                errors.values[twins & ~probed] *= rise

    def _mean_of_kind(self, column: Array) -> Array:
        """[blocks]: over the probed blocks of the kind; NaN where there is none."""
        return self._of_kind(column, lambda known: float(known.mean()))

    def _own_or_mean(self, column: Array) -> Array:
        """[blocks]: the block's own number, or before its first probe the mean of its kind; NaN if there is none."""
        return np.where(np.isnan(column), self._mean_of_kind(column), column)

    def _most_of_kind(self, column: Array) -> Array:
        """[blocks]: the block's own number, or before its first probe the largest of its kind; NaN if there is none."""
        return np.where(np.isnan(column), self._of_kind(column, lambda known: float(known.max())), column)

    def _of_kind(self, column: Array, summary: Callable[[Array], float]) -> Array:
        result = np.full(len(column), math.nan)
        for kind in np.unique(self._kinds):
            members = self._kinds == kind
            known = column[members & ~np.isnan(column)]
            if known.size:
                result[members] = summary(known)
        return result


class _Means:
    """Running means [blocks, fields], NaN before a block's first sample; a new one weighs at least 1 / ``memory``."""

    def __init__(self, blocks: int, fields: int, memory: int) -> None:
        self._memory = memory
        self.values: Array = np.full((blocks, fields), math.nan)
        self.updates: NDArray[np.int64] = np.zeros(blocks, dtype=np.int64)

    def update(self, counts: Array, sums: Array) -> NDArray[np.int64]:
        """Fold in sums [blocks, fields] over as many samples; the blocks that had any."""
        sound = (counts >= 1) & (counts <= LARGEST_SUM) & ((sums >= 0) & (sums <= LARGEST_SUM)).all(axis=1)
        for block in np.flatnonzero(sound):
            self.updates[block] += 1
            weight = 1 / min(int(self.updates[block]), self._memory)
            old = self.values[block] if self.updates[block] > 1 else 0.0
            self.values[block] = (1 - weight) * old + weight * sums[block] / counts[block]
        return np.flatnonzero(sound)

    def plain(self) -> list[list[float | None]]:
        """By block: the updates, then the values, None for what is not known."""
        rows = zip(self.updates.tolist(), self.values.tolist(), strict=True)
        return [[count, *(None if math.isnan(value) else value for value in values)] for count, values in rows]

    def restore(self, rows: Sequence[Sequence[float | None]]) -> None:
        """What ``plain`` gave."""
        for block, (count, *values) in enumerate(rows):
            self.updates[block] = count or 0
            self.values[block] = [math.nan if value is None else value for value in values]


def _shared_out(weights: Array) -> Array:
    shares: Array = weights / weights.sum()
    return shares


def _change(measured: Array, expected: Array) -> Array:
    """Logarithms; 0 where nothing was known."""
    known = (expected > 0) & (measured > 0)
    ratio = np.divide(measured, expected, out=np.ones_like(measured), where=known)
    change: Array = np.log(np.clip(ratio, 1 / _LARGEST_RISE, _LARGEST_RISE))
    return change


def _infinite_where_unknown(errors: Array) -> Array:
    return np.where(np.isnan(errors), math.inf, errors)
