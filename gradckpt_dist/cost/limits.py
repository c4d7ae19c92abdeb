"""What a plan may spend."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradckpt_dist.errors import GradckptError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a rank may hold, and the most that its gradients may be off.

    ``peak_bytes`` counts all that the rank holds, ``CostTable.fixed_bytes`` included; ``reserve_bytes`` of it are to
    stay free. ``squared_error`` is the most that may be predicted; at 0 only exact storages are left.

    Raises:
        GradckptError: a negative or non-finite limit.
    """

    peak_bytes: int
    squared_error: float = 0.0
    reserve_bytes: int = 0

    def __post_init__(self) -> None:
        given = (self.peak_bytes, self.squared_error, self.reserve_bytes)
        if not all(math.isfinite(value) and value >= 0 for value in given):
            raise GradckptError(f"{self}: limits are finite and not negative")

    @property
    def planned_bytes(self) -> int:
        """The peak that a plan may have: the limit less the reserve; negative where the reserve is larger."""
        return self.peak_bytes - self.reserve_bytes
