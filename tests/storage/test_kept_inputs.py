"""Inputs of recomputed blocks, shared out over ranks or in host memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import run_distributed_test
from torch import Tensor, nn

from gradckpt_dist.storage import StorageContext
from gradckpt_dist.storage.kept_inputs import KeptInputs
from gradckpt_dist.storage.recompute import Recompute

WIDTH = 128
INPUT_BYTES = 64 * WIDTH * 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor, *, table: Tensor, numbers: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(x + table)))) * mask + numbers.sum()


def _run(kept: KeptInputs | None, x: Tensor) -> tuple[list[Tensor], int, int]:
    """Gradients; the storage's bytes on the device after forward, and after backward."""
    torch.manual_seed(0)
    block = Block()
    storage = Recompute.create(block, StorageContext(kept_inputs=kept))
    x = x.clone().requires_grad_()
    mask, table = torch.ones(64, 1), torch.full((64, WIDTH), 0.1)
    output = storage.run(block, x * 2, mask, table=table, numbers=torch.arange(3))
    held = storage.held_bytes
    output.square().mean().backward()
    assert storage.recomputes == 1
    assert x.grad is not None
    gradients = [x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]
    assert len(gradients) == 5
    del output
    return gradients, held, storage.held_bytes


def _inputs() -> Tensor:
    return torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))


def _equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_inputs_in_host_memory() -> None:
    plain, _, _ = _run(None, _inputs())
    lane = StorageContext().lane
    ours, held, after = _run(KeptInputs(lane=lane), _inputs())
    assert _equal(ours, plain)
    assert lane.pool.allocated_bytes >= INPUT_BYTES
    # The mask and the table that need no gradient stay, and are counted; the input has gone.
    assert held < INPUT_BYTES + 1024
    assert after == 0
    assert lane.pool.idle_bytes == lane.pool.allocated_bytes


def test_a_change_in_place_is_an_error() -> None:
    block = nn.Linear(WIDTH, WIDTH)
    storage = Recompute.create(block, StorageContext(kept_inputs=KeptInputs()))
    x = torch.randn(64, WIDTH)
    output = storage.run(block, x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def _check_shares() -> None:
    group: Any = dist.group.WORLD
    plain, _, _ = _run(None, _inputs())
    kept = KeptInputs(group)
    ours, held, after = _run(kept, _inputs())
    assert _equal(ours, plain)
    _, whole, _ = _run(KeptInputs(), _inputs())
    assert whole - held == INPUT_BYTES // 2
    assert after == 0
    lane = StorageContext().lane
    ours, held, _ = _run(KeptInputs(group, lane), _inputs())
    assert _equal(ours, plain)
    assert whole - held == INPUT_BYTES
    assert INPUT_BYTES // 2 <= lane.pool.allocated_bytes < INPUT_BYTES
    # 63 rows do not divide by the ranks' number evenly into whole rows, and need not: elements are shared out.
    odd = torch.randn(63 * 2 + 1, 65)
    assert odd.numel() % 2
    _check_uneven(kept, odd)


def _check_uneven(kept: KeptInputs, x: Tensor) -> None:
    block = nn.Linear(65, 3)
    storage = Recompute.create(block, StorageContext(kept_inputs=kept))
    x.requires_grad_()
    output = storage.run(block, x)
    assert storage.held_bytes >= x.nbytes
    output.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, block.weight.sum(0).expand_as(x))


def test_inputs_shared_out_over_ranks() -> None:
    run_distributed_test(_check_shares, 2)
