"""The two models on which systems are compared, each with one batch that never changes.

No dropout: under a memory budget torch.compile recomputes random operations with other random numbers
(pytorch#190758), so that no exact comparison of compiled blocks would be left.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradckpt_dist.bench.demo_model import load_text_model
from gradckpt_dist.bench.frontier.setting import Size

MODELS = ("demo", "uneven")
_VOCABULARY = 96


class UnevenBlock(nn.Module):
    """Pre-norm attention of ``inner`` features, an MLP of ``hidden``, or both: [batch, context, width] in and out.

    0 features leave that part out.
    """

    def __init__(self, *, width: int, inner: int, hidden: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.attention = nn.ModuleList()
        self.mlp = nn.ModuleList()
        if inner:
            self.attention.extend([nn.LayerNorm(width), nn.Linear(width, 3 * inner), nn.Linear(inner, width)])
        if hidden:
            self.mlp.extend([nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)])

    def forward(self, x: Tensor) -> Tensor:
        if len(self.attention):
            norm, qkv, out = self.attention
            query, key, value = (self._heads(part) for part in qkv(norm(x)).chunk(3, -1))
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + out(mixed.transpose(1, 2).flatten(2))
        if len(self.mlp):
            norm, widen, narrow = self.mlp
            x = x + narrow(functional.gelu(widen(norm(x))))
        return x

    def _heads(self, x: Tensor) -> Tensor:
        batch, context, features = x.shape
        return x.reshape(batch, context, features // self.head_width, self.head_width).transpose(1, 2)


class UnevenModel(nn.Module):
    """12 blocks of four kinds, of different bytes for each second: [batch, context] -> [batch * context, vocabulary].

    Wide (attention and an MLP of 4 x width), attention only, MLP only (2 x width) and narrow (both, at half the width).
    """

    def __init__(self, *, vocabulary: int, width: int, head_width: int) -> None:
        super().__init__()
        wide, attention, mlp = (width, 4 * width), (width, 0), (0, 2 * width)
        narrow = (width // 2, width // 2)
        kinds = [wide, narrow, attention, mlp, narrow, attention] * 2
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            UnevenBlock(width=width, inner=inner, hidden=hidden, head_width=head_width) for inner, hidden in kinds
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).flatten(0, 1))
        return logits


class Workload:
    """A model in training, with its batch."""

    def __init__(self, name: str, size: Size) -> None:
        torch.manual_seed(0)
        self.model = _model(name, size)
        blocks = self.model.blocks
        if not isinstance(blocks, nn.ModuleList):
            raise TypeError(f"model.blocks is a {type(blocks).__name__}")
        self.blocks = blocks
        windows = torch.randint(_VOCABULARY, (size.batch, size.context + 1))
        self._tokens, self._targets = windows[:, :-1].contiguous(), windows[:, 1:].flatten()
        self.parameters = list(self.model.parameters())
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def forward(self) -> Tensor:
        """The loss."""
        return functional.cross_entropy(self.model(self._tokens), self._targets)

    def step(self) -> None:
        """Forward and backward into gradients that are there already, zeroed."""
        self.zero_gradients()
        self.forward().backward()  # type: ignore[no-untyped-call]

    def zero_gradients(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()

    def gradients(self) -> list[Tensor]:
        """Copies of those of one step, in the order of the model's parameters."""
        self.step()
        return [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]


def _model(name: str, size: Size) -> nn.Module:
    if name == "uneven":
        return UnevenModel(vocabulary=_VOCABULARY, width=size.width, head_width=size.head_width)
    model: nn.Module = load_text_model().GPT(
        vocabulary=_VOCABULARY,
        context=size.context,
        width=size.width,
        layers=size.layers,
        heads=size.width // size.head_width,
        dropout=0.0,
    )
    return model
