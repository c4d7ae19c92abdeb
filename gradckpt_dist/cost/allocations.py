"""The most that a run has allocated at once, by a profiler of PyTorch's.

The allocator alone sees gradients on their way, and what compiled code makes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, Self

import torch
from torch._C import _autograd
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig


class Allocations:
    """Entered around a forward or a backward; it takes about 25 ms, and does nothing unless ``enabled``.

    PyTorch's current profiler (torch 2.13) writes two lines to stderr whenever it is used; the one before it does not,
    and may be gone from a later release. Then, on devices but the CPU and CUDA, and beside a profiler of the user's,
    nothing is recorded. What is freed inside has to be from inside, too, or from the recording before: else it counts
    if its address was another tensor's in an earlier recording. Hence Python collects no garbage meanwhile.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.peak_bytes: int | None = None
        """The most at once beside what was there before; None if nothing was recorded."""
        self._field = f"{device.type}_memory_usage"
        self._enabled = enabled and device.type in {"cpu", "cuda"} and hasattr(_autograd, "_enable_profiler_legacy")
        self._recording = self._collects = False

    def __enter__(self) -> Self:
        if self._enabled and not _autograd._profiler_enabled():
            self._collects = gc.isenabled()
            gc.disable()
            _autograd._enable_profiler_legacy(_config())
            self._recording = True
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._recording:
            self._recording = False
            events = _autograd._disable_profiler_legacy()
            if self._collects:
                gc.enable()
            self.peak_bytes = max(accumulate(self._changes(events), initial=0))

    def _changes(self, threads: list[list[Any]]) -> Iterator[int]:
        """Bytes allocated, negative where freed, in the order of time."""
        events = [event for thread in threads for event in thread if event.kind() == "memory_alloc"]
        for event in sorted(events, key=lambda event: event.start_us()):
            yield getattr(event, self._field)()


def _config() -> ProfilerConfig:
    """Memory, and no shapes, stacks, operations' floating-point counts or modules."""
    return ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
