"""Seconds between two marks."""

from __future__ import annotations

import torch

from gradckpt_dist.cost.clock import DeviceClock


def test_on_the_cpu_a_mark_is_a_moment_of_the_monotonic_clock() -> None:
    clock = DeviceClock(torch.device("cpu"))
    start, end = clock.mark(), clock.mark()
    assert clock.seconds(start, end) == end - start
    assert clock.seconds(1.0, 3.5) == 2.5


class _Event:
    """Stands in for an accelerator's event."""

    def __init__(self, milliseconds: float, done: bool) -> None:
        self.milliseconds = milliseconds
        self.done = done

    def query(self) -> bool:
        return self.done

    def elapsed_time(self, end: _Event) -> float:
        return end.milliseconds - self.milliseconds


def test_an_event_that_the_device_has_not_come_to_is_not_waited_for() -> None:
    clock = DeviceClock(torch.device("cpu"))
    clock._events = _Event
    assert clock.seconds(_Event(1.0, True), _Event(4.0, True)) == 0.003
    assert clock.seconds(_Event(1.0, True), _Event(4.0, False)) is None
