"""The peaks of a step, of its blocks and of its loss."""

from __future__ import annotations

import torch
from torch import Tensor

from gradckpt_dist.memory import HostMeter
from gradckpt_dist.peaks import StepPeaks

MIB = 2**20


class Meter:
    """What a process would say of itself; ``restarts`` if it forgets."""

    def __init__(self, *, restarts: bool) -> None:
        self._restarts = restarts
        self._peak_bytes = 0

    def begin(self) -> None:
        if self._restarts:
            self._peak_bytes = 0

    def peak_bytes(self) -> int:
        return self._peak_bytes

    def available_bytes(self) -> int:
        return 0

    def use(self, mebibytes: int) -> None:
        self._peak_bytes = max(self._peak_bytes, mebibytes * MIB)


def _peaks(meter: Meter, *micro_batches: tuple[int, int, int]) -> tuple[int, int]:
    """Of a step whose blocks' forward, loss and blocks' backward use so much, in MiB."""
    peaks = StepPeaks(meter)
    peaks.begin()
    for forward, loss, backward in micro_batches:
        meter.use(forward)
        output = torch.ones(1, requires_grad=True) * 2
        peaks.leave_blocks((None, output))
        meter.use(loss)
        output.sum().backward()
        meter.use(backward)
    peaks.end()
    return peaks.blocks_bytes // MIB, peaks.loss_bytes // MIB


def test_the_loss_has_a_peak_where_it_uses_more_than_forward_did() -> None:
    assert _peaks(Meter(restarts=True), (30, 50, 40)) == (40, 50)
    assert _peaks(Meter(restarts=True), (30, 50, 70)) == (70, 50)
    assert _peaks(Meter(restarts=True), (30, 31, 20)) == (30, 0)
    assert _peaks(Meter(restarts=True), (60, 50, 40)) == (60, 0)


def test_the_most_of_all_micro_batches_counts() -> None:
    assert _peaks(Meter(restarts=True), (30, 50, 40), (35, 45, 30)) == (40, 50)
    assert _peaks(Meter(restarts=True), (30, 35, 40), (30, 55, 20)) == (40, 55)


def test_where_a_peak_cannot_be_forgotten_the_blocks_have_that_of_the_loss() -> None:
    assert _peaks(Meter(restarts=False), (30, 50, 40)) == (50, 50)
    assert _peaks(Meter(restarts=False), (30, 50, 70)) == (70, 50)


def test_an_output_without_gradient_leaves_all_to_the_blocks() -> None:
    meter = Meter(restarts=True)
    peaks = StepPeaks(meter)
    peaks.begin()
    peaks.leave_blocks(torch.ones(1))
    meter.use(50)
    peaks.end()
    assert (peaks.blocks_bytes, peaks.loss_bytes) == (50 * MIB, 0)


def test_a_real_loss_that_is_larger_than_the_blocks() -> None:
    peaks = StepPeaks(HostMeter())
    peaks.begin()
    output: Tensor = torch.ones(8, requires_grad=True) * 2
    peaks.leave_blocks(output)
    before = peaks.blocks_bytes
    output[:, None].expand(8, 8 * MIB).contiguous().sum().backward()
    assert peaks.loss_bytes - before > 200 * MIB  # of 256, in an allocation too large for what others have left
