"""Saved tensors in host memory: exact, whatever happens around them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import Function
from offload_support import assert_nothing_left, offloads, same, transformer
from storage_support import changed_between_saves, gradients, run
from torch import Tensor, nn

import gradckpt_dist
from gradckpt_dist.storage import StorageContext, create_storage
from gradckpt_dist.storage.keep import Keep
from gradckpt_dist.storage.lane import OffloadLane
from gradckpt_dist.storage.offload import Offload


class BatchNormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.convolution(x)))


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
    lane = OffloadLane()
    storage = Offload(Function(changed_between_saves), lane)
    x = torch.randn(64, 128, requires_grad=True)
    output = storage.run(storage.block, x)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(gradient, x.detach() + 1)
    assert lane.pool.allocations == 2


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
