"""Saved tensors in host memory: counted, bounded, and nothing left behind."""

from __future__ import annotations

import logging

import pytest
import torch
from models import Function
from offload_support import CPU, KIB, assert_nothing_left, offloads, same, transformer
from storage_support import gradients, live_bytes, run
from torch import Tensor, nn

from gradckpt_dist.storage.hostpool import HostPool
from gradckpt_dist.storage.keep import Keep
from gradckpt_dist.storage.lane import OffloadLane
from gradckpt_dist.storage.ledger import Ledger
from gradckpt_dist.storage.offload import Offload
from gradckpt_dist.storage.saved import SMALL_BYTES

# -- bytes ----------------------------------------------------------------------------------------------------------


def test_a_storage_is_copied_once() -> None:
    size_bytes = 64 * 128 * 4
    lane = OffloadLane()
    storage = Offload(Function(lambda x: (x * x.flip(0)) + x.t().square().t() + x[3:].exp().sum()), lane)
    x = torch.randn(64, 128, requires_grad=True)
    output = storage.run(storage.block, x)
    assert storage.host_bytes == 3 * size_bytes == lane.pool.allocated_bytes  # x, its flip, the exponential of a part
    assert storage.held_bytes == 0
    output.sum().backward()
    del output
    assert_nothing_left([storage], lane)


