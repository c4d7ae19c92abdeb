"""The bench's three phases on one model: settle our masks, time every system in turn, measure their bytes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from gradckpt_dist.bench.frontier import memory
from gradckpt_dist.bench.frontier.crew import Crew, batches
from gradckpt_dist.bench.frontier.peers import BY_BUDGET
from gradckpt_dist.bench.frontier.plan import FrontierPlan, ModelPlan
from gradckpt_dist.bench.frontier.processes import WorkerProcess
from gradckpt_dist.bench.frontier.setting import OURS, Setting
from gradckpt_dist.bench.record import progress

_STEP = {"do": "timed_step"}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of one setting's steps; the ratios are of minima and of medians, to eager ``keep`` in the same rounds."""

    minimum_seconds: float
    median_seconds: float
    step_ratio: float
    median_ratio: float


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Of one setting's steps, and the error of their gradients."""

    peak_bytes: int
    held_bytes: int
    relative_error: float


def settle(crew: Crew, plan: FrontierPlan, model: ModelPlan) -> list[Setting]:
    """Ours at every budget and tolerance, with the masks that they come to; on compiled blocks at one budget more."""
    full = budget_of_full_recompute(crew, plan, model)
    settled = []
    for setting in model.ours():
        progress(f"settling {setting}")
        budgets = (*model.budgets, full) if setting.compiled and full is not None else model.budgets
        with crew.working([setting], environment=memory.KEEPS) as working:
            for worker, _ in working.values():
                for budget in budgets:
                    answer = crew.ask(replace(setting, budget=budget), worker, {"do": "settle", "budget": budget})
                    if answer is not None:
                        settled.append(replace(setting, budget=budget, storages=tuple(answer["storages"])))
    return settled


def budget_of_full_recompute(crew: Crew, plan: FrontierPlan, model: ModelPlan) -> float | None:
    """The fraction at which ours may have the peak of compiled blocks with a checkpoint around each, as measured.

    Ours needs less than that when it recomputes all of them, and a fraction starts from there. None where these are not
    among the peers.
    """
    if model.compiled_extremes is None:
        return None
    full, keep = model.compiled_extremes
    own = replace(full, system=OURS, storages=("recompute",) * plan.size.blocks(model.model))
    found = measure_bytes(crew, [full, keep, own])
    if not {full, keep, own} <= set(found):
        return None
    start, span = found[own].peak_bytes, found[keep].peak_bytes - found[own].peak_bytes
    return round(min(1.0, max(0.0, (found[full].peak_bytes - start) / span)), 3) if span > 0 else None


def first_with_mask(settings: Sequence[Setting]) -> dict[Setting, Setting]:
    """For each setting the first one that does the same: ours do if they have the same mask on the same blocks."""
    first: dict[tuple[Any, ...], Setting] = {}
    same = {}
    for setting in settings:
        work = (setting.compiled, setting.storages) if setting.system == OURS else (setting,)
        same[setting] = first.setdefault(work, setting)
    return same


class Timer:
    """Times settings in groups, eager ``keep`` being in each. ``same``: settings found to do what another one does."""

    def __init__(self, crew: Crew, plan: FrontierPlan, reference: Setting) -> None:
        self._crew = crew
        self._plan = plan
        self._reference = reference
        self._by_saved: dict[str, Setting] = {}
        self.same: dict[Setting, Setting] = {}
        self.timings: dict[Setting, Timing] = {}

    def run(self, settings: Sequence[Setting]) -> None:
        """Time these, and the reference."""
        with self._crew.working([self._reference], environment=memory.KEEPS) as working:
            keep, _ = working[self._reference]
            groups = list(batches(settings, self._plan.group))
            for number, group in enumerate(groups):
                progress(f"timing group {number + 1} of {len(groups)} on {self._reference.model}")
                self._time_group(group, keep)

    def _time_group(self, group: Sequence[Setting], keep: WorkerProcess) -> None:
        with self._crew.working(group, environment=memory.KEEPS) as working:
            workers = {self._reference: keep}
            for setting, (worker, built) in working.items():
                if self._is_first(setting, built["saved"]):
                    workers[setting] = worker
            samples = self._sample(workers)
        keep_seconds = samples[self._reference]
        for setting, seconds in samples.items():
            timing = Timing(
                minimum_seconds=min(seconds),
                median_seconds=statistics.median(seconds),
                step_ratio=min(seconds) / min(keep_seconds),
                median_ratio=statistics.median(seconds) / statistics.median(keep_seconds),
            )
            self.timings.setdefault(setting, timing)

    def _is_first(self, setting: Setting, saved: str) -> bool:
        """Whether no other setting compiles to a plan that saves the same tensors in the same order."""
        if not setting.compiled or setting.system not in {"keep", *BY_BUDGET}:
            return True
        first = self._by_saved.setdefault(saved, setting)
        if first != setting:
            self.same[setting] = first
        return first == setting

    def _sample(self, workers: dict[Setting, WorkerProcess]) -> dict[Setting, list[float]]:
        samples: dict[Setting, list[float]] = {setting: [] for setting in workers}
        for number in range(self._plan.rounds):
            order = list(workers)[number % len(workers) :] + list(workers)[: number % len(workers)]
            for setting in order:
                answer = self._crew.ask(setting, workers[setting], _STEP)
                if answer is None:
                    del workers[setting]
                else:
                    samples[setting].append(answer["seconds"])
        return {setting: samples[setting] for setting in workers}


def measure_bytes(crew: Crew, settings: Sequence[Setting]) -> dict[Setting, Bytes]:
    """In processes that hand back to the system what they free. Ours share one for all masks of a configuration."""
    jobs = [list(job) for _, job in groupby(settings, key=_job)]
    found: dict[Setting, Bytes] = {}
    for wave in batches(jobs, crew.at_once):
        progress(f"measuring bytes: {', '.join(str(job[0]) for job in wave)}")
        by_first = {job[0]: job for job in wave}
        with crew.working(list(by_first), reference=True, environment=memory.HANDS_BACK) as working:
            for first, (worker, _) in working.items():
                for setting in by_first[first]:
                    worker.send({"do": "measure", "storages": setting.storages})
            for first, (worker, _) in working.items():
                for setting in by_first[first]:
                    answer = crew.answer(setting, worker)
                    if answer is not None:
                        found[setting] = Bytes(**answer)
    return found


def _job(setting: Setting) -> tuple[Any, ...]:
    if setting.system == OURS:
        return setting.system, setting.compiled, setting.tolerance
    return (setting,)
