"""Blocks whose saved tensors are in host memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from text_model import Block
from torch import Tensor, nn

from gradckpt_dist.storage.lane import OffloadLane
from gradckpt_dist.storage.offload import Offload

CPU = torch.device("cpu")
KIB = 1024


def offloads(blocks: Sequence[nn.Module], lane: OffloadLane | None = None) -> list[Offload]:
    lane = lane or OffloadLane()
    return [Offload(block, lane) for block in blocks]


def transformer(depth: int = 4, dropout: float = 0.1) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Block(64, 4, dropout) for _ in range(depth)]


def same(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def assert_nothing_left(storages: Sequence[Offload], lane: OffloadLane) -> None:
    assert [(storage.held_bytes, storage.host_bytes) for storage in storages] == [(0, 0)] * len(storages)
    assert lane.pool.idle_bytes == lane.pool.allocated_bytes
