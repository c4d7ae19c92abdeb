"""Blocks that hold the results of expensive operations: what they compute again, and what they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from models import operations
from storage_support import run, storages
from text_model import Block
from torch import Tensor, nn

from gradckpt_dist.storage import Storage
from gradckpt_dist.storage.half_choice import PROFILED_CALLS
from gradckpt_dist.storage.ledger import Ledger

NAMES = ("selective", "selective_half")
WORK = ("mm", "bmm", "addmm", "convolution", "attention")
WIDTH = 32


class Function(nn.Module):
    """A block that calls a function with a weight [32, 32] of its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))

    def forward(self, *args: Any) -> Any:
        return self.function(self.weight, *args)


def transformer(depth: int = 2, width: int = 64, dropout: float = 0.1) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Block(width, width // 32, dropout) for _ in range(depth)]


def step(ones: Sequence[Storage], x: Tensor) -> list[Tensor]:
    """Output, gradients, buffers and the state of the random stream after a step."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    parameters = [parameter for one in ones for parameter in one.block.parameters()]
    output = run(ones, x)
    gradients = torch.autograd.grad(output.float().square().mean(), [x, *parameters])
    buffers = [buffer.clone() for one in ones for buffer in one.block.buffers()]
    return [output.detach(), *gradients, *buffers, torch.get_rng_state()]


def assert_exact(name: str, make: Callable[[], Sequence[nn.Module]], x: Tensor) -> list[Storage]:
    """Bitwise what ``keep`` gives, while the choice is made and afterwards."""
    theirs = storages("keep", make())
    ours = storages(name, make())
    for number in range(PROFILED_CALLS + 2):
        for position, (one, other) in enumerate(zip(step(ours, x), step(theirs, x), strict=True)):
            assert torch.equal(one, other), f"step {number}: tensor {position} differs"
    return ours


def work(names: Sequence[str]) -> Counter[str]:
    """Of the operations with these names, the expensive ones, without those of the gradients."""
    short = [name.split(".")[1] for name in names]
    return Counter(n for n in short if any(kind in n for kind in WORK) and "backward" not in n)


def work_in_backward(ones: Sequence[Storage], x: Tensor) -> Counter[str]:
    output = run(ones, x.detach().requires_grad_())
    with operations() as names:
        output.sum().backward()
    return work(names)


@contextmanager
def counted(ones: Sequence[Storage]) -> Iterator[tuple[Ledger, Callable[[Any], Any]]]:
    """A ledger, and the blocks' forward under it."""
    ledger = Ledger(len(ones))

    def forward(x: Any) -> Any:
        for index, one in enumerate(ones):
            x = ledger.run(index, one, one.block, (x,), {})
        return x

    ledger.begin_forward()
    try:
        yield ledger, forward
    finally:
        ledger.end_forward()


def held_bytes(name: str, blocks: Sequence[nn.Module], x: Tensor) -> int:
    """After a forward whose choice is settled."""
    ones = storages(name, blocks)
    for _ in range(PROFILED_CALLS):
        run(ones, x)
    with counted(ones) as (ledger, forward):
        output = forward(x)
        held = ledger.live_bytes
        del output
    assert ledger.live_bytes == 0
    return held
