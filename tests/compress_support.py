"""Blocks under lossy storages: their gradients, and the bytes that they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Function
from text_model import GPT
from torch import Tensor, nn

from gradckpt_dist.storage import Storage, create_storage
from gradckpt_dist.storage.ledger import Ledger

LOSSY = ("compress8", "compress6", "compress4")
ROWS, WIDTH = 64, 128
SIZE = ROWS * WIDTH * 4
"""Bytes of a [64, 128] of float32."""


def codes_bytes(elements: int, bits: int) -> int:
    """Codes, and 4 bytes for each 128 values, or 6 beside 4 bits; padded to 2,048."""
    padded = -(-elements // 2048) * 2048
    return padded * bits // 8 + padded // 128 * (6 if bits == 4 else 4)


def transformer(depth: int = 2, width: int = 64, dropout: float = 0.1) -> list[nn.Module]:
    torch.manual_seed(0)
    return list(GPT(vocabulary=5, context=64, width=width, layers=depth, heads=4, dropout=dropout).blocks)


def held(function: Callable[..., Any], *args: Any, name: str = "compress8", block: nn.Module | None = None) -> int:
    """Bytes that a block of this function holds after its forward."""
    block = block or Function(function)
    storage = create_storage(name, block)
    output = storage.run(block, *args)
    result = storage.held_bytes
    del output
    assert storage.held_bytes == 0
    return result


def ledger_bytes(storage: Storage, x: Tensor) -> int:
    """What the ledger counts after a forward; nothing is left of it afterwards."""
    ledger = Ledger(1)
    ledger.begin_forward()
    try:
        output = ledger.run(0, storage, storage.block, (x.detach().requires_grad_(),), {})
    finally:
        ledger.end_forward()
    measured = ledger.measurement()
    assert measured.stored_bytes[0] == ledger.live_bytes
    output.sum().backward()
    storage.block.zero_grad()
    del output
    assert ledger.live_bytes == 0
    return measured.stored_bytes[0]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*(shape or (ROWS, WIDTH)), requires_grad=True)
