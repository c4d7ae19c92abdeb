"""Costs that the ranks have agreed on, scaled to the batch at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradckpt_dist.cost.table import CostTable

Array = NDArray[np.float64]

UNKNOWN = -1e300
"""Loses against every measured number in a MAX over ranks, and is finite."""

FIELDS = 5
"""Numbers by kind and storage: seconds, extra seconds, held bytes, working-set bytes per token, whether refused."""

BLOCK_FIELDS = 3
"""Numbers by block: tokens of a step, of the forwards that are in flight at once, of the largest call."""

MOST_BYTES = 1 << 50
"""More than any block holds; a larger number comes from a faulty rank, and a thousand of these can be added up."""

LEAST_EXTRA = 0.01
"""What a storage is taken to add at least, as a share of what its block takes under ``keep``."""

_SECONDS_PER_BYTE = 1e-9
"""What recomputing a byte takes where nothing is known: enough to rank blocks by."""


@dataclass(frozen=True, kw_only=True)
class StorageCost:
    """One storage on one kind of block, per token; the most over ranks.

    ``seconds`` are those of forward and backward, ``extra_seconds`` what exceeds ``keep`` in the same probe.
    None: not measured yet. ``refused``: the storage cannot serve this kind.
    """

    seconds: float | None = None
    extra_seconds: float | None = None
    held_bytes: float | None = None
    working_set_bytes: float | None = None
    refused: bool = False


class Costs:
    """What the ranks have agreed on: the most over them."""

    def __init__(self, kinds: Sequence[int], storages: Sequence[str]) -> None:
        self._kinds = tuple(kinds)
        self.storages = tuple(storages)
        self._costs = {(kind, name): StorageCost() for kind in range(max(kinds) + 1) for name in storages}
        blocks = len(self._kinds)
        self.step_tokens = self.forward_tokens = self.call_tokens = (0.0,) * blocks

    @property
    def size(self) -> int:
        """Length of what ``CostBook.take_maxima`` gives."""
        return BLOCK_FIELDS * len(self._kinds) + FIELDS * len(self._costs)

    def update(self, maxima: Sequence[float]) -> None:
        """Fold in what all ranks sent; a number that a faulty rank made non-finite or absurd is left out or cut off."""
        blocks = len(self._kinds)
        step, forward, call = (maxima[i * blocks : (i + 1) * blocks] for i in range(BLOCK_FIELDS))
        self.step_tokens = _latest(self.step_tokens, step)
        self.forward_tokens = _latest(self.forward_tokens, forward)
        self.call_tokens = _latest(self.call_tokens, call)
        start = BLOCK_FIELDS * blocks
        for number, key in enumerate(self._costs):
            values = maxima[start + number * FIELDS : start + (number + 1) * FIELDS]
            self._costs[key] = _folded(self._costs[key], values)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        costs = [[kind, name, asdict(cost)] for (kind, name), cost in self._costs.items()]
        return {"costs": costs, "tokens": [list(self.step_tokens), list(self.forward_tokens), list(self.call_tokens)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what is of kinds and storages that are here too; the rest is measured again."""
        for kind, name, cost in state["costs"]:
            if (kind, name) in self._costs:
                self._costs[kind, name] = StorageCost(**cost)
        if all(len(tokens) == len(self._kinds) for tokens in state["tokens"]):
            self.step_tokens, self.forward_tokens, self.call_tokens = map(tuple, state["tokens"])

    def of(self, index: int, storage: str) -> StorageCost:
        """Per token, of the block at ``index``."""
        return self._costs[self._kinds[index], storage]

    def extra_seconds(self, index: int, storage: str) -> float:
        """Per step, against ``keep``; infinite where the storage is refused or was not measured yet.

        Any other storage does what ``keep`` does and more: below ``LEAST_EXTRA`` of its seconds, noise is at work.
        """
        cost, keep = self.of(index, storage), self.of(index, "keep")
        if cost.refused or cost.extra_seconds is None or cost.held_bytes is None or keep.seconds is None:
            return math.inf
        least = 0.0 if storage == "keep" else LEAST_EXTRA * keep.seconds
        return max(cost.extra_seconds, least) * self.step_tokens[index]

    def held_bytes(self, index: int, storage: str) -> int:
        """From the block's forward to its backward, by all forwards in flight at once; 0 while not measured."""
        return _whole_bytes(self.of(index, storage).held_bytes, self.forward_tokens[index])

    def working_set_bytes(self, index: int, storage: str) -> int:
        """On top of what is held, gradients on their way included, in a call's forward or backward; 0 while unknown."""
        return _whole_bytes(self.of(index, storage).working_set_bytes, self.call_tokens[index])

    def table(
        self,
        squared_errors: Mapping[str, Sequence[float]],
        measured_bytes: Mapping[str, Sequence[int]],
        fixed_bytes: int = 0,
    ) -> CostTable:
        """What a planner reads, of the storages ``keep`` and ``recompute`` and the others of this object.

        ``squared_errors``: by lossy storage and block, infinite where unknown; a storage that is not there is exact.
        ``measured_bytes``: as ``Knowledge.stored_bytes``, what blocks that cannot be probed hold under ``keep`` and
        ``recompute``, the only storages that serve them; recomputing them is taken to cost as much for its bytes as it
        does elsewhere.
        """
        seconds, held, working = self._measured()
        errors = np.zeros_like(seconds)
        for column, name in enumerate(self.storages):
            errors[:, column] = squared_errors.get(name, 0.0)
            unserved = np.flatnonzero(np.isinf(seconds[:, column]))
            if name in ("keep", "recompute") and len(unserved) and measured_bytes:
                keep, stored = (np.array(measured_bytes[which])[unserved] for which in ("keep", name))
                seconds[unserved, column] = (keep - stored) * self._seconds_per_byte()
                held[unserved, column], working[unserved, column] = stored, keep - stored
        seconds[~np.isfinite(errors)] = math.inf
        serves = np.isfinite(seconds)
        return CostTable(
            storages=self.storages,
            extra_seconds=seconds,
            held_bytes=held.astype(np.int64),
            working_set_bytes=np.maximum(working, 0).astype(np.int64),
            squared_error=np.where(serves, errors, 0.0),
            fixed_bytes=fixed_bytes,
        )

    def _measured(self) -> Array:
        """[3, blocks, storages]: extra seconds, held and working-set bytes. Blocks of a kind and size are alike."""
        sizes = list(zip(self._kinds, self.step_tokens, self.forward_tokens, self.call_tokens, strict=True))
        examples = {size: index for index, size in enumerate(sizes)}
        places = {size: place for place, size in enumerate(examples)}
        of = (self.extra_seconds, self.held_bytes, self.working_set_bytes)
        found = [[[value(index, name) for name in self.storages] for index in examples.values()] for value in of]
        measured: Array = np.array(found, dtype=np.float64)[:, [places[size] for size in sizes]]
        return measured

    def _seconds_per_byte(self) -> float:
        known = [
            max(0.0, self.extra_seconds(index, "recompute")) / (self.held_bytes(index, "keep") or 1)
            for index in range(len(self._kinds))
            if math.isfinite(self.extra_seconds(index, "recompute"))
        ]
        return sum(known) / len(known) if known else _SECONDS_PER_BYTE

    def probe_bytes(self, index: int) -> int | None:
        """Activations that a probe of this block holds at once; its parameters' gradients come twice on top."""
        held = [
            _whole_bytes(cost.held_bytes + (cost.working_set_bytes or 0.0), self.call_tokens[index])
            for name in self.storages
            if (cost := self.of(index, name)).held_bytes is not None
        ]
        return max(held) if held else None


def _whole_bytes(per_token: float | None, tokens: float) -> int:
    return math.ceil(min(max(0.0, (per_token or 0.0) * tokens), MOST_BYTES))


def _latest(old: Sequence[float], new: Sequence[float]) -> tuple[float, ...]:
    return tuple(b if 0 < b <= MOST_BYTES else a for a, b in zip(old, new, strict=True))


def _folded(old: StorageCost, values: Sequence[float]) -> StorageCost:
    seconds, extra, held, working_set, refused = (
        value if abs(value) <= MOST_BYTES else None
        for value in values  # UNKNOWN is beyond, NaN is not within
    )
    return StorageCost(
        seconds=old.seconds if seconds is None else seconds,
        extra_seconds=old.extra_seconds if extra is None else extra,
        held_bytes=old.held_bytes if held is None else held,
        working_set_bytes=old.working_set_bytes if working_set is None else working_set,
        refused=old.refused or bool(refused),
    )
