"""``budget``: the fastest mask within a peak and an error limit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gradckpt_dist.cost import CostTable, Limits
from gradckpt_dist.cost.table import Choice
from gradckpt_dist.errors import BudgetError
from gradckpt_dist.policy.base import Evidence, Plan, Policy
from gradckpt_dist.policy.knapsack import Infeasible, Solution, solve
from gradckpt_dist.policy.transition import ChangeRules, next_choice


@dataclass(frozen=True, kw_only=True)
class BudgetPlan(Plan):
    """``theta`` is the price of memory, in seconds a step per byte of peak; ``error_price``, per unit of squared error.

    ``extra_seconds`` (a step, against ``keep``), ``peak_bytes`` and ``squared_error`` are predicted. ``feasible`` is
    False where no mask meets the limits.
    """

    error_price: float | None
    extra_seconds: float
    peak_bytes: int
    squared_error: float
    feasible: bool = True


class BudgetPolicy(Policy):
    """Solve the knapsack anew at each decision; tighten at once, relax as ``ChangeRules`` say."""

    name = "budget"

    def __init__(self, rules: ChangeRules) -> None:
        self._rules = rules

    def plan(self, evidence: Evidence) -> Plan:
        costs, limits = evidence.costs, evidence.limits
        if costs is None or limits is None:
            return Plan(storages=evidence.current.storages, theta=None, reason="unchanged: costs not measured yet")
        current = costs.choice(evidence.current.storages)
        planned_bytes = _planned_bytes(costs, limits, current, evidence.headroom_bytes)
        solved = solve(costs, peak_bytes=planned_bytes, squared_error=limits.squared_error)
        if isinstance(solved, Infeasible):
            return _full_recompute(costs, solved, limits, planned_bytes)
        over = _over(costs, limits, current, planned_bytes)
        if over:
            return _planned(costs, solved.choice, solved, f"tightened at once: {over}")
        rules = replace(self._rules, seconds_at_once=evidence.change_seconds)
        return _relaxed(costs, limits, current, solved, planned_bytes, rules)


def require_feasible(costs: CostTable, limits: Limits) -> None:
    """At set-up: some mask must meet the limits.

    Raises:
        BudgetError: none does; the message gives the smallest feasible bytes and what to change.
    """
    solved = solve(costs, peak_bytes=limits.planned_bytes, squared_error=limits.squared_error)
    if isinstance(solved, Infeasible):
        raise BudgetError(_failure(costs, solved, limits, limits.planned_bytes))


def _relaxed(
    costs: CostTable, limits: Limits, current: Choice, solved: Solution, planned_bytes: int, rules: ChangeRules
) -> BudgetPlan:
    def fits(choice: Choice) -> bool:
        return not _over(costs, limits, choice, planned_bytes)

    chosen = next_choice(costs, current, solved.choice, rules, fits)
    changes = int((chosen != current).sum())
    saved = costs.seconds_of(current) - costs.seconds_of(chosen)
    if not changes:
        return _planned(costs, chosen, solved, "unchanged: no change pays within the next interval")
    left = int((chosen != solved.choice).sum())
    return _planned(
        costs, chosen, solved, f"{changes} blocks changed, {saved:.3g} s a step saved; {left} blocks from the best"
    )


def _planned_bytes(costs: CostTable, limits: Limits, current: Choice, headroom_bytes: int | None) -> int:
    """The predicted peak to plan for.

    The reserve stays free by prediction, and by what was measured: where less is free than predicted, the plan's
    predicted peak has to be lower by as much.
    """
    if headroom_bytes is None:
        return limits.planned_bytes
    return min(limits.planned_bytes, costs.peak_bytes_of(current) + headroom_bytes - limits.reserve_bytes)


def _over(costs: CostTable, limits: Limits, choice: Choice, planned_bytes: int) -> str:
    """Which limit a choice exceeds; empty if none."""
    if math.isinf(costs.seconds_of(choice)):
        return "a storage does not serve its block"
    peak_bytes, squared_error = costs.peak_bytes_of(choice), costs.squared_error_of(choice)
    if peak_bytes > planned_bytes:
        return f"a peak of {peak_bytes} bytes was predicted, {planned_bytes} may be planned"
    if squared_error > limits.squared_error:
        return (
            f"a gradient error of {math.sqrt(squared_error):.3g} was predicted, "
            f"{math.sqrt(limits.squared_error):.3g} is allowed"
        )
    return ""


def _planned(costs: CostTable, choice: Choice, solved: Solution, reason: str) -> BudgetPlan:
    return BudgetPlan(
        storages=costs.names(choice),
        theta=solved.byte_price,
        reason=reason,
        error_price=solved.error_price,
        extra_seconds=costs.seconds_of(choice),
        peak_bytes=costs.peak_bytes_of(choice),
        squared_error=costs.squared_error_of(choice),
    )


def _full_recompute(costs: CostTable, failed: Infeasible, limits: Limits, planned_bytes: int) -> BudgetPlan:
    choice = costs.choice(("recompute",) * costs.blocks)
    return BudgetPlan(
        storages=costs.names(choice),
        theta=None,
        reason=f"full recompute: {_failure(costs, failed, limits, planned_bytes)}",
        error_price=None,
        extra_seconds=costs.seconds_of(choice),
        peak_bytes=costs.peak_bytes_of(choice),
        squared_error=costs.squared_error_of(choice),
        feasible=False,
    )


def _failure(costs: CostTable, failed: Infeasible, limits: Limits, planned_bytes: int) -> str:
    """What was given, what would be feasible, what to change."""
    tolerance = math.sqrt(limits.squared_error)
    if failed.peak_bytes is None:
        return (
            f"no mask keeps to an error of {tolerance:.3g}, as planned for gradient_tolerance; the least of any is "
            f"{math.sqrt(failed.squared_error):.3g}; raise gradient_tolerance, or allow an exact storage"
        )
    smallest = failed.peak_bytes + limits.peak_bytes - planned_bytes
    what = "the smallest feasible is" if failed.exact else "feasible, if perhaps not the smallest, is"
    text = f"no mask fits {limits.peak_bytes} bytes; {what} {smallest} (reserve {limits.reserve_bytes} included)"
    loose = solve(costs, peak_bytes=0, squared_error=float(costs.squared_error.max(axis=1).sum()))
    if isinstance(loose, Infeasible) and loose.peak_bytes is not None and loose.peak_bytes < failed.peak_bytes:
        text += f", or {smallest - failed.peak_bytes + loose.peak_bytes} with a larger gradient_tolerance"
    return f"{text}; raise memory_budget, allow more storages, or make the batch smaller"
