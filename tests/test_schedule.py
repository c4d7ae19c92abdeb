"""When a step is sampled, measured and decided."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradckpt_dist.schedule import Schedule

WARMUPS, INTERVALS = st.integers(0, 50), st.integers(2, 300)


def _decisions(schedule: Schedule, count: int) -> list[int]:
    return [schedule.first_decision + i * schedule.interval for i in range(count)]


@given(WARMUPS, INTERVALS)
def test_decisions_are_an_interval_apart_from_the_first_possible_one(warmup: int, interval: int) -> None:
    schedule = Schedule(warmup_steps=warmup, interval=interval)
    assert schedule.first_decision == warmup + min(4, interval)
    expected = _decisions(schedule, 4)
    assert [step for step in range(expected[-1] + 1) if schedule.is_decision(step)] == expected


@given(WARMUPS, INTERVALS)
def test_each_interval_has_min_4_interval_samples(warmup: int, interval: int) -> None:
    schedule = Schedule(warmup_steps=warmup, interval=interval)
    decisions = _decisions(schedule, 4)
    for start, end in zip([0, *decisions], decisions, strict=False):
        assert sum(schedule.is_sampled(step) for step in range(start, end)) == min(4, interval)
    assert not any(schedule.is_sampled(step) for step in range(warmup))


@given(WARMUPS, INTERVALS)
def test_the_measured_step_is_sampled_and_the_last_before_a_decision(warmup: int, interval: int) -> None:
    schedule = Schedule(warmup_steps=warmup, interval=interval)
    decisions = _decisions(schedule, 3)
    measured = [step for step in range(decisions[-1] + 1) if schedule.is_measured(step)]
    assert measured == [decision - 1 for decision in decisions]
    assert all(schedule.is_sampled(step) for step in measured)


@pytest.mark.parametrize(
    ("interval", "sampled"),
    [(2, [0, 1]), (4, [0, 1, 2, 3]), (8, [1, 3, 5, 7]), (50, [13, 25, 37, 49]), (51, [14, 26, 38, 50])],
)
def test_samples_are_spread_over_the_interval(interval: int, sampled: list[int]) -> None:
    schedule = Schedule(warmup_steps=5, interval=interval)
    first = schedule.first_decision
    assert [step - first for step in range(first, first + interval) if schedule.is_sampled(step)] == sampled
