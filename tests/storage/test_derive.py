"""``derive``: bitwise, smaller, without a second run."""

from __future__ import annotations

import pytest
import torch
from models import Function
from text_model import Block
from torch import Tensor, nn

from gradckpt_dist import StorageError
from gradckpt_dist.storage import Storage, StorageContext, create_storage
from gradckpt_dist.storage.ledger import Ledger

WIDTH = 64


class Counting(Block):
    """Counts its forwards."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def block_of(dropout: float) -> Counting:
    torch.manual_seed(0)
    return Counting(WIDTH, 4, dropout)


def activations() -> Tensor:
    return torch.randn(4, 128, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)


def run(name: str, block: nn.Module, x: Tensor) -> tuple[Storage, Tensor]:
    torch.manual_seed(2)
    storage = create_storage(name, block, StorageContext())
    return storage, storage.run(block, x)


def gradients(name: str, block: nn.Module, x: Tensor) -> list[Tensor]:
    _, output = run(name, block, x)
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), [x, *block.parameters()])]


def held_bytes(name: str, block: nn.Module, x: Tensor) -> int:
    """After a forward."""
    ledger, storage = Ledger(1), create_storage(name, block, StorageContext())
    ledger.begin_forward()
    output = ledger.run(0, storage, block, (x,), {})
    ledger.end_forward()
    held = ledger.live_bytes
    del output
    return held


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_are_bitwise(dropout: float, autocast: bool) -> None:
    block, x = block_of(dropout), activations()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, reference = gradients("derive", block, x), gradients("keep", block, x)
    assert all(map(torch.equal, ours, reference))
    assert block.calls == 2


def test_it_holds_what_selective_holds() -> None:
    block, x = block_of(0.0), activations()
    derived, selective, kept = (held_bytes(name, block, x) for name in ("derive", "selective", "keep"))
    assert derived <= 1.02 * selective < 0.64 * kept


def test_what_backward_makes_is_a_working_set() -> None:
    block, x, ledger = Function(lambda x: torch.nn.functional.gelu(x.sin()).square()), activations(), Ledger(1)
    ledger.begin_forward()
    output = ledger.run(0, create_storage("derive", block, StorageContext()), block, (x,), {})
    ledger.end_forward()
    output.sum().backward()
    measured = ledger.measurement()
    assert measured.held_bytes == 2 * x.nbytes  # x, and its sine
    assert measured.peak_bytes == 3 * x.nbytes


def test_nothing_is_left_after_backward() -> None:
    storage, output = run("derive", block_of(0.1), activations())
    assert storage.held_bytes > 0
    output.sum().backward()
    assert storage.held_bytes == 0


def test_gradients_of_gradients() -> None:
    def function(x: Tensor) -> Tensor:
        return (torch.nn.functional.silu(x) * x).square().sum(-1)

    def twice(name: str) -> Tensor:
        x = activations()
        _, output = run(name, Function(function), x)
        (first,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return second

    assert torch.equal(twice("derive"), twice("keep"))


def test_compiled_blocks_are_refused() -> None:
    block = block_of(0.0)
    block.compile()
    with pytest.raises(StorageError, match=r"'derive' is refused for the compiled Counting.*use selective"):
        create_storage("derive", block)


def test_function_transforms_are_refused() -> None:
    block = Function(lambda x: x.sin().sum())
    storage = create_storage("derive", block)
    with pytest.raises(StorageError, match=r"'derive' cannot run under torch.func transforms.*use another storage"):
        torch.func.grad(lambda x: storage.run(block, x))(torch.randn(8))
