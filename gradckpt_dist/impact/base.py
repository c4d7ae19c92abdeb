"""What every impact metric is, and the running mean that policies read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

MEMORY, MEMORY_BESIDE_PROBES = 4, 8
"""Windows that running means are made of; beside probes, a window has about half as many samples."""

LARGEST_SUM = 1e30
"""More than any rank can have gathered; what is made of a larger number might not be finite."""


class Impact(ABC):
    """Gathers one number per block on the device, in sampled steps, without a host synchronisation."""

    name: ClassVar[str]
    fields: ClassVar[int] = 1
    """Numbers gathered per block; the first is the squared gradient norm at its output."""

    def __init__(self, blocks: int, device: torch.device) -> None:
        self.blocks = blocks
        self.device = device

    @abstractmethod
    def watch(self, index: int, output: Any, inputs: Any = ()) -> None:
        """Arrange for the gradient at this output of the block at ``index`` to be gathered."""

    @abstractmethod
    def step_values(self) -> torch.Tensor:
        """[fields, blocks] on the device: what the step under way has gathered, divided by ``step_scale``; else NaN."""

    @abstractmethod
    def step_scale(self) -> torch.Tensor:
        """The mean over blocks of the step's squared gradient norms, which carries the scale of its loss."""

    @abstractmethod
    def spoil(self) -> None:
        """Have the step under way dropped when it is closed."""

    @abstractmethod
    def end_step(self) -> None:
        """Close a sampled step: fold it into the window, or drop it if it holds a non-finite value."""

    @abstractmethod
    def take_window(self) -> torch.Tensor:
        """Float64 [fields x blocks + 2]: sums over the window's steps, steps counted, dropped; then start anew."""


@dataclass
class RunningImpact:
    """The mean of what a metric gathers over decisions; a decision's weight is never below 1 / ``memory``.

    ``mean_square`` is [fields x blocks], I_i^2 first.
    """

    blocks: int
    fields: int = 1
    memory: int = MEMORY
    mean_square: list[float] = field(default_factory=list)
    decisions: int = 0
    dropped_samples: int = 0

    def update(self, sums: Sequence[float]) -> bool:
        """Fold in a window as ``Impact.take_window`` gives it, summed over ranks; False if it holds no sample.

        A window that a faulty rank has made non-finite or negative counts as dropped.
        """
        *squares, count, dropped = sums
        self.dropped_samples += int(dropped) if _sound(dropped) else 0
        sound = all(_sound(value) for value in (*squares, count))
        if not sound:
            self.dropped_samples += 1
        if not sound or count < 1:
            return False
        self.decisions += 1
        weight = 1 / min(self.decisions, self.memory)
        old = self.mean_square or [0.0] * (self.fields * self.blocks)
        self.mean_square = [(1 - weight) * a + weight * b / count for a, b in zip(old, squares, strict=True)]
        return True

    def impacts(self) -> tuple[float, ...]:
        """I_i by block; their mean square is 1. Empty before the first sample."""
        return tuple(math.sqrt(value) for value in self.mean_square[: self.blocks])


def _sound(value: float) -> bool:
    return 0 <= value <= LARGEST_SUM  # false for NaN
