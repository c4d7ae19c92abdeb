"""A small transformer with dropout on the CPU, and what tests ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 16
VOCABULARY = 11


class Block(nn.Module):
    """Pre-norm causal attention and MLP, with dropout after both."""

    def __init__(self, width: int = WIDTH, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.down(functional.gelu(self.up(self.norm2(x)))))


class Function(nn.Module):
    """A block that calls a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Transformer(nn.Module):
    """Embedding, ``depth`` blocks and a head."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(depth: int = 4) -> Transformer:
    """The same weights at every call."""
    torch.manual_seed(0)
    return Transformer(depth)


def batch(step: int) -> Tensor:
    """Tokens, int64 [4, 8]."""
    return torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(step))


def backward(model: nn.Module, tokens: Tensor, scale: float = 1.0) -> Tensor:
    """Forward and backward of the next-token loss; returns the loss without its scale."""
    logits = model(tokens)
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    (loss * scale).backward()
    return loss.detach()


class Trainer:
    """Steps with an optimizer; counts how often each block's MLP ran in the last step."""

    def __init__(self, model: Transformer, learning_rate: float = 0.05) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
        self.steps = 0
        self.runs = [0] * len(model.blocks)
        for index, block in enumerate(model.blocks):
            block.get_submodule("up").register_forward_pre_hook(self._count(index))

    def step(self) -> Tensor:
        """One step on data of its own; returns the loss."""
        self.runs = [0] * len(self.runs)
        self.optimizer.zero_grad()
        loss = backward(self.model, batch(self.steps))
        self.optimizer.step()
        self.steps += 1
        return loss

    def train(self, steps: int) -> list[float]:
        """That many steps; returns their losses."""
        return [self.step().item() for _ in range(steps)]

    @property
    def recomputed(self) -> list[str]:
        """By block, the storage that the number of runs in the last step speaks for."""
        return [{1: "keep", 2: "recompute"}[runs] for runs in self.runs]

    def _count(self, index: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            self.runs[index] += 1

        return count


def instance_state(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Every module's attributes by identity, its tables of hooks by content."""
    return [
        (name, {key: dict(value) if key.endswith(("_hooks", "_kwargs", "_called")) else id(value)
                for key, value in module.__dict__.items()})
        for name, module in model.named_modules()
    ]  # fmt: skip


@contextmanager
def operations() -> Iterator[list[str]]:
    """The names of all operations that PyTorch dispatches meanwhile, in backward too."""
    from torch.utils._python_dispatch import TorchDispatchMode

    names: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder():
        yield names
