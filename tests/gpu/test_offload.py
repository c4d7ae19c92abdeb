"""Copies on a stream of their own, beside the computation."""

from __future__ import annotations

import torch
from offload_support import assert_nothing_left, offloads, same
from storage_support import gradients, storages
from text_model import Block

from gradckpt_dist.storage.lane import OffloadLane

SLEEP_CYCLES = 20_000_000


def _blocks(depth: int = 4) -> list[Block]:
    torch.manual_seed(0)
    return [Block(512, 8, 0.1).cuda() for _ in range(depth)]


def test_gradients_are_bitwise_however_late_the_copies_are() -> None:
    blocks = _blocks()
    x = torch.randn(4, 512, 512, device="cuda")
    lane = OffloadLane()
    ones = offloads(blocks, lane)
    reference = gradients(storages("keep", blocks), x)
    stream = lane.carrier(x.device)._stream
    for step in range(12):
        if step % 3 == 1:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(SLEEP_CYCLES)
        if step % 3 == 2:
            torch.cuda._sleep(SLEEP_CYCLES)
        assert same(gradients(ones, x), reference)
    torch.cuda.synchronize()
    assert_nothing_left(ones, lane)
    assert lane.pool.allocations == len({id(buffer) for buffers in lane.pool._idle.values() for buffer in buffers})


def test_the_device_is_left_with_little() -> None:
    blocks = _blocks()
    x = torch.randn(4, 512, 512, device="cuda", requires_grad=True)
    held = []
    for ones in (storages("keep", blocks), offloads(blocks)):
        gradients(ones, x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        output = x
        for one in ones:
            output = one.run(one.block, output)
        held.append(torch.cuda.memory_allocated() - before - output.nbytes)
        output.sum().backward()
        del output
    assert held[1] < 0.05 * held[0]


def test_buffers_are_pinned() -> None:
    lane = OffloadLane()
    gradients(offloads(_blocks(1), lane), torch.randn(4, 512, 512, device="cuda"))
    buffers = [buffer for idle in lane.pool._idle.values() for buffer in idle]
    assert buffers
    assert all(buffer.is_pinned() for buffer in buffers)
