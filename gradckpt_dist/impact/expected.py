"""From what was gathered to the expected error of the whole gradient, by block and lossy storage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradckpt_dist.impact.base import LARGEST_SUM
from gradckpt_dist.impact.factors import ErrorFactors
from gradckpt_dist.impact.influence import first_order
from gradckpt_dist.impact.margin import FIRST_SHARE, Margin
from gradckpt_dist.impact.probe import block_fields

Array = NDArray[np.float64]

MEMORY = 2
"""A new window weighs at least 1 / MEMORY against the older ones, in how the gradient is shared out."""

_FACTORED = [0, 2, 3]
"""Of a probe's errors, those that are followed: own, e^2 and f^2."""


class ExpectedErrors:
    """Folds probes in at each decision, the same on all ranks. ``kinds`` is by block, the number of its kind.

    The squared relative error of the whole gradient, if storage s holds block i's activations, is

        err^2(i, s) = (own(i, s) q_i + passed(i, s) sum_{j < i} q_j) / sum_j q_j

    with q_j the squared norm of the gradient of block j, or of what stands before all blocks or after: what block i
    hands down, relatively wrong by ``passed``, is taken to make all earlier gradients wrong by as much. Errors of
    several blocks add up, being independent. Where ``GradientWeights`` finds no gradients, q comes from the probes, and
    what is outside of blocks is left out, which makes errors look larger.

    The metrics differ in where ``own`` and ``passed`` come from:

    ``influence``  first order: e^2(kind, s) / c_i, and f^2(kind, s) b_i passed, with c and b as gathered since, and the
                   constants e^2 and f^2 from all probes of the kind
    ``probe``      the same with e^2(i, s) and f^2(i, s), which ``ErrorFactors`` makes of all probes of the block and
                   of its kind
    ``norm``       c^2(kind, s) from the kind's probes; q is I_i^2, and nothing is passed: c_s^2 times its share

    A block that was not probed yet takes the largest value of its kind; a kind that was not, infinity.
    ``margin`` says how far probes were from what ``metric`` expected of them at the decision before.
    """

    def __init__(self, kinds: Sequence[int], lossy: Sequence[str], metric: str = "probe") -> None:
        blocks = len(kinds)
        self.lossy = tuple(lossy)
        self.margin = Margin()
        self.dropped_probes = 0
        self._metric = metric
        self._kinds = np.array(kinds)
        self._gradients = _Means(blocks, 2, MEMORY)
        self._weights = _Means(1, blocks + 2, MEMORY)
        self._factors = ErrorFactors(kinds, lossy, fields=len(_FACTORED))
        self._expected: Array = np.full((blocks, len(lossy)), math.inf)

    def update(self, sums: Sequence[float], weights: Sequence[float] = (), values: Sequence[float] = ()) -> None:
        """Fold in a window as ``ProbeStatistics`` and ``GradientWeights`` give it, summed over ranks.

        ``values``: as ``squared`` takes them, this window included.
        """
        if weights and all(0 <= value <= LARGEST_SUM for value in weights) and sum(weights[:-1]) > 0:
            *squares, steps = weights
            self._weights.update(np.array([steps]), steps * _shared_out(np.array([squares])))
        *rows, dropped = sums
        self.dropped_probes += int(dropped) if 0 < dropped <= LARGEST_SUM else 0
        table = np.array(rows, dtype=np.float64).reshape(len(self._kinds), block_fields(len(self.lossy)))
        self._gradients.update(table[:, 0], table[:, 1:3])
        self._update_factors(table[:, 3:].reshape(len(self._kinds), len(self.lossy), 5), values)
        self._expected = self.squared(self._metric, values)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "gradients": self._gradients.plain(),
            "weights": self._weights.plain(),
            "factors": self._factors.state_dict(),
            "margin": self.margin.state_dict(),
            "dropped_probes": self.dropped_probes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``; a storage that it does not have is probed anew."""
        self._gradients.restore(state["gradients"])
        self._weights.restore(state["weights"])
        self._factors.load_state_dict(state["factors"])
        self.margin.load_state_dict(state["margin"])
        self.dropped_probes = state["dropped_probes"]

    def probes(self) -> NDArray[np.int64]:
        """[blocks, lossy]: the windows that held a probe."""
        return self._factors.probes.copy()

    def planned_share(self) -> float:
        """Of a tolerance, what the expected error of a plan may be, so that the true one stays below it."""
        known = self._factors.probes.any(axis=0)
        if not known.any():
            return FIRST_SHARE
        return self.margin.share(float(self._factors.variances().mean(axis=(0, 2))[known].max()))

    def squared(self, metric: str, values: Sequence[float]) -> Array:
        """[blocks, lossy]; ``values`` are running means of ``Impact.step_values``, flat, and empty before the first."""
        blocks = len(self._kinds)
        gathered = np.array(values, dtype=np.float64).reshape(-1, blocks)
        if not gathered.size or not self.lossy:
            return np.full((blocks, len(self.lossy)), math.inf)
        factors = self._factors.of_blocks() if metric == "probe" else self._factors.of_kinds()
        own, e_squared, f_squared = np.moveaxis(factors, 2, 0)
        if metric == "norm":
            return _infinite_where_unknown(own * _shared_out(gathered[0])[:, None])
        signal, coherence, branch = (part.numpy() for part in first_order(torch.from_numpy(gathered)))
        weights = self._shares(signal, metric == "influence")
        here, earlier = weights[1:-1] / coherence, np.cumsum(weights)[:-2] * branch
        return _infinite_where_unknown(e_squared * here[:, None] + f_squared * earlier[:, None])

    def _update_factors(self, table: Array, values: Sequence[float]) -> None:
        """``table`` [blocks, lossy, 5]: probes, and sums over them as ``ProbeStatistics._row`` has them."""
        counts = table[:, :, 0]
        sound = (counts >= 1) & ((table >= 0) & (table <= LARGEST_SUM)).all(axis=2)
        blocks, storages = np.nonzero(sound)
        means = table[blocks, storages, 1:] / counts[blocks, storages, None]
        due = self._factors.variances().mean(axis=2)[blocks, storages]
        self._factors.update(blocks, storages, means[:, _FACTORED])
        if values and len(blocks):
            signal = first_order(torch.from_numpy(np.array(values).reshape(-1, len(self._kinds))))[0].numpy()
            weights = self._shares(signal, by_kind=False)
            found = means[:, 0] * weights[1:-1][blocks] + means[:, 1] * np.cumsum(weights)[:-2][blocks]
            self.margin.update(found, self._expected[blocks, storages], due)

    def _shares(self, signal: Array, by_kind: bool) -> Array:
        """Of the whole gradient's squared norm: before all blocks, by block, after; the sum is 1."""
        if self._weights.updates[0]:
            weights: Array = self._weights.values[0]
            return _shared_out(weights)
        gain = self._gradients.values[:, 1]
        own = (self._mean_of_kind(gain) if by_kind else self._most_of_kind(gain)) * signal
        return _shared_out(np.concatenate(([0.0], own, [0.0])))

    def _mean_of_kind(self, column: Array) -> Array:
        """[blocks]: over the probed blocks of the kind; NaN where there is none."""
        return self._of_kind(column, lambda known: float(known.mean()))

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

    def update(self, counts: Array, sums: Array) -> None:
        """Fold in sums [blocks, fields] over as many samples."""
        sound = (counts >= 1) & (counts <= LARGEST_SUM) & ((sums >= 0) & (sums <= LARGEST_SUM)).all(axis=1)
        self.updates += sound
        updates = self.updates[sound, None]
        weight = 1 / np.minimum(updates, self._memory)
        old = np.where(updates > 1, self.values[sound], 0.0)
        self.values[sound] = (1 - weight) * old + weight * sums[sound] / counts[sound, None]

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


def _infinite_where_unknown(errors: Array) -> Array:
    return np.where(np.isnan(errors), math.inf, errors)
