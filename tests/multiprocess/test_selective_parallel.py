"""Selective storages in blocks that communicate: bitwise, and nothing is sent a second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from frameworks import assert_bitwise, local
from support import run_distributed_test
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from gradckpt_dist.storage import StorageContext, create_storage
from gradckpt_dist.storage.half_choice import PROFILED_CALLS

WIDTH = 32
STEPS = PROFILED_CALLS + 2
SENT = tuple(f"_c10d_functional.{name}" for name in ("all_reduce", "reduce_scatter", "all_to_all", "all_gather"))


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


class Implicit(nn.Module):
    """DTensors inside, which communicate by themselves where an operation needs more than this rank's part."""

    def __init__(self) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (2,))
        self.up = nn.Parameter(distribute_tensor(torch.randn(WIDTH, 64) / 6, mesh, [Shard(1)]))
        self.down = nn.Parameter(distribute_tensor(torch.randn(64, WIDTH) / 8, mesh, [Shard(0)]))

    def forward(self, x: Tensor) -> Tensor:
        x = DTensor.from_local(x, self.up.device_mesh, [Replicate()])
        hidden = functional.softmax((x @ self.up).tanh(), dim=-1)
        return ((hidden @ self.down).sin() + x).cos().sum(dim=1).full_tensor()


class GatheredWeights(nn.Module):
    """Gathers its weight in each forward, as data parallelism by functional collectives does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH // 2, WIDTH) / 6)

    def forward(self, x: Tensor) -> Tensor:
        whole = collectives.all_gather_tensor_autograd(self.weight, 0, dist.group.WORLD)
        return (x @ whole).tanh().sin()


class _Sent(TorchDispatchMode):
    """The names of operations on this rank's parts of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _train(name: str, make: Callable[[], nn.Module]) -> tuple[list[Tensor], Counter[str]]:
    """Gradients of all steps, and what was sent in their backward passes."""
    torch.manual_seed(0)
    storage = create_storage(name, make(), StorageContext())
    record = []
    sent: Counter[str] = Counter()
    # Each rank draws its own dropout, but in tensor parallelism, where they hold the same tokens.
    torch.manual_seed(0 if make in (_tensor_parallel, Implicit) else dist.get_rank())
    for _ in range(STEPS):
        x = torch.randn(4, 8, WIDTH, requires_grad=True)
        output = storage.run(storage.block, x)
        with _Sent() as counted:
            output.square().mean().backward()
        sent.update(kind for kind in SENT for n in counted.names if n.startswith(kind))
        record += [x.grad, *(local(parameter.grad).clone() for parameter in storage.block.parameters())]
        storage.block.zero_grad()
    return record, sent


def _check() -> None:
    for make in (ExpertParallel, _tensor_parallel, _sequence_parallel, Implicit):
        theirs, sent = _train("keep", make)
        assert sum(_train("recompute", make)[1].values()) > sum(sent.values()) >= 0
        for name in ("selective", "selective_half"):
            ours, sent_by_us = _train(name, make)
            assert_bitwise(ours, theirs)
            if name == "selective_half":
                sent_by_us[SENT[-1]], sent[SENT[-1]] = 0, 0  # gathered again
            assert sent_by_us == sent, (make, name)
    held, again = (_train(name, GatheredWeights)[1] for name in ("selective", "recompute"))
    assert held[SENT[-1]] == again[SENT[-1]] > 0


def test_communicating_blocks_are_bitwise_and_send_nothing_again() -> None:
    run_distributed_test(_check, 2)
