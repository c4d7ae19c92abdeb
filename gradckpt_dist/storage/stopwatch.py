"""How long an operation takes on its device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Seconds = Callable[[], float]


class Stopwatch:
    """Events on devices with streams, read when all is done; the monotonic clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = None if device.type in {"cpu", "meta"} else torch.get_device_module(device)

    def time(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Seconds]:
        """The function's result, and its seconds, to be asked for after ``wait``."""
        if self._module is None:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            seconds = time.perf_counter() - started
            return result, lambda: seconds
        before, after = (self._module.Event(enable_timing=True) for _ in range(2))
        before.record()
        result = function(*args, **kwargs)
        after.record()
        return result, lambda: before.elapsed_time(after) / 1e3

    def wait(self) -> None:
        """Until the device has come to the end of what was timed."""
        if self._module is not None:
            self._module.current_stream().synchronize()
