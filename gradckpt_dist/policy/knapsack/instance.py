"""A cost table under limits, as the solver's parts see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradckpt_dist.cost import CostTable
from gradckpt_dist.cost.table import Choice

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

TOLERANCE_UNITS = 2**40


@dataclass(frozen=True, kw_only=True, eq=False)
class Instance:
    """Arrays [storages, blocks]; ``seconds`` is infinite where an option is not allowed or cannot be in a best plan.

    ``capacity`` is in bytes for the blocks alone. ``error`` is squared, in whole units of 2**-40 of the limit, so that
    sums are exact and the same in any order.
    """

    seconds: Floats
    held: Ints
    working: Ints
    error: Ints
    capacity: int
    tolerance: int = TOLERANCE_UNITS

    @property
    def blocks(self) -> int:
        return int(self.seconds.shape[1])

    @property
    def allowed(self) -> Bools:
        return np.isfinite(self.seconds)

    def usage(self, choice: Choice) -> Ints:
        """Bytes in the backward of each block, [blocks]; each at most ``capacity`` in a plan that fits."""
        usage: Ints = np.cumsum(take(self.held, choice)) + take(self.working, choice)
        return usage

    def without(self, excluded: Bools) -> Instance:
        """The same with fewer options."""
        return Instance(
            seconds=np.where(excluded, np.inf, self.seconds),
            held=self.held,
            working=self.working,
            error=self.error,
            capacity=self.capacity,
            tolerance=self.tolerance,
        )

    def fits(self, choice: Choice) -> bool:
        """Whether a choice keeps to both limits."""
        return int(self.usage(choice).max()) <= self.capacity and int(take(self.error, choice).sum()) <= self.tolerance


def create_instance(costs: CostTable, peak_bytes: int, squared_error: float, *, rounded_up: bool) -> Instance:
    """All options that serve their block and stay within the tolerance on their own.

    With errors rounded up, what fits here keeps to the tolerance. Rounded down, what keeps to the tolerance fits here.
    """
    shares = np.zeros(costs.squared_error.T.shape)
    if squared_error > 0:
        shares = np.minimum(costs.squared_error.T / squared_error, 2.0) * TOLERANCE_UNITS
    return Instance(
        seconds=np.where(squared_error >= costs.squared_error.T, costs.extra_seconds.T, np.inf),
        held=np.ascontiguousarray(costs.held_bytes.T),
        working=np.ascontiguousarray(costs.working_set_bytes.T),
        error=(np.floor(shares) + (rounded_up & (shares > 0))).astype(np.int64),
        capacity=peak_bytes - costs.fixed_bytes,
    )


def take(array: NDArray[Any], choice: Choice) -> NDArray[Any]:
    """The entries of the chosen options, [blocks]."""
    taken: NDArray[Any] = array[choice, np.arange(array.shape[1])]
    return taken


def dominated(instance: Instance) -> Bools:
    """Options that another of the same block is never worse than; of equal ones the first stays."""
    result = np.zeros(instance.seconds.shape, dtype=bool)
    arrays = (instance.seconds, instance.held, instance.working, instance.error)
    for one in range(len(result)):
        for other in range(len(result)):
            if one != other:
                better = ~result[other] & instance.allowed[other]
                for array in arrays:
                    better &= array[other] <= array[one]
                if one < other:
                    better &= np.any([array[other] < array[one] for array in arrays], axis=0)
                result[one] |= better
    return result
