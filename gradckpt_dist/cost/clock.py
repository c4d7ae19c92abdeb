"""Seconds of what a device does, without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import torch

Mark = Any
"""A moment: seconds of the monotonic clock on the CPU, an event on an accelerator's current stream."""


class DeviceClock:
    """Device events on accelerators, the monotonic clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._events = None if device.type == "cpu" else torch.get_device_module(device).Event

    def mark(self) -> Mark:
        """This moment, in the order of the device's work."""
        if self._events is None:
            return time.perf_counter()
        event = self._events(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Mark, end: Mark) -> float | None:
        """Between two marks; None while the device has not come to the second one. Never waits."""
        if self._events is None:
            return float(end - start)
        return float(start.elapsed_time(end)) / 1e3 if end.query() else None

    def wait(self, start: Mark, end: Mark) -> float:
        """The same, once the device has come to the second one. For benches."""
        if self._events is not None:
            end.synchronize()
        return float(self.seconds(start, end))  # type: ignore[arg-type]
