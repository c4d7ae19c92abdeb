"""Which steps are sampled and measured, at which boundaries statistics are launched, and what comes of them when."""

from __future__ import annotations

import enum
from dataclasses import dataclass

SAMPLES_PER_WINDOW = 4


class Turn(enum.Enum):
    """Where the decision in flight is; each state lasts from one boundary to the next."""

    IDLE = enum.auto()
    """No decision is in flight."""
    REDUCING = enum.auto()
    """The all-reduces were launched."""
    PLANNING = enum.auto()
    """They were collected; rank 0's policy is at work beside the step."""
    BROADCASTING = enum.auto()
    """Rank 0's decision is on its way."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps count from 0. The first decision comes as early as it can, the next ones every ``interval`` steps."""

    warmup_steps: int
    interval: int

    @property
    def first_decision(self) -> int:
        return self.warmup_steps + min(SAMPLES_PER_WINDOW, self.interval)

    def is_decision(self, step: int) -> bool:
        """Whether statistics are launched at the boundary before this step."""
        return step >= self.first_decision and (step - self.first_decision) % self.interval == 0

    def is_sampled(self, step: int) -> bool:
        """Whether a ``Sampler`` looks at this step: ``SAMPLES_PER_WINDOW`` times an interval, evenly spread."""
        if step < self.first_decision:
            return step >= self.warmup_steps
        before_decision = self.interval - 1 - (step - self.first_decision) % self.interval
        stride = max(1, self.interval // SAMPLES_PER_WINDOW)
        return before_decision % stride == 0 and before_decision // stride < SAMPLES_PER_WINDOW

    def is_measured(self, step: int) -> bool:
        """Whether bytes are counted in this step: the last one before a decision."""
        return self.is_decision(step + 1)

    def next_busy(self, step: int) -> int:
        """The first step from ``step`` on that is sampled or before which statistics are launched."""
        while not (self.is_sampled(step) or self.is_decision(step)):
            step += 1
        return step
