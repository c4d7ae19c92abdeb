"""Seconds and bytes of a GPU."""

from __future__ import annotations

import pytest
import torch

from gradckpt_dist.agreement.collectives import LocalAgreement
from gradckpt_dist.cost.allocations import Allocations
from gradckpt_dist.cost.clock import DeviceClock
from gradckpt_dist.memory import memory_meter

GPU = torch.device("cuda")
MIB = 2**20


def test_a_span_is_unknown_until_the_device_has_come_to_its_end() -> None:
    clock = DeviceClock(GPU)
    start = clock.mark()
    torch.cuda._sleep(200_000_000)
    end = clock.mark()
    assert clock.seconds(start, end) is None
    torch.cuda.synchronize()
    assert clock.seconds(start, end) == pytest.approx(0.1, rel=0.5)


def test_the_peak_is_that_since_begin() -> None:
    meter = memory_meter(GPU)
    meter.begin()
    before = meter.peak_bytes()
    block = torch.empty(64 * MIB, dtype=torch.uint8, device=GPU)
    assert meter.peak_bytes() == before + 64 * MIB
    del block
    assert meter.peak_bytes() == before + 64 * MIB
    meter.begin()
    assert meter.peak_bytes() == before
    assert torch.cuda.get_device_properties(0).total_memory >= meter.available_bytes() > before


def test_a_recording_has_the_peak_of_the_allocator() -> None:
    weight = torch.randn(1024, 1024, device=GPU, requires_grad=True)
    torch.mm(weight, weight).sum().backward()  # the matrix product's workspace
    with Allocations(GPU, enabled=True) as allocations:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.mm(weight, weight).exp().sum().backward()
        peak = torch.cuda.max_memory_allocated() - before
    assert peak >= 2 * weight.nbytes
    assert allocations.peak_bytes == pytest.approx(peak, abs=4096)


def test_a_single_process_does_not_wait_for_what_was_queued_since() -> None:
    agreement = LocalAgreement()
    sums = torch.ones(4, dtype=torch.float64, device=GPU)
    torch.cuda.synchronize()
    agreement.launch(sums, [1.0], 0, 0)
    torch.cuda._sleep(2_000_000_000)
    end = torch.cuda.Event()
    end.record()
    assert agreement.collect() == ([1.0] * 4, [1.0])
    assert not end.query()
    torch.cuda.synchronize()
