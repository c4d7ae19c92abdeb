"""What a change of mask costs, from the steps after it."""

from __future__ import annotations

from gradckpt_dist.adapters.deepspeed_steps import AFTERMATH_STEPS, BASELINE_STEPS, ChangeClock

KEEP, MIXED = ("keep", "keep"), ("keep", "recompute")


class Steps:
    """Steps of given seconds."""

    def __init__(self) -> None:
        self.clock, self.now = ChangeClock(), 0.0

    def run(self, storages: tuple[str, ...], *seconds: float) -> None:
        for duration in seconds:
            self.now += duration
            self.clock.end_step(self.now, storages)


def test_cost_is_what_the_steps_after_a_change_take_longer() -> None:
    steps = Steps()
    steps.run(KEEP, *[1.0] * 30)
    assert (steps.clock.changes, steps.clock.seconds) == (0, 0.0)
    later = [2.0] * (BASELINE_STEPS - 1) + [50.0]  # the new mask is slower, and one step was disturbed
    steps.run(MIXED, *[5.0] * AFTERMATH_STEPS, *later)
    assert (steps.clock.changes, steps.clock.seconds) == (1, 6.0)
    steps.run(MIXED, *[9.0] * 30)
    assert steps.clock.seconds == 6.0
    steps.run(KEEP, *[1.0] * (AFTERMATH_STEPS + BASELINE_STEPS))
    assert (steps.clock.changes, steps.clock.seconds) == (2, 3.0)


def test_a_change_that_is_followed_by_another_is_not_counted() -> None:
    steps = Steps()
    steps.run(KEEP, 1.0, 1.0)
    steps.run(MIXED, 9.0, 9.0, 1.0)
    steps.run(KEEP, 3.0, 3.0, *[2.0] * BASELINE_STEPS)
    assert (steps.clock.changes, steps.clock.seconds) == (1, 2.0)


def test_faster_steps_after_a_change_are_no_gain() -> None:
    steps = Steps()
    steps.run(KEEP, 1.0)
    steps.run(MIXED, 1.0, 1.0, *[2.0] * BASELINE_STEPS)
    assert (steps.clock.changes, steps.clock.seconds) == (1, 0.0)
