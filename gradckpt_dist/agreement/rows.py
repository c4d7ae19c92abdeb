"""Sending some rows of a table in place of all of them, where every rank knows which."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class SparseRows:
    """A vector with a table [rows, width] in it from ``start`` on, of which at most ``capacity`` rows travel.

    The packed vector's length does not depend on which rows these are: two ranks that take different ones, as they are
    at different steps, still send vectors of one length, and the agreement finds out.
    """

    def __init__(self, *, start: int, rows: int, width: int, capacity: int) -> None:
        self._start = start
        self._rows = rows
        self._width = width
        self.capacity = min(capacity, rows)

    def pack(self, vector: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """``vector`` with only these rows of its table, the last ``capacity`` of them, and zeros up to as many."""
        end = self._start + self._rows * self._width
        packed = vector.new_zeros(self.capacity, self._width)
        taken = self._taken(rows)
        if taken:
            table = vector[self._start : end].view(self._rows, self._width)
            index = torch.tensor(taken, device="cpu").to(vector.device, non_blocking=True)
            packed[: len(taken)] = table.index_select(0, index)
        return torch.cat([vector[: self._start], packed.flatten(), vector[end:]])

    def unpack(self, packed: Sequence[float], rows: Sequence[int]) -> list[float]:
        """The whole vector; rows that did not travel are 0."""
        table = [0.0] * (self._rows * self._width)
        for position, row in enumerate(self._taken(rows)):
            start = self._start + position * self._width
            table[row * self._width : (row + 1) * self._width] = packed[start : start + self._width]
        return [*packed[: self._start], *table, *packed[self._start + self.capacity * self._width :]]

    def _taken(self, rows: Sequence[int]) -> list[int]:
        return list(rows)[-self.capacity :] if self.capacity else []
