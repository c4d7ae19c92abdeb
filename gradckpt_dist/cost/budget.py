"""From a memory budget and a gradient tolerance to limits in bytes and squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from gradckpt_dist.config import Config
from gradckpt_dist.config_checks import byte_count
from gradckpt_dist.cost.limits import Limits
from gradckpt_dist.cost.table import CostTable


@dataclass(frozen=True, kw_only=True)
class Budget:
    """``Config.memory_budget``, ``reserve`` and ``gradient_tolerance``."""

    memory_budget: float | str
    reserve: float | str
    gradient_tolerance: float

    @classmethod
    def of(cls, config: Config) -> Self:
        """What the configuration says."""
        return cls(
            memory_budget=config.memory_budget,
            reserve=config.reserve,
            gradient_tolerance=config.gradient_tolerance,
        )

    @property
    def is_fraction(self) -> bool:
        """Whether the limit is relative to what blocks hold, from full recompute to keep, rather than in bytes."""
        return not isinstance(self.memory_budget, str)

    def limits(self, costs: CostTable, available_bytes: int, planned_share: float = 1.0) -> Limits:
        """Limits of a rank; ``available_bytes`` is what the tightest rank may use in all.

        A fraction lies between the peaks of full recompute and of keep, and needs no reserve. ``planned_share`` is what
        a plan may use of the gradient tolerance, by prediction.
        """
        squared_error = (planned_share * self.gradient_tolerance) ** 2
        if isinstance(self.memory_budget, str):
            return Limits(
                peak_bytes=self.limit_bytes(available_bytes),
                squared_error=squared_error,
                reserve_bytes=self.reserve_bytes(available_bytes),
            )
        least, most = (costs.peak_bytes_of(costs.choice((name,) * costs.blocks)) for name in ("recompute", "keep"))
        limit = least + int(self.memory_budget * max(0, most - least))
        return Limits(peak_bytes=limit, squared_error=squared_error)

    def limit_bytes(self, available_bytes: int) -> int:
        """The peak that a rank's process may have, the reserve included; for a budget in bytes, or ``auto``."""
        return available_bytes if self.memory_budget == "auto" else byte_count(self.memory_budget)

    def reserve_bytes(self, available_bytes: int) -> int:
        """What is to stay free of it."""
        if isinstance(self.reserve, str):
            return byte_count(self.reserve)
        return int(self.reserve * self.limit_bytes(available_bytes))
