"""This package as a system among its peers: find the masks that it comes to, and pin one to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradckpt_dist.api import enable
from gradckpt_dist.bench.frontier.models import Workload
from gradckpt_dist.engine import Engine

LEARNING_INTERVAL = 8
SETTLING_INTERVAL = 2
STEADY_DECISIONS = 3
LEARNING_DECISIONS = 12
MOST_DECISIONS = 16


class Ours:
    """The plugin on a workload's model. Weights stand still meanwhile, so that a mask settles and can be repeated."""

    def __init__(self, work: Workload, *, compiled: bool, tolerance: float) -> None:
        self._work = work
        self._tolerance = tolerance
        self._optimizer = torch.optim.SGD(work.parameters, lr=0.0)
        self._learned: dict[str, Any] | None = None
        self._pinned: Engine | None = None
        if compiled:
            for block in work.blocks:
                block.compile()

    def settle(self, budget: float) -> list[str]:
        """The mask that this budget leads to, blocks in order.

        What was learned of impacts and costs before is handed on, as to a run that resumes under another budget.
        """
        if self._learned is None:
            self._run_until_settled(self._config(0.5, LEARNING_INTERVAL), LEARNING_DECISIONS)
        return self._run_until_settled(self._config(budget, SETTLING_INTERVAL), STEADY_DECISIONS)

    def pin(self, storages: Sequence[str]) -> None:
        """Have these storages, one for each block, in force from the next step on."""
        if self._pinned is None:
            self._pinned = self._enable(self._config(0.5, LEARNING_INTERVAL))
        self._pinned.set_mask(storages)

    def _enable(self, config: dict[str, Any]) -> Engine:
        return enable(self._work.model, config, optimizer=self._optimizer)

    def _config(self, budget: float, interval: int) -> dict[str, Any]:
        # No hysteresis: between two decisions that are so close, no change would pay.
        return {
            "policy": "budget",
            "memory_budget": budget,
            "gradient_tolerance": self._tolerance,
            "interval": interval,
            "warmup_steps": 1,
            "hysteresis": 0.0,
        }

    def _run_until_settled(self, config: dict[str, Any], least: int) -> list[str]:
        """The mask in force once it was the same at the last decisions, or after so many that it never will be.

        ``least`` decisions are waited for: the first ones may come before each kind of block has been probed.
        """
        engine = self._enable(config)
        if self._learned is not None:
            engine.load_state_dict(self._learned)
        seen: list[tuple[str, ...]] = []
        epoch = engine.mask.epoch
        while len(seen) < least or (len(seen) < MOST_DECISIONS and not _is_steady(seen)):
            self._work.step()
            self._optimizer.step()
            if engine.mask.epoch != epoch:
                epoch = engine.mask.epoch
                seen.append(engine.mask.storages)
        self._learned = engine.state_dict()
        engine.disable()
        return list(seen[-1])


def _is_steady(seen: Sequence[tuple[str, ...]]) -> bool:
    return len(seen) >= STEADY_DECISIONS and len(set(seen[-STEADY_DECISIONS:])) == 1
