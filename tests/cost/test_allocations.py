"""What a run has allocated at once is counted exactly; where it cannot be, nothing is claimed."""

from __future__ import annotations

import gc

import pytest
import torch
from probing_support import CPU

from gradckpt_dist.cost.allocations import Allocations

SIZE = 64 * 64 * 4
"""Bytes of a [64, 64] of float32."""
SCALARS = 64
"""More than the bytes of the numbers that operations are given."""


def _allocations() -> Allocations:
    return Allocations(CPU, enabled=True)


def test_the_most_at_once_counts_and_not_the_sum() -> None:
    x = torch.ones(64, 64)
    with _allocations() as allocations:
        for _ in range(3):
            y = x * 2
            z = y * 2
            del y, z
    assert 2 * SIZE <= (allocations.peak_bytes or 0) <= 2 * SIZE + SCALARS


def test_what_was_there_before_does_not_count() -> None:
    x = torch.ones(64, 64)
    with _allocations() as first:
        y = x + 1
    with _allocations() as second:
        del y
        z = x + 2
    assert SIZE <= (first.peak_bytes or 0) <= SIZE + SCALARS
    assert 0 <= (second.peak_bytes or 0) <= SCALARS
    assert z.sum() == 3 * 64 * 64


def test_gradients_on_their_way_count() -> None:
    x = torch.ones(64, 64, requires_grad=True)
    loss = (x * 2).exp().sum()
    with _allocations() as allocations:
        torch.autograd.grad(loss, x, retain_graph=True)
    # exp's gradient and that of its input, beside what exp has saved.
    assert 2 * SIZE <= (allocations.peak_bytes or 0) <= 2 * SIZE + SCALARS


def test_garbage_is_not_freed_meanwhile() -> None:
    with _allocations():  # what was allocated while nothing was recorded is not missed when it is freed
        cycle: list[object] = [torch.ones(64, 64)]
    cycle.append(cycle)
    del cycle
    with _allocations() as allocations:
        lists: list[list[None]] = [[] for _ in range(10 * gc.get_threshold()[0])]
        x = torch.ones(64, 64)
    assert SIZE <= (allocations.peak_bytes or 0) <= SIZE + SCALARS
    assert gc.isenabled()
    del lists, x


def test_nothing_is_recorded_unless_enabled() -> None:
    with Allocations(CPU, enabled=False) as allocations:
        torch.ones(8)
    assert allocations.peak_bytes is None


def test_a_users_profiler_goes_on_undisturbed() -> None:
    with torch.autograd.profiler.profile() as users:
        with _allocations() as allocations:
            torch.ones(64, 64) + 1
        torch.ones(8).exp()
    assert allocations.peak_bytes is None
    assert "aten::exp" in {event.key for event in users.key_averages()}


def test_an_error_ends_the_recording() -> None:
    with pytest.raises(ValueError, match="inside"), _allocations():
        raise ValueError("inside")
    with _allocations() as allocations:
        torch.ones(64, 64) + 1
    assert 2 * SIZE <= (allocations.peak_bytes or 0) <= 2 * SIZE + SCALARS
