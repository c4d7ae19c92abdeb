"""Small models and dispatches for the tests of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradckpt_dist.blocks import Block, BlockSwitch, find_blocks
from gradckpt_dist.storage import Storage, create_storage


class Layer(nn.Module):
    """A residual block with dropout."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        hidden = nn.functional.gelu(self.up(self.norm(x)))
        return x + scale * self.drop(self.down(hidden))


class Stack(nn.Module):
    """An embedding, ``depth`` layers and a head."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return self.head(x)


class StorageDispatch:
    """A dispatch whose storage is set by hand; counts its calls."""

    def __init__(self, block: Block, storage: str = "recompute") -> None:
        self.calls = 0
        self._block = block
        self.set(storage)

    def set(self, storage: str) -> None:
        self.storage: Storage = create_storage(storage, self._block.module)

    @property
    def reruns(self) -> bool:
        return self.storage.reruns

    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls += 1
        return self.storage.run(forward, *args, **kwargs)


class Switches:
    """All blocks of a model, switched."""

    def __init__(self, model: nn.Module, storage: str = "recompute") -> None:
        self.blocks = find_blocks(model)
        self.dispatches = [StorageDispatch(block, storage) for block in self.blocks]
        self.switches = [BlockSwitch(b, d) for b, d in zip(self.blocks, self.dispatches, strict=True)]
        for switch in self.switches:
            switch.install()

    @property
    def names(self) -> list[str]:
        return [block.name for block in self.blocks]

    @property
    def recomputes(self) -> list[int]:
        return [dispatch.storage.recomputes for dispatch in self.dispatches]

    @property
    def calls(self) -> list[int]:
        return [dispatch.calls for dispatch in self.dispatches]

    def set(self, storages: list[str]) -> None:
        for dispatch, storage in zip(self.dispatches, storages, strict=True):
            dispatch.set(storage)

    def undo(self) -> None:
        for switch in self.switches:
            switch.undo()


def build(depth: int = 3) -> Stack:
    torch.manual_seed(0)
    return Stack(depth)


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 16, (2, 5), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, loss: Callable[[], torch.Tensor]) -> list[torch.Tensor | None]:
    """Parameter gradients of one step from a fixed RNG state; clears them afterwards."""
    torch.manual_seed(7)
    loss().backward()
    found = [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def same(left: list[torch.Tensor | None], right: list[torch.Tensor | None]) -> bool:
    """Whether all are bitwise equal, and at least one is there."""
    pairs = list(zip(left, right, strict=True))
    assert any(a is not None for a in left)
    return all((a is None and b is None) or (a is not None and b is not None and a.equal(b)) for a, b in pairs)


def instance_state(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Every module's ``__dict__``, by identity of the values."""
    return [(name, {key: id(value) for key, value in m.__dict__.items()}) for name, m in model.named_modules()]
