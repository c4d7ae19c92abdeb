"""The running mean over decisions, which no rank may spoil."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradckpt_dist.impact import IMPACTS, RunningImpact, create_impact

ANY = st.floats(allow_nan=True, allow_infinity=True)


def test_first_windows_are_a_plain_mean_and_later_ones_weigh_a_quarter() -> None:
    running = RunningImpact(2)
    assert running.impacts() == ()
    values = [4.0, 8.0, 3.0, 1.0, 10.0]
    for value in values[:4]:
        assert running.update([2 * value, 2 * 1.0, 2, 0])
    assert running.mean_square == pytest.approx([sum(values[:4]) / 4, 1.0])
    assert running.update([10.0, 1.0, 1, 0])
    assert running.mean_square == pytest.approx([4.0 * 0.75 + 10.0 * 0.25, 1.0])
    assert running.impacts() == pytest.approx((math.sqrt(5.5), 1.0))
    assert (running.decisions, running.dropped_samples) == (5, 0)


def test_window_without_a_sample_changes_nothing() -> None:
    running = RunningImpact(2)
    assert running.update([1.0, 3.0, 2, 0])
    assert not running.update([0.0, 0.0, 0, 3])
    assert running.mean_square == [0.5, 1.5]
    assert (running.decisions, running.dropped_samples) == (1, 3)


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_faulty_window_is_dropped(fault: float, position: int) -> None:
    running = RunningImpact(2)
    running.update([1.0, 3.0, 2, 0])
    window = [1.0, 1.0, 2.0, 0.0]
    window[position] = fault
    assert not running.update(window)
    assert running.mean_square == [0.5, 1.5]
    assert running.decisions == 1
    assert running.dropped_samples == 1


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf, -1.0])
def test_a_faulty_count_of_drops_is_not_counted(fault: float) -> None:
    running = RunningImpact(2)
    running.update([1.0, 3.0, 2, 5])
    assert running.update([1.0, 3.0, 2, fault])
    assert running.mean_square == [0.5, 1.5]
    assert running.dropped_samples == 5


@given(st.lists(st.lists(ANY, min_size=5, max_size=5), max_size=8))
def test_mean_stays_finite_whatever_arrives(windows: list[list[float]]) -> None:
    running = RunningImpact(3)
    for window in windows:
        running.update(window)
        assert len(running.impacts()) in {0, 3}
        assert all(math.isfinite(impact) and impact >= 0 for impact in running.impacts())
        assert running.dropped_samples >= 0


def test_metrics_by_name() -> None:
    assert list(IMPACTS) == ["norm", "influence", "probe"]
    impact = create_impact("norm", 3, torch.device("cpu"))
    assert (impact.name, impact.blocks, impact.device.type) == ("norm", 3, "cpu")
    assert impact.take_window().tolist() == [0.0] * 5
