"""The text and the model of train_text.py: plain PyTorch."""

from __future__ import annotations

import hashlib
import importlib
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

HELD_OUT_FRACTION = 0.125


class Block(nn.Module):
    """A pre-norm transformer block: [batch, context, width] in and out."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention_out(self._attend(self.attention_norm(x))))
        transformed: Tensor = self.dropout(self.mlp_out(functional.gelu(self.mlp_in(self.mlp_norm(x)))))
        return x + transformed

    def _attend(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)


class GPT(nn.Module):
    """Next-character logits: [batch, context] of character numbers -> [batch * context, vocabulary]."""

    def __init__(self, *, vocabulary: int, context: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)  # positions at 0.02 hold so small a model near the bigram
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.in_features))
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            for out in (module.attention_out, module.mlp_out):
                nn.init.normal_(out.weight, std=0.5 / math.sqrt(out.in_features * 2 * len(self.blocks)))

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).flatten(0, 1))
        return logits


class Text:
    """The text as character numbers: the beginning to train on, the rest held out."""

    def __init__(self, text: str) -> None:
        characters = sorted(set(text))
        number = {character: index for index, character in enumerate(characters)}
        tokens = torch.tensor([number[character] for character in text])
        split = len(tokens) - int(len(tokens) * HELD_OUT_FRACTION)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.vocabulary = len(characters)
        self.train, self.held_out = tokens[:split], tokens[split:]

    def sample(self, batch: int, context: int, generator: torch.Generator) -> Tensor:
        """Random stretches of the training text: [batch, context + 1]."""
        starts = torch.randint(len(self.train) - context, (batch, 1), generator=generator)
        return self.train[starts + torch.arange(context + 1)]

    def validation_windows(self, tokens: int, context: int, ranks: int) -> Tensor:
        """At least ``tokens`` predictions' worth of stretches, as many for each rank: [windows, context + 1]."""
        windows = math.ceil(tokens / (context * ranks)) * ranks
        if windows * context >= len(self.held_out):
            raise ValueError(f"{tokens} validation tokens do not fit into the {len(self.held_out)} held out")
        return self.held_out.unfold(0, context + 1, context)[:windows]


def read_text(path: Path | None) -> Text:
    """The characters of a file, or without one of the help texts that ship with Python.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read as UTF-8.
        ImportError: this Python came without its help texts.
    """
    if path is not None:
        return Text(path.read_text(encoding="utf-8"))
    return Text("\n".join(importlib.import_module("pydoc_data.topics").topics.values()))
