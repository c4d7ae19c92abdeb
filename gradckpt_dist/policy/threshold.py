"""``threshold``: the source idea, literally. C_i = 1 if I_i > theta."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gradckpt_dist.config import LOSSY_STORAGES, ThresholdConfig
from gradckpt_dist.policy.base import Evidence, Plan, Policy


class ThresholdPolicy(Policy):
    """Recompute the blocks above theta; those below get ``low_impact_storage``.

    theta is a number, a quantile of the impacts, or ``auto``: as high as ``memory_budget`` and the gradient tolerance
    allow, so that as few blocks as possible are recomputed.
    """

    name = "threshold"

    def __init__(self, config: ThresholdConfig, memory_budget: float | str, hysteresis: float) -> None:
        self._config = config
        self._memory_budget = memory_budget
        self._hysteresis = hysteresis

    def plan(self, evidence: Evidence) -> Plan:
        if not evidence.impacts:
            return Plan(storages=evidence.current.storages, theta=None, reason="unchanged: no rank has a sample")
        if self._config.quantile is not None:
            theta = _quantile(evidence.impacts, self._config.quantile)
            return self._above(theta, evidence.impacts, f"quantile {self._config.quantile:g} of the impacts")
        if not isinstance(self._config.value, str):
            return self._above(self._config.value, evidence.impacts, f"value {self._config.value:g}")
        return self._auto(evidence)

    def _above(self, theta: float, impacts: Sequence[float], reason: str) -> Plan:
        low = self._config.low_impact_storage
        storages = tuple("recompute" if impact > theta else low for impact in impacts)
        return Plan(storages=storages, theta=theta, reason=f"theta is {reason}")

    def _auto(self, evidence: Evidence) -> Plan:
        count = len(evidence.impacts)
        limit = self._limit(evidence)
        if limit is None:
            return Plan(storages=evidence.current.storages, theta=None, reason="unchanged: bytes not measured yet")
        # A block that is recomputed now stays so until another is clearly above it.
        ranked = [
            impact * (1 + self._hysteresis) if storage == "recompute" else impact
            for impact, storage in zip(evidence.impacts, evidence.current.storages, strict=True)
        ]
        order = sorted(range(count), key=lambda i: (-ranked[i], i))
        storages = [self._config.low_impact_storage] * count
        recomputed = 0
        while recomputed < count and not limit.holds(evidence, storages):
            storages[order[recomputed]] = "recompute"
            recomputed += 1
        theta = _between([ranked[i] for i in order], recomputed)
        return Plan(
            storages=tuple(storages),
            theta=theta,
            reason=f"theta moved until blocks hold at most {limit.size_bytes} bytes",
        )

    def _limit(self, evidence: Evidence) -> _Limit | None:
        count = len(evidence.impacts)
        least = evidence.bytes_of(("recompute",) * count)
        most = evidence.bytes_of(("keep",) * count)
        if least is None or most is None:
            return None
        if not isinstance(self._memory_budget, str):
            return _Limit(size_bytes=int(least + self._memory_budget * (most - least)), at_peak=False)
        return _Limit(size_bytes=evidence.peak_limit_bytes or 0, at_peak=True)


@dataclass(frozen=True, kw_only=True)
class _Limit:
    """What blocks may hold after forward, or ``at_peak`` in backward."""

    size_bytes: int
    at_peak: bool

    def holds(self, evidence: Evidence, storages: Sequence[str]) -> bool:
        size = evidence.peak_of(storages) if self.at_peak else evidence.bytes_of(storages)
        return (size or 0) <= self.size_bytes and _within_tolerance(evidence, storages)


def _within_tolerance(evidence: Evidence, storages: Sequence[str]) -> bool:
    if not set(storages) & set(LOSSY_STORAGES):
        return True
    costs, limits = evidence.costs, evidence.limits
    if costs is None or limits is None:
        return False
    choice = costs.choice(storages)
    served = math.isfinite(costs.seconds_of(choice))
    return served and costs.squared_error_of(choice) <= limits.squared_error


def _between(descending: Sequence[float], above: int) -> float:
    """A theta with the first ``above`` values above it."""
    if above == 0:
        return descending[0]
    if above == len(descending):
        return math.nextafter(descending[-1], -math.inf)
    return (descending[above - 1] + descending[above]) / 2


def _quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ascending = sorted(values)
    position = share * (len(ascending) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (position - low) * (ascending[high] - ascending[low])
