"""How much of a tolerance may be planned: less, the further probes have been from what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DEVIATIONS = 3.0
"""A plan has to keep the tolerance if errors come out so many times further above the expected than they use to."""
FIRST_SHARE = 0.25
FIRST_VARIANCE = 10.0
FIRST_WEIGHT = 0.1
"""What may be planned before probes have met expectations; the variance due then; how much it weighs, in probes."""
MEMORY = 8
"""A probe weighs at least 1 / MEMORY."""
MOST = 0.95
"""What may be planned at most: errors of blocks add up to that of the mask within a few percent."""


class Margin:
    """Follows how far probes are from what plans went by: the mean of log(measured / expected)^2 of squared errors.

    Each is taken relative to the variance that is due by when and where there were probes before (``ErrorFactors``), so
    that it is their common scale that is learned. At first it is such that ``FIRST_SHARE`` may be planned.
    """

    def __init__(self) -> None:
        self._scale = (2 * math.log(FIRST_SHARE) / DEVIATIONS) ** 2 / FIRST_VARIANCE
        self._probes = 0

    def share(self, variance: float) -> float:
        """Of a tolerance, what the expected error of a plan may be, ``variance`` being due."""
        return min(MOST, math.exp(-DEVIATIONS * math.sqrt(self._scale * variance) / 2))

    def update(self, measured: Array, expected: Array, variances: Array) -> None:
        """Squared errors that probes of one window found, and those expected of them; infinite ones teach nothing."""
        usable = (measured > 0) & (expected > 0) & np.isfinite(measured) & np.isfinite(expected)
        surprises = np.log(measured[usable] / expected[usable]) ** 2 / variances[usable]
        for surprise in surprises.tolist():
            self._probes += 1
            weight = 1 / min(self._probes + FIRST_WEIGHT, MEMORY)
            self._scale += weight * (surprise - self._scale)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"scale": self._scale, "probes": self._probes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._scale, self._probes = state["scale"], state["probes"]
