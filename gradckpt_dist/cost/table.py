"""The costs of every storage on every block."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradckpt_dist.errors import GradckptError

Choice = NDArray[np.int64]
"""Int64 [blocks]: the column of the table that each block uses."""

_MOST_BYTES = 2**53  # up to here float64 counts bytes exactly


@dataclass(frozen=True, kw_only=True, eq=False)
class CostTable:
    """Costs by block, in forward order, and storage; each array is [blocks, storages].

    ``extra_seconds`` is against ``keep``, per step; infinite where a storage does not serve a block. ``held_bytes`` are
    held from a block's forward to its backward, ``working_set_bytes`` come on top while it is in forward or backward.
    ``squared_error`` is the squared relative error of the whole gradient that this block's storage causes; these add
    up. ``fixed_bytes`` is what the rank holds besides. ``held_bytes`` are those of ``forwards_in_flight`` forwards
    together, as many as wait for their backward at once: 1 but for pipelines.

    Raises:
        GradckptError: arrays of other shapes, a block without a storage, a value that is negative or not finite, or
            more than 2**53 bytes in all.
    """

    storages: tuple[str, ...]
    extra_seconds: NDArray[np.float64]
    held_bytes: NDArray[np.int64]
    working_set_bytes: NDArray[np.int64]
    squared_error: NDArray[np.float64]
    fixed_bytes: int = 0
    forwards_in_flight: int = 1

    def __post_init__(self) -> None:
        shape = (len(self.extra_seconds), len(self.storages))
        for name, kind in _ARRAYS.items():
            array = np.asarray(getattr(self, name), dtype=kind)
            if array.shape != shape or 0 in shape:
                raise GradckptError(
                    f"costs: {name} is {list(array.shape)}; give [blocks, storages], here {list(shape)}"
                )
            object.__setattr__(self, name, array)
        self._check_values()

    @property
    def blocks(self) -> int:
        return len(self.extra_seconds)

    @property
    def serves(self) -> NDArray[np.bool_]:
        """[blocks, storages]: whether the storage serves the block."""
        return np.isfinite(self.extra_seconds)

    def beside(self, *, fixed_bytes: int, loss_bytes: int) -> CostTable:
        """The same costs where the rank holds ``fixed_bytes`` besides, and ``loss_bytes`` more while it is in the loss.

        All that blocks hold is there then, as it is when the last block is in backward: its working set is at least
        ``loss_bytes``.
        """
        working = self.working_set_bytes.copy()
        working[-1] = np.maximum(working[-1], loss_bytes)
        return dataclasses.replace(self, fixed_bytes=fixed_bytes, working_set_bytes=working)

    def choice(self, storages: Sequence[str]) -> Choice:
        """The columns of these storages, one per block.

        Raises:
            GradckptError: wrong length, or a storage that is not in the table.
        """
        if len(storages) != self.blocks:
            raise GradckptError(f"costs: {len(storages)} storages for {self.blocks} blocks; give one per block")
        columns = {name: column for column, name in enumerate(self.storages)}
        unknown = sorted(set(storages) - set(columns))
        if unknown:
            raise GradckptError(f"costs: {', '.join(unknown)} not in the table; it has {', '.join(self.storages)}")
        return np.array([columns[name] for name in storages], dtype=np.int64)

    def names(self, choice: Choice) -> tuple[str, ...]:
        """The storages of these columns, one per block."""
        return tuple(self.storages[column] for column in choice)

    def seconds_of(self, choice: Choice) -> float:
        """Extra seconds of a step; infinite if a storage does not serve its block."""
        return math.fsum(self._taken(self.extra_seconds, choice))

    def squared_error_of(self, choice: Choice) -> float:
        """Squared relative error of the whole gradient."""
        return math.fsum(self._taken(self.squared_error, choice))

    def held_bytes_of(self, choice: Choice) -> int:
        """Bytes held by all blocks after forward."""
        return int(self._taken(self.held_bytes, choice).sum())

    def peak_bytes_of(self, choice: Choice) -> int:
        """The most that the rank holds in backward: fixed + max over i of (held by blocks 0..i + working set of i).

        Backward runs from the last block to the first, so that what later blocks held is free by then, but for what
        they hold for the other forwards in flight.
        """
        held = np.cumsum(self._taken(self.held_bytes, choice))
        later = held[-1] - held
        held += later - later // self.forwards_in_flight
        return self.fixed_bytes + int((held + self._taken(self.working_set_bytes, choice)).max())

    def _taken(self, array: NDArray[Any], choice: Choice) -> NDArray[Any]:
        return np.take_along_axis(array, choice[:, None], axis=1)[:, 0]

    def _check_values(self) -> None:
        if not self.serves.any(axis=1).all():
            block = int(np.argmin(self.serves.any(axis=1)))
            raise GradckptError(f"costs: no storage serves block {block}; give finite extra_seconds for one")
        if np.isnan(self.extra_seconds).any() or (self.extra_seconds == -np.inf).any():
            raise GradckptError("costs: extra_seconds holds NaN or -inf; give seconds, or inf for 'does not serve'")
        for name in ("held_bytes", "working_set_bytes", "squared_error"):
            values = getattr(self, name)[self.serves]
            if not (np.isfinite(values) & (values >= 0)).all():
                raise GradckptError(f"costs: {name} holds a value that is negative or not finite")
        most = self.held_bytes.max(axis=1).sum(dtype=float) + float(self.working_set_bytes.max()) + self.fixed_bytes
        if self.fixed_bytes < 0 or most > _MOST_BYTES:
            raise GradckptError(f"costs: {most:.3g} bytes in all, {self.fixed_bytes} fixed; give 0 to 2**53")


_ARRAYS = {
    "extra_seconds": np.float64,
    "held_bytes": np.int64,
    "working_set_bytes": np.int64,
    "squared_error": np.float64,
}
