"""Bytes held for backward, counted by hand and by the ledger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradckpt_dist.storage import create_storage
from gradckpt_dist.storage.ledger import Ledger, is_parameter

ROWS, WIDTH, HIDDEN = 8, 16, 64
INPUT, INNER = ROWS * WIDTH * 4, ROWS * HIDDEN * 4
SAVED = INPUT + 2 * INNER
"""An MLP saves its input, what goes into its activation and what comes out of it."""


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


class Counted:
    """Blocks in a row under a ledger."""

    def __init__(self, *storages: str) -> None:
        torch.manual_seed(0)
        self.blocks = [MLP() for _ in storages]
        self.storages = [create_storage(name, block) for name, block in zip(storages, self.blocks, strict=True)]
        self.ledger = Ledger(len(storages))

    def forward(self, x: Tensor | None = None) -> Tensor:
        y = torch.randn(ROWS, WIDTH).requires_grad_() if x is None else x
        self.ledger.begin_forward()
        try:
            for index, (block, storage) in enumerate(zip(self.blocks, self.storages, strict=True)):
                y = self.ledger.run(index, storage, block, (y,), {})
        finally:
            self.ledger.end_forward()
        return y


def test_kept_blocks_hold_what_a_hand_count_says() -> None:
    counted = Counted("keep", "keep")
    output = counted.forward()
    assert counted.ledger.live_bytes == 2 * SAVED
    output.sum().backward()
    assert counted.ledger.live_bytes == 0
    measured = counted.ledger.measurement()
    assert measured.keep_bytes == measured.stored_bytes == (SAVED, SAVED)
    assert measured.recompute_bytes == (INPUT, INPUT)
    assert (measured.held_bytes, measured.peak_bytes) == (2 * SAVED, 2 * SAVED)


def test_recomputed_blocks_hold_inputs_and_bring_one_block_back_at_a_time() -> None:
    counted = Counted("recompute", "recompute")
    output = counted.forward()
    assert counted.ledger.live_bytes == 2 * INPUT
    output.sum().backward()
    assert counted.ledger.live_bytes == 0
    measured = counted.ledger.measurement()
    assert measured.keep_bytes == (SAVED, SAVED)
    assert measured.recompute_bytes == measured.stored_bytes == (INPUT, INPUT)
    assert measured.held_bytes == 2 * INPUT
    # The last block's backward comes first, while both inputs are held.
    assert measured.peak_bytes == 2 * INPUT + 2 * INNER


def test_mixed_masks_hold_the_sum_of_their_blocks() -> None:
    for storages in (("keep", "recompute", "keep"), ("recompute", "keep", "recompute")):
        counted = Counted(*storages)
        counted.forward().sum().backward()
        measured = counted.ledger.measurement()
        stored = tuple(SAVED if name == "keep" else INPUT for name in storages)
        assert measured.stored_bytes == stored
        assert measured.held_bytes == sum(stored)
        assert measured.keep_bytes == (SAVED,) * 3
        assert measured.recompute_bytes == (INPUT,) * 3


def _count(forward: Callable[[Tensor], Any], x: Tensor, storage: str = "keep") -> tuple[int, int, int]:
    """Keep, recompute and held bytes of one function as a block."""
    ledger = Ledger(1)
    ledger.begin_forward()
    output = ledger.run(0, create_storage(storage, nn.Identity()), forward, (x,), {})
    ledger.end_forward()
    measured = ledger.measurement()
    del output
    return measured.keep_bytes[0], measured.recompute_bytes[0], measured.held_bytes


def test_a_storage_counts_once_whoever_saves_it() -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    assert _count(lambda x: (y := x.tanh()) * y, x) == (INPUT, INPUT, INPUT)
    assert _count(lambda x: (y := x.tanh()) * y.view(WIDTH, ROWS).view(ROWS, WIDTH), x)[0] == INPUT
    assert _count(lambda x: x * x, x) == (INPUT, INPUT, INPUT)


def test_a_view_holds_its_whole_storage() -> None:
    whole = torch.randn(10 * ROWS, WIDTH)
    x = whole[:ROWS].requires_grad_()
    assert _count(lambda x: x.square(), x) == (10 * INPUT, 10 * INPUT, 10 * INPUT)


def test_parameters_and_their_views_do_not_count() -> None:
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    for tensor in (weight, weight.t(), weight[2:], weight.view(-1)):
        assert is_parameter(tensor)
    assert not is_parameter(weight * 1)
    assert not is_parameter(torch.zeros(1))
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    assert _count(lambda x: x @ weight, x) == (INPUT, INPUT, INPUT)
    frozen = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
    assert _count(lambda x: x * frozen, x)[0] == 0


def test_reduced_precision_counts_its_own_bytes() -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True, dtype=torch.bfloat16)
    assert _count(lambda x: x.square(), x) == (INPUT // 2, INPUT // 2, INPUT // 2)


def test_what_another_block_holds_already_costs_recompute_nothing() -> None:
    counted = Counted("keep", "keep")
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    ledger = counted.ledger
    ledger.begin_forward()
    one = ledger.run(0, counted.storages[0], counted.blocks[0], (x,), {})
    other = ledger.run(1, counted.storages[1], counted.blocks[1], (x,), {})
    ledger.end_forward()
    measured = ledger.measurement()
    assert measured.recompute_bytes == (INPUT, 0)
    assert measured.stored_bytes == (SAVED, SAVED - INPUT)
    assert measured.held_bytes == 2 * SAVED - INPUT
    assert one.shape == other.shape


@pytest.mark.parametrize("storage", ["keep", "recompute"])
def test_dropping_the_output_releases_everything(storage: str) -> None:
    counted = Counted(storage, storage)
    output = counted.forward()
    assert counted.ledger.live_bytes > 0
    del output
    assert counted.ledger.live_bytes == 0


@pytest.mark.parametrize("storage", ["keep", "recompute"])
def test_an_exception_in_forward_releases_everything(storage: str) -> None:
    counted = Counted(storage, storage)

    def fail(*_: Any) -> None:
        raise ValueError("broken")

    handle = counted.blocks[1].down.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="broken"):
        counted.forward()
    assert counted.ledger.live_bytes == 0
    handle.remove()
    counted.forward().sum().backward()
    assert counted.ledger.live_bytes == 0
    assert counted.ledger.measurement().keep_bytes == (SAVED, SAVED)


def test_a_saved_tensor_that_is_modified_in_place_still_raises() -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    ledger = Ledger(1)
    ledger.begin_forward()
    hidden = x.exp()
    output = ledger.run(0, create_storage("keep", nn.Identity()), lambda y: y.square(), (hidden,), {})
    ledger.end_forward()
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def _twice_as_many_rows() -> Tensor:
    return torch.randn(2 * ROWS, WIDTH).requires_grad_()


@pytest.mark.parametrize("storage", ["keep", "recompute", "compress8", "selective", "offload"])
def test_micro_batches_add_up_while_they_wait_for_their_backward(storage: str) -> None:
    counted = Counted(storage)
    first, second = counted.forward(), counted.forward(_twice_as_many_rows())
    (first.sum() + second.sum()).backward()
    measured = counted.ledger.measurement()
    assert measured.keep_bytes == (3 * SAVED,)
    assert measured.recompute_bytes == (3 * INPUT,)
    assert measured.stored_bytes == (measured.held_bytes,)
    assert storage not in {"keep", "recompute"} or measured.stored_bytes == getattr(measured, f"{storage}_bytes")
    assert measured.forwards_in_flight == 2
    assert counted.ledger.live_bytes == 0


@pytest.mark.parametrize("storage", ["keep", "recompute", "compress8", "selective", "offload"])
def test_micro_batches_one_after_the_other_take_the_most(storage: str) -> None:
    counted = Counted(storage)
    for x in (None, _twice_as_many_rows(), None):
        counted.forward(x).sum().backward()
    measured = counted.ledger.measurement()
    assert measured.keep_bytes == (2 * SAVED,)
    assert measured.forwards_in_flight == 1


def test_a_block_called_twice_in_a_forward_adds_up() -> None:
    counted = Counted("recompute")
    ledger, block, storage = counted.ledger, counted.blocks[0], counted.storages[0]
    ledger.begin_forward()
    y = torch.randn(ROWS, WIDTH).requires_grad_()
    for _ in range(2):
        y = ledger.run(0, storage, block, (y,), {})
    ledger.end_forward()
    y.sum().backward()
    measured = ledger.measurement()
    assert (measured.keep_bytes, measured.recompute_bytes) == ((2 * SAVED,), (2 * INPUT,))
    assert measured.held_bytes == 2 * INPUT


@pytest.mark.parametrize("storage", ["keep", "recompute"])
def test_counting_changes_no_gradient(storage: str) -> None:
    gradients = []
    for measured in (False, True):
        counted = Counted(storage, storage)
        x = torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH).requires_grad_()
        if measured:
            y = counted.forward(x)
        else:
            y = x
            for block, kind in zip(counted.blocks, counted.storages, strict=True):
                y = kind.run(block, y)
        y.square().sum().backward()
        gradients.append([x.grad, *(p.grad for block in counted.blocks for p in block.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_not_available_where_hooks_are_forbidden() -> None:
    assert Ledger.available()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert not Ledger.available()
    assert Ledger.available()


def test_what_a_lossy_storage_makes_anew_in_backward_counts_while_it_is_alive() -> None:
    block = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh())
    x = torch.randn(64, 64, requires_grad=True)
    ledger = Ledger(1)
    ledger.begin_forward()
    y = ledger.run(0, create_storage("compress8", block), block, (x,), {})
    ledger.end_forward()
    y.sum().backward()
    measured = ledger.measurement()
    one = 64 * 256 * 4
    assert measured.held_bytes < one
    assert one <= measured.peak_bytes <= measured.held_bytes + 2 * one
