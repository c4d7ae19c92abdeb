"""Saved tensors in host memory: exact, counted, bounded, and nothing left behind."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from models import Function
from text_model import Block
from torch import Tensor, nn

import gradckpt_dist
from gradckpt_dist.storage import Storage, StorageContext, create_storage
from gradckpt_dist.storage.hostpool import HostPool
from gradckpt_dist.storage.keep import Keep
from gradckpt_dist.storage.lane import OffloadLane
from gradckpt_dist.storage.ledger import Ledger
from gradckpt_dist.storage.offload import Offload
from gradckpt_dist.storage.saved import SMALL_BYTES

CPU = torch.device("cpu")
KIB = 1024


class BatchNormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.convolution(x)))


def offloads(blocks: Sequence[nn.Module], lane: OffloadLane | None = None) -> list[Offload]:
    lane = lane or OffloadLane()
    return [Offload(block, lane) for block in blocks]


def transformer(depth: int = 4, dropout: float = 0.1) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Block(64, 4, dropout) for _ in range(depth)]


def run(storages: Sequence[Storage], x: Tensor) -> Tensor:
    for storage in storages:
        x = storage.run(storage.block, x)
    return x


def gradients(storages: Sequence[Storage], x: Tensor, **options: Any) -> list[Tensor]:
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    parameters = [parameter for storage in storages for parameter in storage.block.parameters()]
    return list(torch.autograd.grad(run(storages, x).square().mean(), [x, *parameters], **options))


def same(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def assert_nothing_left(storages: Sequence[Offload], lane: OffloadLane) -> None:
    assert [(storage.held_bytes, storage.host_bytes) for storage in storages] == [(0, 0)] * len(storages)
    assert lane.pool.idle_bytes == lane.pool.allocated_bytes


# -- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_bitwise(autocast: bool) -> None:
    blocks = transformer()
    x = torch.randn(2, 128, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        reference = gradients([Keep(block) for block in blocks], x)
        assert same(gradients(offloads(blocks), x), reference)


def test_running_statistics_are_updated_once() -> None:
    torch.manual_seed(0)
    block = BatchNormBlock()
    x = torch.randn(4, 8, 16, 16)
    lane = OffloadLane()
    storage = Offload(block, lane)
    before = block.norm.running_mean.clone()
    reference = gradients([Keep(block)], x)
    once = block.norm.running_mean.clone()
    block.norm.reset_running_stats()
    assert torch.equal(block.norm.running_mean, before)
    assert same(gradients([storage], x), reference)
    assert torch.equal(block.norm.running_mean, once)
    assert_nothing_left([storage], lane)


def test_double_backward_is_exact() -> None:
    block = Function(lambda x: torch.sigmoid(x * x.exp()))
    lane = OffloadLane()
    storage = Offload(block, lane)
    x = torch.randn(64, 128)
    second = []
    for one in (Keep(block), storage):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(one.run(block, leaf).sum(), leaf, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), leaf)[0])
        del first
    assert torch.equal(*second)


def test_a_retained_graph_can_be_used_again() -> None:
    blocks = transformer(2)
    lane = OffloadLane()
    storages = offloads(blocks, lane)
    x = torch.randn(2, 128, 64, requires_grad=True)
    loss = run(storages, x).square().mean()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    del loss
    assert_nothing_left(storages, lane)


def test_the_random_stream_is_untouched() -> None:
    blocks = transformer()
    x = torch.randn(2, 128, 64)
    states = []
    for storages in ([Keep(block) for block in blocks], offloads(blocks)):
        gradients(storages, x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.chunk(3, dim=-1)[1].exp(),
        lambda x: x.t().exp().sigmoid(),
        lambda x: x[3:, 1::2].exp() * x[3:, ::2],
        lambda x: torch.view_as_complex(x.unflatten(-1, (-1, 2))).conj().exp().abs(),
        lambda x: x[:1].expand(96, 96).exp() * x,
        lambda x: x.to(torch.float64).exp().to(torch.bfloat16).exp().float(),
    ],
)
def test_views_and_dtypes_come_back(function: Callable[[Tensor], Tensor]) -> None:
    block = Function(function)
    x = torch.randn(96, 96)
    lane = OffloadLane()
    storage = Offload(block, lane)
    assert same(gradients([storage], x), gradients([Keep(block)], x))
    assert_nothing_left([storage], lane)


# -- in-place changes -----------------------------------------------------------------------------------------------


def test_a_change_after_saving_is_an_error() -> None:
    lane = OffloadLane()
    storage = Offload(Function(torch.exp), lane)
    x = torch.randn(64, 128, requires_grad=True)
    output = storage.run(storage.block, x)
    output.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*is at version 1, expected version 0"):
        output.sum().backward()


def test_a_change_of_what_has_stayed_is_an_error() -> None:
    storage = Offload(Function(torch.exp), OffloadLane())
    output = storage.run(storage.block, torch.randn(4, requires_grad=True))
    output.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_storage_changed_between_two_saves_is_copied_twice() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 1
        z = y.detach()
        first = x * z
        z.add_(1)
        return first.detach() + x * z

    lane = OffloadLane()
    storage = Offload(Function(function), lane)
    x = torch.randn(64, 128, requires_grad=True)
    output = storage.run(storage.block, x)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(gradient, x.detach() + 1)
    assert lane.pool.allocations == 2


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


def _live_bytes() -> int:
    gc.collect()
    storages = {
        thing.untyped_storage()._cdata: thing.untyped_storage().nbytes()
        for thing in gc.get_objects()
        if type(thing) in (Tensor, nn.Parameter)
    }
    return sum(storages.values())


def test_nothing_stays_after_forward_alone() -> None:
    blocks = transformer()
    lane = OffloadLane()
    storages = offloads(blocks, lane)
    x = torch.randn(2, 128, 64, requires_grad=True)
    before = _live_bytes()
    output = run(storages, x)
    assert sum(storage.host_bytes for storage in storages) > 0
    del output
    assert_nothing_left(storages, lane)
    assert _live_bytes() == before + lane.pool.allocated_bytes


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


# -- around it --------------------------------------------------------------------------------------------------------


def test_blocks_of_one_context_share_a_lane() -> None:
    context = StorageContext()
    storages = [create_storage("offload", block, context) for block in transformer(2)]
    output = run(storages, torch.randn(2, 128, 64, requires_grad=True))
    assert context.lane.pool.allocated_bytes == sum(
        storage.host_bytes for storage in storages if isinstance(storage, Offload)
    )
    del output


def test_in_an_engine_it_is_bitwise_and_shares_the_lane() -> None:
    model = nn.Sequential(*transformer())
    x = torch.randn(2, 128, 64)
    engine = gradckpt_dist.enable(model, {"storages": ["keep", "recompute", "offload"]}, blocks=list("0123"))

    def step(mask: list[str]) -> list[Tensor]:
        engine.set_mask(mask)
        torch.manual_seed(1)
        return list(torch.autograd.grad(model(x).square().mean(), list(model.parameters())))

    reference = step(["keep"] * 4)
    assert same(step(["offload"] * 4), reference)
    lane = engine._gate.context.lane
    assert lane.pool.allocations > 0
    assert same(step(["offload", "keep", "recompute", "offload"]), reference)
    assert lane.pool.idle_bytes == lane.pool.allocated_bytes
    with torch.no_grad():
        before = lane.pool.allocations
        model(torch.randn(3, 100, 64))
        assert lane.pool.allocations == before
    engine.disable()


def test_compiled_blocks_are_bitwise_and_compile_once() -> None:
    torch._dynamo.reset()
    blocks = transformer(2, dropout=0.0)
    for block in blocks:
        block.compile()
    x = torch.randn(2, 128, 64)
    reference = gradients([Keep(block) for block in blocks], x)
    lane = OffloadLane()
    storages = offloads(blocks, lane)
    torch._dynamo.utils.counters.clear()
    assert same(gradients(storages, x), reference)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert lane.pool.allocations > 0
    assert_nothing_left(storages, lane)


def test_memory_swapped_behind_a_parameter_is_followed() -> None:
    weight = nn.Parameter(torch.randn(64, 128))
    storage = Offload(Function(lambda x: x * weight), OffloadLane())
    x = torch.randn(64, 128, requires_grad=True)
    output = storage.run(storage.block, x)
    assert storage.host_bytes == 64 * 128 * 4
    weight.data = torch.ones(64, 128)  # as ZeRO-3 does, without counting it as a change
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(gradient, torch.ones(64, 128))
