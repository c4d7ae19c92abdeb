"""Selective storages in blocks that communicate: bitwise, and nothing but gathers is sent a second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist
from frameworks import assert_bitwise, local
from models import operations
from support import run_distributed_test
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn import functional

from gradckpt_dist.storage import StorageContext, create_storage
from gradckpt_dist.storage.half_choice import PROFILED_CALLS

WIDTH = 32
STEPS = PROFILED_CALLS + 2
SENT = ("_c10d_functional.all_reduce", "_c10d_functional.reduce_scatter", "_c10d_functional.all_to_all")


class ExpertParallel(nn.Module):
    """Half of each rank's tokens go to the other rank's expert and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        group = dist.group.WORLD
        there = collectives.all_to_all_single_autograd(torch.relu(self.first(x)), None, None, group)
        back = collectives.all_to_all_single_autograd(torch.relu(self.expert(there)), None, None, group)
        return functional.dropout(back.sin(), 0.2) * x


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return (x + functional.dropout(self.down(functional.gelu(self.up(self.norm(x)))), 0.2)).sin()


def _tensor_parallel() -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    return parallelize_module(Mlp(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _sequence_parallel() -> nn.Module:
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    return parallelize_module(Mlp(), init_device_mesh("cpu", (2,)), plan)


def _train(name: str, make: Callable[[], nn.Module]) -> tuple[list[Tensor], Counter[str]]:
    """Gradients of all steps, and what was sent in their backward passes."""
    torch.manual_seed(0)
    storage = create_storage(name, make(), StorageContext())
    record = []
    sent: Counter[str] = Counter()
    # Each rank draws its own dropout, but in tensor parallelism, where they hold the same tokens.
    torch.manual_seed(dist.get_rank() if make is not _tensor_parallel else 0)
    for _ in range(STEPS):
        x = torch.randn(4, 8, WIDTH, requires_grad=True)
        output = storage.run(storage.block, x)
        with operations() as names:
            output.square().mean().backward()
        sent.update(kind for kind in SENT for n in names if n.startswith(kind))
        record += [x.grad, *(local(parameter.grad).clone() for parameter in storage.block.parameters())]
        storage.block.zero_grad()
    return record, sent


def _check() -> None:
    for make in (ExpertParallel, _tensor_parallel, _sequence_parallel):
        theirs, sent = _train("keep", make)
        assert sum(_train("recompute", make)[1].values()) > sum(sent.values()) > 0
        for name in ("selective", "selective_half"):
            ours, sent_by_us = _train(name, make)
            assert_bitwise(ours, theirs)
            assert sent_by_us == sent


def test_communicating_blocks_are_bitwise_and_send_nothing_again() -> None:
    run_distributed_test(_check, 2)
