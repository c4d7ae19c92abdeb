"""``selective`` and ``selective_half``: what they hold, and nothing left behind."""

from __future__ import annotations

import gc

import pytest
import torch
from selective_support import (
    NAMES,
    WIDTH,
    Function,
    counted,
    held_bytes,
    step,
    transformer,
)
from storage_support import run, storages
from torch import Tensor, nn

from gradckpt_dist.storage.half_choice import PROFILED_CALLS

# -- bytes ----------------------------------------------------------------------------------------------------------


def test_fractions_of_what_keep_holds() -> None:
    blocks = transformer(width=256)
    x = torch.randn(8, 128, 256, requires_grad=True)
    kept = held_bytes("keep", blocks, x)
    assert held_bytes("selective", blocks, x) <= 0.70 * kept
    half = held_bytes("selective_half", blocks, x)
    assert half <= 0.50 * kept
    assert half > held_bytes("recompute", blocks, x)


def test_the_first_call_does_not_hold_more() -> None:
    (one,) = storages("selective_half", transformer(1))
    x = torch.randn(2, 64, 64, requires_grad=True)
    kept = held_bytes("keep", [one.block], x)
    for _ in range(PROFILED_CALLS + 1):
        with counted([one]) as (ledger, forward):
            output = forward(x)
            assert 0 < ledger.live_bytes <= 0.5 * kept
            del output


def test_what_backward_holds_anyway_counts_once() -> None:
    ones = storages(
        "selective", [nn.Linear(WIDTH, WIDTH, bias=False), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    )
    x = torch.randn(64, WIDTH, requires_grad=True)
    with counted(ones) as (ledger, forward):
        output = forward(x)
        # x, what is between the two, and what is before the tanh.
        assert ledger.live_bytes == 3 * 64 * WIDTH * 4
        del output
    assert ledger.live_bytes == 0


def test_an_output_that_backward_does_not_come_to_is_not_held() -> None:
    ones = storages("selective", [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))])
    with counted(ones) as (ledger, forward):
        output = forward(torch.randn(64, WIDTH, requires_grad=True))
        assert ledger.live_bytes == 2 * 64 * WIDTH * 4
        del output


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_let_go_one_by_one(name: str) -> None:
    ones = storages(name, transformer(3))
    x = torch.randn(2, 64, 64, requires_grad=True)
    with counted(ones) as (ledger, forward):
        output = forward(x)
    seen = []
    for one in ones:
        one.block.register_full_backward_hook(lambda *_: seen.append(ledger.live_bytes))
    with counted(ones) as (ledger, forward):
        output = forward(x)
        seen.append(ledger.live_bytes)
    output.sum().backward()
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) == 4
    assert ledger.live_bytes == 0


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_after_an_exception_in_forward(name: str) -> None:
    def function(weight: Tensor, x: Tensor) -> Tensor:
        held = (x @ weight).exp() @ weight
        if failing:
            raise ValueError("the block's own")
        return held.sin()

    failing = True
    ones = storages(name, [Function(function)])
    gc.collect()
    before = live_tensors()
    with counted(ones) as (ledger, forward):
        with pytest.raises(ValueError, match="the block's own"):
            forward(torch.randn(64, WIDTH, requires_grad=True))
        assert ledger.live_bytes == 0
    gc.collect()
    assert live_tensors() == before
    failing = False
    x = torch.randn(64, WIDTH)
    for one, other in zip(step(ones, x), step(storages("keep", [ones[0].block]), x), strict=True):
        assert torch.equal(one, other)


def live_tensors() -> int:
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_without_the_collector(name: str) -> None:
    ones = storages(name, transformer(2))
    x = torch.randn(2, 64, 64)
    step(ones, x)
    gc.collect()
    gc.disable()
    try:
        before = live_tensors()
        step(ones, x)
        run(ones, x.detach().requires_grad_())
        assert live_tensors() == before
    finally:
        gc.enable()
