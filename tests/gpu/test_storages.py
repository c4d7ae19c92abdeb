"""Every storage on a GPU: its gradients, its bytes, and that the host never waits for the device."""

from __future__ import annotations

import gc

import pytest
import torch
from storage_support import gradients, relative_error, run, storages
from text_model import Block
from torch import Tensor, nn

from gradckpt_dist.storage import STORAGES
from gradckpt_dist.storage.ledger import Ledger

CALLS = 5
"""More than ``selective_half`` profiles."""
UNIT_BYTES = 512
"""The allocator hands out multiples."""
ERRORS = {"8": 0.02, "6": 0.06, "4": 0.3}


def _blocks(dtype: torch.dtype, *, compiled: bool = False, depth: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    blocks = [Block(256, 4, 0.0 if compiled else 0.1).to("cuda", dtype) for _ in range(depth)]
    if compiled:
        for block in blocks:
            block.compile()
    return blocks


def _input(dtype: torch.dtype) -> Tensor:
    return torch.randn(4, 256, 256, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(2))


KINDS = [(name, compiled) for compiled in (False, True) for name in STORAGES if not (compiled and name == "derive")]
"""Storages by kind of block; ``derive`` cannot see a compiled block's operations."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "compiled"), KINDS)
def test_gradients(name: str, dtype: torch.dtype, compiled: bool) -> None:
    blocks, x = _blocks(dtype, compiled=compiled), _input(dtype)
    reference = gradients(storages("keep", blocks), x)
    ones = storages(name, blocks)
    for _ in range(CALLS):
        found = gradients(ones, x)
        if ones[0].exact:
            assert all(torch.equal(one, other) for one, other in zip(found, reference, strict=True))
        else:
            assert 0 < relative_error(found, reference) < ERRORS[name[-1]]


@pytest.mark.parametrize("name", list(STORAGES))
def test_autocast(name: str) -> None:
    blocks, x = _blocks(torch.float32), _input(torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        reference = gradients(storages("keep", blocks), x)
        found = gradients(storages(name, blocks), x)
    if STORAGES[name].exact:
        assert all(torch.equal(one, other) for one, other in zip(found, reference, strict=True))
    else:
        assert relative_error(found, reference) < ERRORS[name[-1]]


@pytest.mark.parametrize(("name", "compiled"), KINDS)
def test_the_host_waits_for_nothing(name: str, compiled: bool) -> None:
    blocks, x = _blocks(torch.bfloat16, compiled=compiled), _input(torch.bfloat16).requires_grad_()
    ones = storages(name, blocks)
    for _ in range(CALLS):
        gradients(ones, x)
    torch.cuda.set_sync_debug_mode("error")
    run(ones, x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", list(STORAGES))
def test_what_is_held_is_what_the_allocator_has_handed_out(name: str) -> None:
    blocks, x = _blocks(torch.bfloat16), _input(torch.bfloat16).requires_grad_()
    ones = storages(name, blocks)
    for _ in range(CALLS):
        gradients(ones, x)
    ledger = Ledger(len(ones))
    gc.collect()
    before = torch.cuda.memory_allocated()
    ledger.begin_forward()
    output = x
    for index, one in enumerate(ones):
        output = ledger.run(index, one, one.block, (output,), {})
    ledger.end_forward()
    torch.cuda.synchronize()
    gc.collect()
    allocated = torch.cuda.memory_allocated() - before
    # The last output is nobody's to hold. The input was there before, and is held by what holds it as it is.
    as_it_is = STORAGES[name].exact and name != "offload"
    expected = ledger.live_bytes + output.nbytes - (x.nbytes if as_it_is else 0)
    assert allocated == pytest.approx(expected, abs=UNIT_BYTES * 64 * len(ones))
    output.sum().backward()
