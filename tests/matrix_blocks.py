"""Blocks of the kinds that models are made of, three of one kind a model."""

from __future__ import annotations

from typing import Any

import torch
from text_model import Block
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 64
BATCH = 4
TOKENS = 32


class Attention(nn.Module):
    """Self-attention, with a mask or without."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up, self.down = (nn.Linear(*shape, bias=False) for shape in ((64, 128), (64, 128), (128, 64)))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class MixtureOfExperts(nn.Module):
    """Two of four experts for each token; how many tokens an expert has depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        mixed = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            mixed.index_add_(0, rows, expert(tokens[rows]) * weights[rows, places, None])
        return x + mixed.view_as(x)


class Convolution(nn.Module):
    """In place where it can be."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.norms[0](self.convolutions[0](x)), inplace=True)
        return functional.relu_(self.norms[1](self.convolutions[1](hidden)).add_(x))


class Stack(nn.Module):
    """Three blocks, which are called with ``options``."""

    def __init__(self, *blocks: nn.Module, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, **self.options)
        return x


TOKEN_SHAPE = (BATCH, TOKENS, WIDTH)
CASES: dict[str, dict[str, Any]] = {
    "dropout": {"shape": TOKEN_SHAPE},
    "autocast": {"shape": TOKEN_SHAPE, "autocast": True},
    "attention": {"shape": TOKEN_SHAPE},
    "attention with mask": {"shape": TOKEN_SHAPE},
    "RMSNorm and SwiGLU": {"shape": TOKEN_SHAPE},
    "mixture of experts": {"shape": TOKEN_SHAPE},
    "convolution and BatchNorm": {"shape": (BATCH, 8, 16, 16)},
}
"""By name, how ``frameworks.train`` trains ``model(name)``."""


def model(case: str) -> Stack:
    """The same weights at every call."""
    torch.manual_seed(7)
    if case in {"dropout", "autocast"}:
        return Stack(*(Block(WIDTH, 2, 0.1) for _ in range(3)))
    if case == "attention with mask":
        return Stack(*(Attention() for _ in range(3)), mask=torch.ones(TOKENS, TOKENS).tril(3).bool())
    kinds = {
        "attention": Attention,
        "RMSNorm and SwiGLU": SwiGLU,
        "mixture of experts": MixtureOfExperts,
        "convolution and BatchNorm": Convolution,
    }
    return Stack(*(kinds[case]() for _ in range(3)))
