"""Cost tables for the planner's bench: made up, from a seed, in three kinds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gradckpt_dist.cost import CostTable, Limits
from gradckpt_dist.policy.knapsack import Infeasible, solve

STORAGES = ("keep", "recompute", "selective", "selective_half", "compress8", "compress4", "selective8", "selective4")

# A transformer block's, as shares of what `keep` holds, of a step's time, and of the squared gradient.
_HELD = np.array([1.0, 0.0625, 0.65, 0.5, 0.266, 0.14, 0.17, 0.09])
_WORKING = np.array([0.0, 1.0, 0.4, 0.55, 0.25, 0.25, 0.45, 0.45])
_SECONDS = np.array([0.0, 0.30, 0.08, 0.15, 0.09, 0.05, 0.13, 0.12])
_ERROR = np.array([0.0, 0.0, 0.0, 0.0, 1e-5, 2e-3, 1e-5, 2e-3])
_KEEP_BYTES = 2**27
_FIXED_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class PlannerInstance:
    """``lossy``: whether the tolerance is above 0, so that two limits bind."""

    kind: str
    costs: CostTable
    limits: Limits
    lossy: bool


def create_planner_instance(kind: str, blocks: int, generator: np.random.Generator, *, lossy: bool) -> PlannerInstance:
    """One of ``KINDS``, with limits drawn between the tightest that are feasible and those that bind nothing."""
    costs = KINDS[kind](blocks, generator)
    smallest = solve(costs, peak_bytes=0, squared_error=0.0)
    least = smallest.peak_bytes if isinstance(smallest, Infeasible) else None
    most = costs.peak_bytes_of(np.zeros(blocks, dtype=np.int64))
    share = generator.uniform() ** 2
    peak_bytes = int((least or 0) + share * (most - (least or 0)))
    highest = math.fsum(costs.squared_error.max(axis=1))
    squared_error = highest * 10 ** generator.uniform(-3, 0) if lossy else 0.0
    return PlannerInstance(
        kind=kind, costs=costs, limits=Limits(peak_bytes=peak_bytes, squared_error=squared_error), lossy=lossy
    )


def _random(blocks: int, generator: np.random.Generator) -> CostTable:
    """No order at all in the numbers, but that ``keep`` holds most and costs nothing; half the storages are lossy."""
    shape = (blocks, len(STORAGES))
    held = generator.integers(2**20, 2**28, shape)
    held[:, 0] = 2**28
    seconds = generator.uniform(0, 1, shape)
    seconds[:, 0] = 0
    return CostTable(
        storages=STORAGES,
        extra_seconds=seconds,
        held_bytes=held,
        working_set_bytes=generator.integers(0, 2**28, shape),
        squared_error=np.where(_ERROR > 0, 10 ** generator.uniform(-6, -2, shape), 0.0),
        fixed_bytes=_FIXED_BYTES,
    )


def _structured(blocks: int, generator: np.random.Generator) -> CostTable:
    """Identical blocks: every choice of blocks is a tie."""
    one = np.ones(blocks)
    return _scaled(one, one, one)


def _unequal(blocks: int, generator: np.random.Generator) -> CostTable:
    """Wide and narrow blocks in turn, seconds with 5 % of noise, impact spread over three orders of magnitude."""
    place = np.arange(blocks)
    width = np.where(place % 2, 1.0, 0.3) * np.where(place % 4 < 2, 1.0, 0.5)
    seconds = width**1.2 * generator.uniform(0.95, 1.05, blocks)
    return _scaled(width, seconds, 10 ** generator.uniform(-1.5, 1.5, blocks))


def _scaled(width: np.ndarray, seconds: np.ndarray, impact: np.ndarray) -> CostTable:
    return CostTable(
        storages=STORAGES,
        extra_seconds=np.outer(seconds, _SECONDS),
        held_bytes=np.rint(np.outer(width, _HELD * _KEEP_BYTES)).astype(np.int64),
        working_set_bytes=np.rint(np.outer(width, _WORKING * _KEEP_BYTES)).astype(np.int64),
        squared_error=np.outer(impact, _ERROR),
        fixed_bytes=_FIXED_BYTES,
    )


KINDS: dict[str, Callable[[int, np.random.Generator], CostTable]] = {
    "random": _random,
    "structured": _structured,
    "unequal": _unequal,
}
