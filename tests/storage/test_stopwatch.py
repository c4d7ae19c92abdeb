"""The time an operation takes."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from gradckpt_dist.storage.stopwatch import Stopwatch


def test_result_and_seconds_on_the_host() -> None:
    stopwatch = Stopwatch(torch.device("cpu"))

    def work(value: int, *, more: int) -> int:
        time.sleep(0.02)
        return value + more

    result, seconds = stopwatch.time(work, (1,), {"more": 2})
    stopwatch.wait()
    assert result == 3
    assert seconds() >= 0.02
    assert seconds() == seconds()


def test_events_of_a_device_are_read_after_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, end: Event) -> float:
            log.append("elapsed")
            return 250.0

    class Module:
        @staticmethod
        def current_stream() -> Any:
            return type("Stream", (), {"synchronize": lambda _: log.append("wait")})()

    Module.Event = Event  # type: ignore[attr-defined]
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    stopwatch = Stopwatch(torch.device("cuda"))
    result, seconds = stopwatch.time(lambda: log.append("run"), (), {})
    stopwatch.wait()
    assert result is None
    assert seconds() == 0.25
    assert log == ["record", "run", "record", "wait", "elapsed"]
