"""A small transformer, parallelised over meshes as its users do it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from frameworks import local
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn import functional

WIDTH = 64
HEADS = 4
TOKENS = 32
BATCH = 4
VOCABULARY = 16
DEPTH = 3

PLANS = ("tensor", "sequence", "distributed outputs")
"""Tensor parallelism; with sequence parallelism, outputs local; the same with outputs that stay DTensors."""


class Block(nn.Module):
    """Pre-norm attention and MLP; how many heads this rank has follows from the width of its queries."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (
            part(normed).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self._drop(self.out(mixed))
        return x + self._drop(self.down(functional.gelu(self.up(self.norm2(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout) if self.dropout else x


class Transformer(nn.Module):
    """Embedding, blocks, norm and head: tokens int64 [batch, tokens] to logits."""

    def __init__(self, dropout: float = 0.0, depth: int = DEPTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Stage(nn.Module):
    """Its share of the blocks, with the embedding before the first stage, and norm and head after the last."""

    def __init__(self, model: Transformer, index: int, stages: int) -> None:
        super().__init__()
        blocks = list(model.blocks)
        share = len(blocks) // stages
        self.embedding = model.embedding if index == 0 else None
        self.blocks = nn.ModuleList(blocks[index * share : (index + 1) * share])
        self.head = nn.Sequential(model.norm, model.head) if index == stages - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return x if self.head is None else self.head(x)


def transformer(plan: str | None, mesh: DeviceMesh | None = None, **options: Any) -> Transformer:
    """The same weights at every call, by ``plan`` over a mesh of one dimension; None leaves the model whole."""
    torch.manual_seed(7)
    model = Transformer(**options)
    if plan is None or mesh is None:
        return model
    columns: dict[str, Any] = dict.fromkeys(("q", "k", "v", "up"), ColwiseParallel())
    rows: dict[str, Any] = dict.fromkeys(("out", "down"), RowwiseParallel())
    if plan == "tensor":
        for block in model.blocks:
            parallelize_module(block, mesh, columns | rows)
        return model
    outside = {
        "embedding": RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=plan == "sequence"
        ),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    columns = dict.fromkeys(columns, ColwiseParallel(input_layouts=Shard(1)))
    rows = dict.fromkeys(rows, RowwiseParallel(output_layouts=Shard(1), use_local_output=plan == "sequence"))
    norms = {"norm1": SequenceParallel(use_local_output=True), "norm2": SequenceParallel(use_local_output=True)}
    parallelize_module(model, mesh, outside)
    for block in model.blocks:
        parallelize_module(block, mesh, columns | rows | norms)
    return model


def two_dimensional(plan: str, **options: Any) -> Transformer:
    """FSDP2 over two ranks by ``plan`` over two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = transformer(plan, mesh["tp"], **options)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return model


def batches(steps: int, replica: int = 0) -> list[Tensor]:
    """Tokens, those of one data-parallel replica."""
    generator = torch.Generator().manual_seed(replica)
    return [torch.randint(VOCABULARY, (BATCH, TOKENS + 1), generator=generator) for _ in range(steps)]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(model: nn.Module, steps: int, replica: int = 0, learning_rate: float = 0.05) -> list[Tensor]:
    """Losses and this rank's part of all gradients, of every step; the random state last."""
    torch.manual_seed(100 + replica)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    record: list[Tensor] = []
    for tokens in batches(steps, replica):
        optimizer.zero_grad()
        loss = loss_of(model(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        record += [local(loss.detach()), *(local(p.grad).clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return [*record, torch.get_rng_state()]


def replica_of(ranks_a_replica: int = 2) -> int:
    """Which data-parallel replica this rank is of."""
    return dist.get_rank() // ranks_a_replica
