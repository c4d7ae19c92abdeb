"""When in a step its process uses the most: while blocks run, or in between, in the loss."""

from __future__ import annotations

from typing import Any

import torch

from gradckpt_dist.cost.shadow import output_tensors
from gradckpt_dist.memory import MemoryMeter

_NOISE_BYTES = 1 << 20
"""What a process comes to need from time to time, whatever it computes."""


class StepPeaks:
    """The peaks of one step, from ``begin`` to ``end``. Nothing here runs in a step that is not measured.

    ``blocks_bytes`` is the peak of the process while it is in blocks. ``loss_bytes`` is that from the end of the last
    block's forward to the begin of its backward, where it is more than the forward has needed; else 0. What forward has
    freed may still be the process's, so that a lower peak would say nothing of the loss.
    """

    def __init__(self, meter: MemoryMeter) -> None:
        self._meter = meter
        self.blocks_bytes = self.loss_bytes = 0

    def begin(self) -> None:
        """The step begins."""
        self._meter.begin()
        self.blocks_bytes = self.loss_bytes = 0

    def leave_blocks(self, output: Any) -> None:
        """The last block's forward has returned ``output``."""
        self.end()
        watched = next((tensor for tensor in output_tensors(output) if tensor.requires_grad), None)
        if watched is not None:
            watched.register_hook(self._enter_blocks)  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """A part of the step that blocks are responsible for is over."""
        self.blocks_bytes = max(self.blocks_bytes, self._meter.peak_bytes())

    def _enter_blocks(self, _: torch.Tensor) -> None:
        peak_bytes = self._meter.peak_bytes()
        if peak_bytes > self.blocks_bytes + _NOISE_BYTES:
            self.loss_bytes = max(self.loss_bytes, peak_bytes)
        self._meter.begin()
