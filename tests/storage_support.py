"""Blocks under storages, one after another: a forward, the gradients, and what is alive."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradckpt_dist.storage import Storage, StorageContext, create_storage


def storages(name: str, blocks: Sequence[nn.Module]) -> list[Storage]:
    """One for each block, as an engine makes them."""
    context = StorageContext()
    return [create_storage(name, block, context) for block in blocks]


def run(ones: Sequence[Storage], x: Any) -> Any:
    for one in ones:
        x = one.run(one.block, x)
    return x


def gradients(ones: Sequence[Storage], x: Tensor, **options: Any) -> list[Tensor]:
    """Of the input and of all parameters."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    parameters = [parameter for one in ones for parameter in one.block.parameters()]
    return list(torch.autograd.grad(run(ones, x).float().square().mean(), [x, *parameters], **options))


def relative_error(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Of all of them together."""
    difference = sum((one.double() - other.double()).square().sum() for one, other in zip(ones, others, strict=True))
    return float((difference / sum(other.double().square().sum() for other in others)) ** 0.5)


def live_bytes() -> int:
    """Of all tensors that there are."""
    gc.collect()
    tensors = {
        thing.untyped_storage()._cdata: thing.untyped_storage().nbytes()
        for thing in gc.get_objects()
        if type(thing) in (Tensor, nn.Parameter)
    }
    return sum(tensors.values())


def changed_between_saves(x: Tensor) -> Tensor:
    """Saves a storage, changes it, saves it again: the gradient is x + 1."""
    y = x * 1
    z = y.detach()
    first = x * z
    z.add_(1)
    return first.detach() + x * z
