"""The bench from end to end."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradckpt_dist.bench.frontier.bars import compare, headline
from gradckpt_dist.bench.frontier.crew import Crew
from gradckpt_dist.bench.frontier.phases import Bytes, Timer, first_with_mask, measure_bytes, settle
from gradckpt_dist.bench.frontier.plan import COARSE, FULL, QUICK, WIDE, FrontierPlan, ModelPlan
from gradckpt_dist.bench.frontier.processes import Processes
from gradckpt_dist.bench.frontier.setting import Setting
from gradckpt_dist.bench.record import Rows, record
from gradckpt_dist.errors import GradckptError


def bench_frontier(*, quick: bool) -> dict[str, Any]:
    """A row for each system, model, budget and tolerance; ``skipped``: systems that could not run here, and why.

    ``step_ratio`` is the minimum over rounds of forward and backward, divided by that of eager ``keep`` in the same
    rounds; ``median_ratio``, the same of medians. ``peak_bytes`` and ``held_bytes`` are the process's resident bytes,
    at the most during a step and after forward, less those before the step; parameters and gradients are there before
    it. ``relative_error`` is that of all gradients against those of the unmodified model on the same weights and batch.
    Systems that come to the same plan (our masks; what a memory budget lets compiled blocks save) are measured once.
    ``bars.Comparison`` and ``bars.headline`` define the figures; ``comparisons_by_medians`` are made of
    ``median_ratio`` in the place of ``step_ratio``.

    Raises:
        GradckptError: this is not Linux, or a process failed, died or hung.
    """
    return _bench(QUICK if quick else FULL)


def bench_frontier_coarse(*, quick: bool) -> dict[str, Any]:
    """The same at fewer budgets and tolerances."""
    return _bench(QUICK if quick else COARSE)


def bench_frontier_wide(*, quick: bool) -> dict[str, Any]:
    """The same in a model twice as wide, at full recompute's peak and a tolerance of 0.05 alone."""
    return _bench(QUICK if quick else WIDE)


def _bench(plan: FrontierPlan) -> dict[str, Any]:
    if sys.platform != "linux":
        raise GradckptError(f"bench frontier reads resident bytes from Linux's /proc; this is {sys.platform}")
    with tempfile.TemporaryDirectory() as folder, Processes(Path(folder)) as processes:
        crew = Crew(processes, plan.size)
        rows = [row for model in plan.models for row in _rows(crew, plan, model)]
    by_medians = compare([{**row, "step_ratio": row["median_ratio"]} for row in rows])
    return record(
        "frontier",
        rows,
        skipped=crew.skipped,
        **headline(compare(rows)),
        comparisons_by_medians=[asdict(one) for one in by_medians],
        rounds=plan.rounds,
        size=asdict(plan.size),
    )


def _rows(crew: Crew, plan: FrontierPlan, model: ModelPlan) -> Rows:
    settings = [*model.peers(), *settle(crew, plan, model)]
    same = first_with_mask(settings)
    timer = Timer(crew, plan, model.reference)
    timer.run([setting for setting in settings if same[setting] == setting])
    measured = measure_bytes(crew, list(timer.timings))
    rows = []
    for setting in (model.reference, *settings):
        first = same.get(setting, setting)
        first = timer.same.get(first, first)
        if first in measured:
            rows.append(_row(setting, timer, first, measured[first]))
    return rows


def _row(setting: Setting, timer: Timer, measured_as: Setting, found: Bytes) -> dict[str, Any]:
    return {
        "system": setting.system,
        "model": setting.model,
        "compiled": setting.compiled,
        "budget": setting.budget,
        "tolerance": setting.tolerance,
        **asdict(found),
        **asdict(timer.timings[measured_as]),
        "mask": _in_words(setting.storages),
    }


def _in_words(storages: Sequence[str]) -> str:
    """``3 keep, 1 recompute``; empty for a peer."""
    return ", ".join(f"{count} {storage}" for storage, count in Counter(storages).items())
