"""Kinds of blocks: twins, whose costs are measured once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def kinds_of(blocks: Sequence[nn.Module]) -> tuple[int, ...]:
    """By block, the number of its kind; kinds are numbered in the order of their first blocks.

    Two blocks are of one kind if they have the same class, the same submodules, and parameters of the same shapes.
    Shapes of the inputs do not count: costs are per token. The same on all ranks, however parameters are sharded.
    """
    numbers: dict[Any, int] = {}
    return tuple(numbers.setdefault(_structure(block), len(numbers)) for block in blocks)


def _structure(block: nn.Module) -> tuple[Any, ...]:
    parts = tuple(
        (name, f"{type(module).__module__}.{type(module).__qualname__}", module.extra_repr())
        for name, module in block.named_modules()
    )
    shapes = tuple(
        (name, tuple(getattr(parameter, "ds_shape", parameter.shape)), parameter.dtype, parameter.requires_grad)
        for name, parameter in block.named_parameters()
        if not _is_flattened(name, parameter)
    )
    return getattr(block, "_compiled_call_impl", None) is not None, parts, shapes


def _is_flattened(name: str, parameter: nn.Parameter) -> bool:
    """Whether FSDP1 has it: what is left of its shape differs from rank to rank."""
    return hasattr(parameter, "_fsdp_flattened") or name.rpartition(".")[2] == "_flat_param"
