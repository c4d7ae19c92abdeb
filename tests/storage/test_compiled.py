"""Storages of blocks that the user compiled."""

from __future__ import annotations

import pytest
import torch
from text_model import GPT, Block
from torch import Tensor, nn
from torch._dynamo.utils import counters

import gradckpt_dist
from gradckpt_dist import StorageError
from gradckpt_dist.storage import Storage
from gradckpt_dist.storage.compiled import CompiledSelective, CompiledSelectiveHalf
from gradckpt_dist.storage.keep import Keep
from gradckpt_dist.storage.ledger import Ledger

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _held_bytes(block: nn.Module, storage: Storage, x: Tensor) -> int:
    ledger = Ledger(1)
    ledger.begin_forward()
    try:
        output = ledger.run(0, storage, block, (x,), {})
    finally:
        ledger.end_forward()
    held = ledger.measurement().held_bytes
    del output
    return held


def _step(storage: Storage, block: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    output = storage.run(block, x)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *block.parameters()])]


@pytest.mark.parametrize("wrap", ["compile()", "torch.compile"])
def test_variants_hold_less_and_are_bitwise(wrap: str) -> None:
    torch.manual_seed(0)
    block: nn.Module = Block(64, 4, 0.0)
    if wrap == "compile()":
        block.compile()
    else:
        block = torch.compile(block)
    x = torch.randn(4, 128, 64)
    keep = Keep(block)
    reference = _step(keep, block, x)
    kept = _held_bytes(block, keep, x.requires_grad_())
    for storage, share in ((CompiledSelective(block), 0.70), (CompiledSelectiveHalf(block), 0.50)):
        for one, other in zip(_step(storage, block, x), reference, strict=True):
            assert torch.equal(one, other)
        assert _held_bytes(block, storage, x) <= share * kept


def test_wrong_dropout_is_refused_with_the_reason() -> None:
    torch.manual_seed(0)
    block = Block(256, 4, 0.1)
    block.compile()
    with pytest.raises(StorageError, match="pytorch#190758"):
        _step(CompiledSelectiveHalf(block), block, torch.randn(4, 256, 256))
    assert all(parameter.grad is None for parameter in block.parameters())
    after = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(after, torch.get_rng_state())


def test_changing_the_mask_compiles_nothing_new() -> None:
    torch.manual_seed(0)
    exact = ("keep", "recompute", "selective", "selective_half", "offload")
    names = [*exact, "compress8", "compress4", "selective8", "selective4"]
    model = GPT(vocabulary=11, context=32, width=64, layers=len(names), heads=2, dropout=0.0)
    for block in model.blocks:
        block.compile()
    config = {"policy": "static", "storages": names, "gradient_tolerance": 0.5}
    engine = gradckpt_dist.enable(model, config)
    tokens = torch.randint(11, (8, 32))

    def gradients(mask: list[str]) -> list[Tensor]:
        engine.set_mask(mask)
        model.zero_grad()
        model(tokens).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    reference = gradients(["keep"] * len(names))
    for name in names:
        gradients([name] * len(names))
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    for shift in range(len(names)):
        gradients(names[shift:] + names[:shift])
    for shift in range(len(exact)):
        mixed = gradients([exact[(i + shift) % len(exact)] for i in range(len(names))])
        assert all(torch.equal(one, other) for one, other in zip(mixed, reference, strict=True))
    assert counters["stats"]["unique_graphs"] == compiled
    engine.disable()
