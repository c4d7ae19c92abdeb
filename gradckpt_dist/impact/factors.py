"""What probes find, taken apart: what all blocks of a kind share, what a storage adds, what is a block's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]

LEVEL_DRIFT, OFFSET_DRIFT, FACTOR_DRIFT = 0.3, 0.05, 0.1
"""Variance that a window adds to what is known of each part, relative to that of one probe."""
FACTOR_VARIANCE = 4.0
"""Of the factors of a kind's blocks before any was probed, relative to that of one probe."""
_UNKNOWN = 1e6


class ErrorFactors:
    """Squared errors [blocks, storages, fields] as products: exp(level(kind) + offset(kind, storage) + factor(block)).

    Each part follows the probes by a Kalman filter (Kalman 1960) of its own, the other parts given: level, offset and
    factor in turn take of a probe's surprise the share (own variance) / (own variance + the others' + the probe's), and
    drift meanwhile. So one probe teaches about its block under any storage, and about its kind; there is no matrix of
    covariances. Only ratios of variances matter; fields are apart from each other. Zeros teach nothing but that there
    is nothing to be wrong.
    """

    def __init__(self, kinds: Sequence[int], storages: Sequence[str], fields: int) -> None:
        self._kinds = np.array(kinds, dtype=np.int64)
        self._storages = tuple(storages)
        self._fields = fields
        self._count = int(self._kinds.max(initial=-1)) + 1
        self._levels = _Part(self._count, fields, _UNKNOWN, LEVEL_DRIFT)
        self._offsets = _Part(self._count * len(self._storages), fields, _UNKNOWN, OFFSET_DRIFT)
        self._factors = _Part(len(self._kinds), fields, FACTOR_VARIANCE, FACTOR_DRIFT)
        self.probes: Index = np.zeros((len(self._kinds), len(self._storages)), dtype=np.int64)
        """[blocks, storages]: the windows that held a probe."""

    def update(self, blocks: Index, storages: Index, squares: Array) -> None:
        """Fold a window in: of each probe its block, its storage and its squared errors [probes, fields]."""
        parts = (self._levels, self._offsets, self._factors)
        for part in parts:
            part.drift()
        self.probes[blocks, storages] += 1
        kinds = self._kinds[blocks]
        places = (kinds, storages * self._count + kinds, blocks)
        usable = squares > 0
        logs = np.log(np.where(usable, squares, 1.0))
        for own in range(len(parts)):
            others = [(part, place) for part, place in zip(parts, places, strict=True) if part is not parts[own]]
            rest = sum(part.values[place] for part, place in others)
            noise = 1.0 + sum(np.minimum(part.variances[place], FACTOR_VARIANCE) for part, place in others)
            parts[own].fold(places[own], logs - rest, usable / noise)

    def of_blocks(self) -> Array:
        """[blocks, storages, fields]: NaN where the storage was not probed on the block's kind.

        A block that was not probed yet takes the largest factor of its kind.
        """
        largest = np.full((self._count, self._fields), -np.inf)
        np.maximum.at(largest, self._kinds, np.where(self._factors.known, self._factors.values, -np.inf))
        largest = np.where(np.isfinite(largest), largest, 0.0)
        return self._with(np.where(self._factors.known, self._factors.values, largest[self._kinds]))

    def of_kinds(self) -> Array:
        """The same with the mean over the probed blocks of its kind in place of the block's own."""
        total, count = (np.zeros((self._count, self._fields)) for _ in range(2))
        np.add.at(total, self._kinds, np.where(self._factors.known, np.exp(self._factors.values), 0.0))
        np.add.at(count, self._kinds, self._factors.known)
        mean = np.where(count > 0, total / np.maximum(count, 1), 1.0)
        return self._with(np.log(mean)[self._kinds])

    def variances(self) -> Array:
        """[blocks, storages, fields]: of the logarithm of what a probe will find, that of probes in themselves being 1.

        It grows from window to window, and falls with each probe.
        """
        kinds, storages = self._kinds[:, None], np.arange(len(self._storages))[None, :]
        parts = (
            self._levels.variances[kinds],
            self._offsets.variances[storages * self._count + kinds],
            self._factors.variances[:, None, :],
        )
        level, offset, factor = (np.minimum(part, FACTOR_VARIANCE) for part in parts)
        result: Array = 1.0 + level + offset + factor
        return result

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "levels": self._levels.plain(),
            "offsets": {name: self._offsets.plain(self._rows(name)) for name in self._storages},
            "factors": self._factors.plain(),
            "probes": {name: self.probes[:, column].tolist() for column, name in enumerate(self._storages)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``; a storage that it does not have is probed anew."""
        self._levels.restore(state["levels"])
        self._factors.restore(state["factors"])
        for column, name in enumerate(self._storages):
            if name in state["offsets"]:
                self._offsets.restore(state["offsets"][name], self._rows(name))
                self.probes[:, column] = state["probes"][name]

    def _rows(self, storage: str) -> slice:
        start = self._storages.index(storage) * self._count
        return slice(start, start + self._count)

    def _with(self, factors: Array) -> Array:
        kinds, storages = self._kinds[:, None], np.arange(len(self._storages))[None, :]
        logs = self._levels.values[kinds] + self._offsets.values[storages * self._count + kinds] + factors[:, None, :]
        squares = np.where(self._levels.known[kinds], np.exp(logs), 0.0)
        probed = np.zeros((self._count, len(self._storages)), dtype=bool)
        np.logical_or.at(probed, self._kinds, self.probes > 0)
        result: Array = np.where(probed[self._kinds][:, :, None], squares, np.nan)
        return result


class _Part:
    """Independent scalars [places, fields], each with the variance of what is known of it."""

    def __init__(self, places: int, fields: int, variance: float, drift: float) -> None:
        self._drift = drift
        self.values: Array = np.zeros((places, fields))
        self.variances: Array = np.full((places, fields), variance)
        self.known: NDArray[np.bool_] = np.zeros((places, fields), dtype=bool)

    def drift(self) -> None:
        self.variances += self._drift

    def fold(self, places: Index, residuals: Array, precisions: Array) -> None:
        """What measurements [n, fields] at these places leave for this part, and how precise each is; 0: not at all."""
        surprise, precision = np.zeros_like(self.values), np.zeros_like(self.values)
        np.add.at(surprise, places, precisions * (residuals - self.values[places]))
        np.add.at(precision, places, precisions)
        self.variances /= 1.0 + self.variances * precision
        self.values += self.variances * surprise
        self.known |= precision > 0

    def plain(self, rows: slice = slice(None)) -> list[list[list[float]]]:
        """Values, variances, and whether known."""
        return [array[rows].tolist() for array in (self.values, self.variances, self.known)]

    def restore(self, plain: Sequence[Any], rows: slice = slice(None)) -> None:
        """What ``plain`` gave."""
        self.values[rows], self.variances[rows], self.known[rows] = (np.array(array) for array in plain)
