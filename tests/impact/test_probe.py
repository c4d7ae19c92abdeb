"""What probes sum up."""

from __future__ import annotations

import math

import pytest
import torch
from probing_support import CPU
from torch import Tensor

from gradckpt_dist.impact.probe import ProbeStatistics

ONE_ROW = torch.ones(1, 2, dtype=torch.float64)


def _statistics() -> ProbeStatistics:
    return ProbeStatistics(2, ("compress8", "compress4"), CPU)


def _gradients(own: float, passed: float) -> tuple[list[Tensor | None], list[Tensor | None]]:
    return [torch.tensor([own, 0.0]), None], [torch.tensor([passed])]


def test_errors_relative_to_the_gradients_under_keep() -> None:
    statistics = _statistics()
    statistics.add(1, "compress4", _gradients(2.0, 4.0), _gradients(2.5, 3.0))
    statistics.end_step(torch.tensor(8.0), ONE_ROW)
    first, second, dropped = statistics.take_window().split([13, 13, 1])
    assert first.tolist() == [0.0] * 13
    assert second.tolist() == [1, 0.5, 0.5, *[0] * 5, 1, 1 / 16, 1 / 16, 1 / 16, 1 / 16]
    assert dropped.item() == 0
    assert statistics.take_window().tolist() == [0.0] * 27


def test_what_first_order_theory_leaves_over_is_kept_beside() -> None:
    statistics = _statistics()
    values = torch.tensor([[2.0, 1.0], [6.0, 1.0], [1.0, 1.0], [4.0, 1.0]], dtype=torch.float64)
    statistics.add(0, "compress8", _gradients(2.0, 4.0), _gradients(2.5, 3.0))
    statistics.end_step(torch.tensor(8.0), values)
    window = statistics.take_window().tolist()
    assert window[:8] == pytest.approx([1, 0.5, 0.5 / 6, 1, 1 / 16, 1 / 16, 3 / 16, 4 / 16])


def test_a_block_without_gradient_has_no_error() -> None:
    statistics = _statistics()
    statistics.add(0, "compress8", _gradients(2.0, 0.0), _gradients(2.0, 0.0))
    statistics.end_step(torch.tensor(1.0), ONE_ROW)
    assert statistics.take_window()[3:6].tolist() == [1, 0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_dropped_and_counted(value: float) -> None:
    statistics = _statistics()
    statistics.add(0, "compress8", _gradients(value, 1.0), _gradients(1.0, 1.0))
    statistics.add(1, "compress8", _gradients(1.0, 1.0), _gradients(1.0, 1.0))
    statistics.end_step(torch.tensor(1.0), ONE_ROW)
    window = statistics.take_window()
    assert window[:13].tolist() == [0.0] * 13
    assert window[13] == 1
    assert window[-1] == 1
