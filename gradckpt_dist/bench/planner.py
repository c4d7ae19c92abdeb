"""``gradckpt bench planner``: how fast the budget policy's optimiser is, and how far from the optimum."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradckpt_dist.bench.milp import MilpResult, solve_milp
from gradckpt_dist.bench.planner_instances import KINDS, PlannerInstance, create_planner_instance
from gradckpt_dist.bench.record import progress, record, summary
from gradckpt_dist.errors import BudgetError
from gradckpt_dist.policy.knapsack import Solution, solve

WITHIN = 1e-3
"""The relative gap that the small instances are counted by."""


@dataclass(frozen=True, kw_only=True)
class _Extent:
    sizes: tuple[int, ...]
    most_for_milp: int
    time_limit_s: float
    rounds: int
    instances: int


_FULL = _Extent(
    sizes=(10, 32, 100, 316, 1000, 3162, 10_000), most_for_milp=1000, time_limit_s=10, rounds=7, instances=200
)
_QUICK = _Extent(sizes=(10, 100, 1000), most_for_milp=100, time_limit_s=1, rounds=2, instances=9)


def bench_planner(*, quick: bool) -> dict[str, Any]:
    """A row for each size, kind and limits; ``seconds`` is the minimum over rounds.

    ``gap_to_milp`` is relative to ``reference``: ``milp`` is the optimum by HiGHS; ``milp_bound``, where HiGHS ran out
    of time, its bound, so that the true gap is smaller; ``dual_bound``, where it was not tried, our own.
    ``gap_to_milp_plan`` is to the best plan that HiGHS found in its time, negative where ours is faster. Besides, over
    ``instances`` small ones of 5 to 60 blocks: ``worst_gap_to_milp`` over those ``solved_by_milp`` in time, and how
    many of these are ``within`` a thousandth.
    """
    extent = _QUICK if quick else _FULL
    rows = [
        _measured(kind, blocks, extent, lossy=lossy)
        for blocks in extent.sizes
        for kind in KINDS
        for lossy in (False, True)
    ]
    gaps = _small_gaps(extent)
    return record(
        "planner",
        rows,
        instances=extent.instances,
        solved_by_milp=len(gaps),
        within=sum(gap <= WITHIN for gap in gaps),
        worst_gap_to_milp=max(gaps),
        median_gap_to_milp=statistics.median(gaps),
        milp_time_limit_s=extent.time_limit_s,
    )


def _measured(kind: str, blocks: int, extent: _Extent, *, lossy: bool) -> dict[str, Any]:
    progress(f"{blocks} {kind} blocks{', lossy' if lossy else ''}")
    instance = create_planner_instance(kind, blocks, np.random.default_rng(blocks), lossy=lossy)
    seconds = []
    for _ in range(extent.rounds):
        started = time.perf_counter()
        solution = _solved(instance)
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    milp = _milp(instance, extent.time_limit_s) if blocks <= extent.most_for_milp else None
    milp_seconds = time.perf_counter() - started if milp else None
    reference, gap = _gap(solution, milp)
    return {
        "kind": kind,
        "lossy": lossy,
        "blocks": blocks,
        "storages": len(instance.costs.storages),
        "seconds": min(seconds),
        "gap_to_milp": gap,
        "reference": reference,
        "gap_to_milp_plan": _relative(solution.extra_seconds, milp.seconds) if milp and milp.seconds else None,
        "gap_to_dual_bound": _relative(solution.extra_seconds, solution.bound),
        "milp_seconds": milp_seconds,
        "median_seconds": summary(seconds)["median_seconds"],
    }


def _small_gaps(extent: _Extent) -> list[float]:
    progress(f"{extent.instances} small instances")
    gaps = []
    for number in range(extent.instances):
        generator = np.random.default_rng(number)
        kind = list(KINDS)[number % len(KINDS)]
        blocks = int(generator.integers(5, 61))
        instance = create_planner_instance(kind, blocks, generator, lossy=number % 4 > 0)
        reference, gap = _gap(_solved(instance), _milp(instance, extent.time_limit_s))
        if reference == "milp":
            gaps.append(gap)
    return gaps


def _solved(instance: PlannerInstance) -> Solution:
    limits = instance.limits
    solved = solve(instance.costs, peak_bytes=limits.peak_bytes, squared_error=limits.squared_error)
    if not isinstance(solved, Solution):
        raise BudgetError(f"bench planner made limits that nothing fits: {solved}")
    return solved


def _milp(instance: PlannerInstance, time_limit_s: float) -> MilpResult:
    limits = instance.limits
    return solve_milp(
        instance.costs,
        peak_bytes=limits.peak_bytes,
        squared_error=limits.squared_error,
        time_limit_s=time_limit_s,
    )


def _gap(solution: Solution, milp: MilpResult | None) -> tuple[str, float]:
    if milp is None:
        return "dual_bound", _relative(solution.extra_seconds, solution.bound)
    if milp.optimal and milp.seconds is not None:
        return "milp", _relative(solution.extra_seconds, milp.seconds)
    return "milp_bound", _relative(solution.extra_seconds, max(milp.bound, solution.bound))


def _relative(seconds: float, reference: float) -> float:
    return 0.0 if seconds == reference else (seconds - reference) / max(abs(reference), 1e-12)
