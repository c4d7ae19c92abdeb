"""``gradckpt bench impact``: does what the metrics predict of gradient errors come true, and do the limits hold?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np

from gradckpt_dist.bench.gradient_errors import Sample
from gradckpt_dist.bench.impact_plans import Array, Planner, lossy_of
from gradckpt_dist.bench.impact_training import EXTRA_SECONDS, Extent, Training
from gradckpt_dist.bench.ranks import on_ranks
from gradckpt_dist.bench.record import Rows, progress, record
from gradckpt_dist.storage import STORAGES

METRICS = ("norm", "influence", "probe")
TOLERANCES = (0.05, 0.01)
MEMORY_BUDGET = 0.1
FIRST_POINT = 14
"""Steps: the first decision is in force."""

_FULL = Extent(steps=800, layers=8, width=64, context=64, batch=8, interval=20, points=5, checks=10, samples=4, draws=1)
_QUICK = Extent(steps=40, layers=4, width=32, context=32, batch=4, interval=10, points=2, checks=2, samples=1, draws=1)


def bench_impact(*, quick: bool) -> dict[str, Any]:
    """A row for each step, metric and lossy storage: predicted errors of the whole gradient against true ones.

    ``spearman`` and ``median_ratio`` (predicted / true) are over blocks, each alone stored so, whose errors the row
    holds in forward order; ``regret_seconds`` is
    of the plan that the metric's errors lead to, over the plan's with true errors, at the first of ``tolerances``;
    ``plans`` has it at all, for the baselines too, and whether the plan truly keeps to the tolerance.
    ``realised``: the error of the gradient under the mask in force, in the worst of a few steps; ``additivity``: as it
    adds up from blocks alone, and as it is. ``summary`` leaves out
    the first step, when all blocks are alike.
    """
    extent = _QUICK if quick else _FULL
    runs = [
        on_ranks(_measure, 1, extent=asdict(extent), tolerance=tolerance, compare=number == 0)
        for number, tolerance in enumerate(TOLERANCES)
    ]
    realised = [row for run in runs for row in run["realised"]]
    rows, plans = runs[0]["rows"], runs[0]["plans"]
    return record(
        "impact",
        rows,
        extent=asdict(extent),
        memory_budget=MEMORY_BUDGET,
        tolerances=list(TOLERANCES),
        stated_extra_seconds=EXTRA_SECONDS,
        summary={name: _summary(name, rows, plans) for name in dict.fromkeys(plan["metric"] for plan in plans)},
        largest_share_of_tolerance=max(row["realised"] / row["tolerance"] for row in realised),
        plans=plans,
        additivity=runs[0]["additivity"],
        realised=realised,
    )


def _measure(rank: int, extent: dict[str, Any], tolerance: float, compare: bool) -> dict[str, Any]:
    limits = Extent(**extent)
    training = Training(limits, memory_budget=MEMORY_BUDGET, gradient_tolerance=tolerance)
    comparison = _Comparison(training, limits.draws)
    points = _spread(limits.steps, limits.points, first=FIRST_POINT) if compare else []
    checks = _checks(limits)
    realised = []
    for step in sorted({*points, *checks}):
        training.advance(step)
        samples = training.look()
        if step in points:
            comparison.add(step, samples)
        if step in checks:
            realised.append({"step": step, "tolerance": tolerance, **_realised(training, samples, limits.draws)})
        progress(f"tolerance {tolerance}: step {step} of {limits.steps}")
    training.engine.disable()
    return {
        "rows": comparison.rows,
        "plans": comparison.plans,
        "additivity": comparison.additivity,
        "realised": realised,
    }


def _spread(last: int, count: int, first: int) -> list[int]:
    return [first + (last - first) * number // (count - 1) for number in range(count)]


def _checks(extent: Extent) -> list[int]:
    """Steps spread over the run and, as masks age, over the places in an interval; the last step is one."""
    stride = (extent.steps - FIRST_POINT) // extent.checks
    ends = range(extent.steps - stride * (extent.checks - 1), extent.steps + 1, stride)
    return [end - (extent.checks - 1 - number) % min(extent.interval, stride) for number, end in enumerate(ends)]


def _realised(training: Training, samples: Sequence[Sample], draws: int) -> dict[str, Any]:
    evidence = training.evidence()
    mask = evidence.current.storages
    squares = []
    for sample in samples:
        exact = training.errors.exact(sample)
        squares += [training.errors.squared_error(mask, sample, exact) for _ in range(draws)]
    return {
        "predicted": evidence.error_of(mask),
        "realised": math.sqrt(max(squares)),
        "root_mean_square": math.sqrt(sum(squares) / len(squares)),
        "mask": list(mask),
    }


class _Comparison:
    """Gathers rows and plans, point by point."""

    def __init__(self, training: Training, draws: int) -> None:
        self._training = training
        self._draws = draws
        self._first: Array | None = None
        self.rows: Rows = []
        self.plans: Rows = []
        self.additivity: Rows = []

    def add(self, step: int, samples: Sequence[Sample]) -> None:
        """Measure the true errors at this step, and hold the predictions against them."""
        evidence = self._training.evidence()
        if evidence.costs is None or evidence.limits is None:
            return
        lossy = lossy_of(evidence.costs)
        true = self._true(lossy, samples)
        self._first = true if self._first is None else self._first
        self.additivity.append({"step": step, **self._added_up(evidence.current.storages, lossy, true, samples)})
        predicted = {metric: self._training.predicted(metric) for metric in METRICS}
        for tolerance in TOLERANCES:
            planner = Planner(
                costs=evidence.costs, true=true, peak_bytes=evidence.limits.planned_bytes, tolerance=tolerance
            )
            plans = {name: planner.by(errors) for name, errors in predicted.items()}
            plans |= {"true": planner.by(true), "first": planner.by(self._first)}
            plans |= {"random": planner.by_random(step), "static": planner.by_static()}
            self.plans += [
                {"step": step, "metric": name, "tolerance": tolerance} | plan for name, plan in plans.items()
            ]
        for metric, errors in predicted.items():
            for column, storage in enumerate(lossy):
                self.rows.append(
                    {
                        "step": step,
                        "metric": metric,
                        "storage": storage,
                        "bits": getattr(STORAGES[storage], "bits", None),
                        **_agreement(np.sqrt(errors[:, column]), np.sqrt(true[:, column])),
                        "regret_seconds": self._regret(step, metric),
                    }
                )

    def _true(self, lossy: Sequence[str], samples: Sequence[Sample]) -> Array:
        """[blocks, lossy]: mean squares over samples, and over draws where rounding is stochastic."""
        errors = self._training.errors
        total = np.zeros((errors.blocks, len(lossy)))
        for sample in samples:
            exact = errors.exact(sample)
            for block, column in np.ndindex(*total.shape):
                storages = errors.alone(block, lossy[column])
                draws = self._draws if lossy[column].endswith("4") else 1
                squares = [errors.squared_error(storages, sample, exact) for _ in range(draws)]
                total[block, column] += sum(squares) / draws
        return total / len(samples)

    def _added_up(
        self, mask: Sequence[str], lossy: Sequence[str], true: Array, samples: Sequence[Sample]
    ) -> dict[str, float]:
        """The error under the mask in force, from those of blocks alone, and measured."""
        errors = self._training.errors
        squares = [errors.squared_error(mask, sample, errors.exact(sample)) for sample in samples]
        alone = sum(float(true[block, lossy.index(name)]) for block, name in enumerate(mask) if name in lossy)
        return {"from_blocks_alone": math.sqrt(alone), "measured": math.sqrt(sum(squares) / len(squares))}

    def _regret(self, step: int, metric: str) -> float:
        wanted = {"step": step, "metric": metric, "tolerance": TOLERANCES[0]}
        regret: float = next(plan["regret_seconds"] for plan in self.plans if wanted.items() <= plan.items())
        return regret


def _of_all_pairs(rows: Rows, step: int) -> float:
    """Spearman over blocks and storages together, at this step."""
    predicted, true = (
        np.array([value for row in rows if row["step"] == step for value in row[name]])
        for name in ("predicted_error", "true_error")
    )
    return spearman(predicted, true) or 0.0


def _agreement(predicted: Array, true: Array) -> dict[str, Any]:
    ratios = predicted / true
    return {
        "spearman": spearman(predicted, true),
        "median_ratio": float(np.median(ratios)),
        "least_ratio": float(ratios.min()),
        "largest_ratio": float(ratios.max()),
        "true_error": true.tolist(),
        "predicted_error": predicted.tolist(),
    }


def spearman(ones: Array, others: Array) -> float | None:
    """The correlation of ranks, those of equal values being their mean; None where all values are equal."""
    ranks = [_ranks(values) for values in (ones, others)]
    if any(np.ptp(values) == 0 for values in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: Array) -> Array:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks


def _summary(metric: str, rows: Rows, plans: Rows) -> dict[str, Any]:
    first = min(plan["step"] for plan in plans)
    mine = [row for row in rows if row["metric"] == metric and row["step"] > first]
    judged = [plan for plan in plans if plan["metric"] == metric and plan["step"] > first]
    regrets = [plan["regret_seconds"] for plan in judged]
    result = {
        "median_regret": median(regrets),
        "largest_regret": max(regrets),
        "share_over_tolerance": sum(plan["exceeds_tolerance"] for plan in judged) / len(judged),
        "largest_error_over_tolerance": max(plan["true_error"] / plan["tolerance"] for plan in judged),
    }
    if mine:
        correlations = [row["spearman"] or 0.0 for row in mine]
        ratios = [row["median_ratio"] for row in mine]
        result |= {
            "median_spearman": median(correlations),
            "least_spearman": min(correlations),
            "median_ratio": median(ratios),
            "least_spearman_of_all_pairs": min(_of_all_pairs(mine, step) for step in {row["step"] for row in mine}),
            "least_median_ratio": min(ratios),
            "largest_median_ratio": max(ratios),
        }
    return result
