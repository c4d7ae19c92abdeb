"""DeepSpeed's optimizer steps: those that are skipped, and what a change of mask costs the steps after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from gradckpt_dist.engine import Engine

AFTERMATH_STEPS = 2
"""ZeRO-3 finds its prefetch trace invalid in the first step under a new mask, and records it in the second."""
BASELINE_STEPS = 8


def watch_steps(engine: Engine, trainer: Any) -> Callable[[], None]:
    """Drop samples of steps that overflowed under their loss scale; under ZeRO-3, time changes; the call undoes it."""
    take_step = trainer._take_model_step
    clock = ChangeClock() if trainer.zero_optimization_partition_weights() else None

    def take_model_step(*args: Any, **kwargs: Any) -> None:
        take_step(*args, **kwargs)
        watch = engine.gate.watch
        if watch is not None and not trainer._step_applied:
            watch.spoil()
        if clock is not None:
            clock.end_step(time.perf_counter(), engine.mask.storages)
            engine.gate.change_seconds = clock.seconds

    trainer.__dict__["_take_model_step"] = take_model_step

    def undo() -> None:
        if trainer.__dict__.get("_take_model_step") is take_model_step:
            del trainer.__dict__["_take_model_step"]

    return undo


class ChangeClock:
    """How much longer the first steps under a new mask last than those after them, in the mean over changes.

    A change that comes before those steps are over is not counted.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.changes = 0
        self._storages: tuple[str, ...] | None = None
        self._ended: float | None = None
        self._durations: list[float] | None = None

    def end_step(self, now: float, storages: tuple[str, ...]) -> None:
        """A step under these storages has ended; ``now`` in seconds."""
        started, self._ended = self._ended, now
        if storages != self._storages:
            self._durations = None if self._storages is None else []
            self._storages = storages
        if started is None or self._durations is None:
            return
        self._durations.append(now - started)
        if len(self._durations) == AFTERMATH_STEPS + BASELINE_STEPS:
            first, later = self._durations[:AFTERMATH_STEPS], self._durations[AFTERMATH_STEPS:]
            cost = max(0.0, sum(first) - AFTERMATH_STEPS * median(later))
            self.changes += 1
            self.seconds += (cost - self.seconds) / self.changes
            self._durations = None