def test_small_tensors_buffers_expanded_tensors_and_parameters_stay() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))
            self.register_buffer("table", torch.randn(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            row = x[:1, :] * 2
            return (x * self.weight).sum() + (x * self.table).sum() + (x * row.expand(64, 64)).sum()

    block = Mixed()
    storage = Offload(block, OffloadLane())
    x = torch.randn(64, 64, requires_grad=True)
    output = storage.run(block, x)
    assert x.untyped_storage().nbytes() == SMALL_BYTES
    assert storage.host_bytes == SMALL_BYTES  # x alone
    assert storage.held_bytes == SMALL_BYTES + 64 * 4  # the table and the row, not the weight
    output.backward()


def test_held_bytes_reach_the_ledger() -> None:
    (block,) = transformer(1)
    held = {}
    for storage in (Keep(block), Offload(block, OffloadLane())):
        ledger = Ledger(1)
        ledger.begin_forward()
        x = torch.randn(2, 128, 64, requires_grad=True)
        output = ledger.run(0, storage, block, (x,), {})
        ledger.end_forward()
        held[storage.name] = ledger.measurement().stored_bytes[0]
        assert ledger.measurement().keep_bytes[0] >= 0.9 * held["keep"]
        del output
    # What stays: means and deviations of two norms, the attention's log-sum-exp and its random state.
    assert 0 < held["offload"] < 0.04 * held["keep"]


def test_what_is_fetched_reaches_the_ledgers_peak() -> None:
    size_bytes = 64 * 128 * 4
    ledger = Ledger(4)
    storages = offloads([Function(torch.exp) for _ in range(4)])
    ledger.begin_forward()
    x = torch.randn(64, 128, requires_grad=True)
    for index, storage in enumerate(storages):
        x = ledger.run(index, storage, storage.block, (x,), {})
    ledger.end_forward()
    assert ledger.live_bytes == 0
    x.sum().backward()
    del x
    assert ledger.live_bytes == 0
    assert ledger.measurement().peak_bytes == 2 * size_bytes


def test_fetches_the_next_block_of_backward_and_no_further() -> None:
    size_bytes = 64 * 128 * 4
    lane = OffloadLane()
    storages = offloads([Function(torch.exp) for _ in range(4)], lane)
    x = torch.randn(64, 128, requires_grad=True)
    seen: list[list[int]] = []
    y = x
    for storage in storages:
        y = storage.run(storage.block, y)
        y.register_hook(lambda _: seen.append([storage.held_bytes for storage in storages]))
    assert [storage.host_bytes for storage in storages] == [size_bytes] * 4
    y.sum().backward()
    # Each is read as a block's backward begins: by then that block was fetched, while the one after it was at work.
    assert seen == [
        [0, 0, 0, 0],
        [0, 0, size_bytes, 0],
        [0, size_bytes, 0, 0],
        [size_bytes, 0, 0, 0],
    ]
    del y
    assert_nothing_left(storages, lane)


def test_two_forwards_before_a_backward() -> None:
    blocks = transformer(3)
    lane = OffloadLane()
    storages = offloads(blocks, lane)
    batches = [torch.randn(2, 128, 64) for _ in range(2)]
    reference = [gradients([Keep(block) for block in blocks], x)[0] for x in batches]
    leaves, losses = [], []
    for x in batches:
        torch.manual_seed(1)
        leaves.append(x.clone().requires_grad_())
        losses.append(run(storages, leaves[-1]).square().mean())
    for leaf, loss, expected in zip(leaves, losses, reference, strict=True):  # 1F1B: the oldest first
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)
    losses.clear()
    del loss
    assert_nothing_left(storages, lane)


def test_buffers_are_used_again() -> None:
    blocks = transformer()
    lane = OffloadLane()
    storages = offloads(blocks, lane)
    gradients(storages, torch.randn(2, 128, 64))
    allocations, allocated_bytes = lane.pool.allocations, lane.pool.allocated_bytes
    for _ in range(3):
        gradients(storages, torch.randn(2, 128, 64))
    assert (lane.pool.allocations, lane.pool.allocated_bytes) == (allocations, allocated_bytes)
    assert_nothing_left(storages, lane)


def test_limit_is_kept_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    blocks = transformer()
    x = torch.randn(2, 128, 64)
    reference = gradients([Keep(block) for block in blocks], x)
    lane = OffloadLane(limit_bytes=600 * KIB)
    storages = offloads(blocks, lane)
    with caplog.at_level(logging.WARNING, "gradckpt_dist"):
        for _ in range(2):
            assert same(gradients(storages, x), reference)
    assert 0 < lane.pool.allocated_bytes <= 600 * KIB
    assert [record.message for record in caplog.records if "limit" in record.message] == [caplog.records[0].message]
    torch.manual_seed(1)
    output = run(storages, x.requires_grad_())
    held = sum(storage.held_bytes for storage in storages)
    assert sum(storage.host_bytes for storage in storages) <= 600 * KIB < held
    del output
    assert_nothing_left(storages, lane)


def test_a_limit_of_nothing_is_keep(caplog: pytest.LogCaptureFixture) -> None:
    lane = OffloadLane(limit_bytes=0)
    storage = Offload(Function(torch.exp), lane)
    output = storage.run(storage.block, torch.randn(64, 128, requires_grad=True))
    assert (storage.held_bytes, storage.host_bytes) == (64 * 128 * 4, 0)
    output.sum().backward()
    assert "stays on the device" in caplog.text


def test_pool_gives_idle_buffers_up_for_other_sizes() -> None:
    pool = HostPool(100 * KIB)
    buffers = [pool.take(40 * KIB, CPU) for _ in range(2)]
    assert [buffer is not None and buffer.numel() for buffer in buffers] == [40 * KIB] * 2
    assert pool.take(40 * KIB, CPU) is None
    for buffer in buffers:
        assert buffer is not None
        pool.give(buffer, CPU)
    large = pool.take(64 * KIB, CPU)
    assert large is not None
    assert (pool.allocated_bytes, pool.idle_bytes) == (64 * KIB, 0)
    odd = pool.take(17 * KIB, CPU)
    assert odd is not None
    assert 17 * KIB <= odd.numel() <= 1.125 * 17 * KIB


# -- nothing stays ---------------------------------------------------------------------------------------------------


def test_nothing_stays_after_forward_alone() -> None:
    blocks = transformer()
    lane = OffloadLane()
    storages = offloads(blocks, lane)
    x = torch.randn(2, 128, 64, requires_grad=True)
    before = live_bytes()
    output = run(storages, x)
    assert sum(storage.host_bytes for storage in storages) > 0
    del output
    assert_nothing_left(storages, lane)
    assert live_bytes() == before + lane.pool.allocated_bytes


def test_an_output_that_is_saved_does_not_keep_itself_alive() -> None:
    lane = OffloadLane()
    storage = Offload(Function(lambda x: (x[:4, :4].exp(), x.exp())), lane)  # one stays, one goes
    outputs = storage.run(storage.block, torch.randn(64, 128, requires_grad=True))
    assert storage.held_bytes == 64
    del outputs
    assert_nothing_left([storage], lane)


def test_nothing_stays_after_an_exception() -> None:
    def fail(x: Tensor) -> Tensor:
        x = x.exp().sigmoid()
        raise ValueError(f"shape {tuple(x.shape)}")

    lane = OffloadLane()
    storages = offloads([Function(torch.exp), Function(fail)], lane)
    with pytest.raises(ValueError, match="shape"):
        run(storages, torch.randn(64, 128, requires_grad=True))
    assert_nothing_left(storages, lane)
    with pytest.raises(RuntimeError, match="second time"):
        output = run(storages[:1], torch.randn(64, 128, requires_grad=True))
        output.sum().backward()
        output.sum().backward()
