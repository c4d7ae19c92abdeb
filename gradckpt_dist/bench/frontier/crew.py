"""The processes of many settings at once, built and warm; what cannot run here is noted and left out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

from gradckpt_dist.bench.frontier.processes import Processes, RefusedError, WorkerProcess
from gradckpt_dist.bench.frontier.setting import Setting, Size

_T = TypeVar("_T")


class Crew:
    """Starts workers and asks them. ``skipped``: a row for each system that refused, with its reason."""

    def __init__(self, processes: Processes, size: Size) -> None:
        self._processes = processes
        self._size = size
        self.at_once = os.cpu_count() or 1
        self.skipped: list[dict[str, Any]] = []

    @contextmanager
    def working(
        self, settings: Sequence[Setting], *, reference: bool = False, environment: Mapping[str, str] | None = None
    ) -> Iterator[dict[Setting, tuple[WorkerProcess, dict[str, Any]]]]:
        """A process for each setting that can run here, with its answer to being built; ended with the block.

        As many are built at once as there are cores. With ``reference`` they hold exact gradients to compare with.
        """
        started: list[WorkerProcess] = []
        working = {}
        try:
            for wave in batches(settings, self.at_once):
                workers = [self._processes.start(str(setting), **(environment or {})) for setting in wave]
                started += workers
                for setting, worker in zip(wave, workers, strict=True):
                    request = {"setting": setting.to_dict(), "size": asdict(self._size), "reference": reference}
                    worker.send(request)
                for setting, worker in zip(wave, workers, strict=True):
                    answer = self.answer(setting, worker)
                    if answer is not None:
                        working[setting] = (worker, answer)
            yield working
        finally:
            for worker in started:
                self._processes.close(worker)

    def ask(self, setting: Setting, worker: WorkerProcess, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """One request and its answer, None if it is refused."""
        worker.send(request)
        return self.answer(setting, worker)

    def answer(self, setting: Setting, worker: WorkerProcess) -> dict[str, Any] | None:
        """The answer to the oldest request that has none yet, None if it is refused."""
        try:
            return worker.receive()
        except RefusedError as refusal:
            row = {
                "system": setting.system,
                "model": setting.model,
                "compiled": setting.compiled,
                "budget": setting.budget,
                "tolerance": setting.tolerance,
                "reason": str(refusal),
            }
            self.skipped.append(row)
            return None


def batches(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    """Runs of at most ``size`` items, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
