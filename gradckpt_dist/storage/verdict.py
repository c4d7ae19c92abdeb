"""How a variant of a compiled block compares with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gradckpt_dist.storage.direct import same_bits


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a variant compares with the block as the user compiled it.

    ``exact``: outputs, gradients, buffers and what is drawn next are the same, bit for bit. ``relative_error``: of all
    outputs and gradients together; infinite if the rest is not the same. ``held_bytes``: what its forward saves but for
    parameters; ``largest_bytes``: the most that one of these takes; ``input_bytes``: what the block was given. Each
    storage counts once.
    """

    exact: bool
    relative_error: float
    held_bytes: int
    largest_bytes: int
    input_bytes: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one forward and backward come to.

    ``values``: outputs and gradients, None where there is none; ``states``: buffers, and what is drawn next.
    """

    values: tuple[Tensor | None, ...]
    states: tuple[Tensor, ...]

    def equals(self, other: Outcome) -> bool:
        """Bit for bit."""
        return _equal(self.values, other.values) and _equal(self.states, other.states)

    def relative_error(self, exact: Outcome) -> float:
        """Of all values together; infinite, or NaN, where states differ or a value is missing or not finite."""
        missing, missing_there = ([value is None for value in one.values] for one in (self, exact))
        if missing != missing_there or not _equal(self.states, exact.states):
            return math.inf
        difference = size = 0.0
        for one, other in zip(self.values, exact.values, strict=True):
            if one is not None and other is not None:
                difference += float((one.float() - other.float()).square().sum())
                size += float(other.float().square().sum())
        return math.sqrt(difference / size) if size else math.inf


def _equal(ones: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    return len(ones) == len(others) and all(map(_are_same, ones, others))


def _are_same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and same_bits(one, other))
