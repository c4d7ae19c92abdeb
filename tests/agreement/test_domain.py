"""Which ranks run the same blocks: meshes and groups of eight ranks, seen from one by torch's group without peers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from gradckpt_dist import AgreementError
from gradckpt_dist.agreement.domain import domain_of, global_ranks

CPU = torch.device("cpu")
PLAN: dict[str, Any] = {"0": ColwiseParallel(), "1": RowwiseParallel()}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def _everywhere() -> tuple[int, ...]:
    return tuple(range(dist.get_world_size()))


def _pipelined_mesh() -> None:
    """Pipeline x data x tensor: the stage's four ranks, sharded or not."""
    rank = dist.get_rank()
    expected = (0, 1, 2, 3) if rank < 4 else (4, 5, 6, 7)
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
    model = parallelize_module(_model(), mesh["tp"], PLAN)
    assert domain_of(model) == expected
    assert domain_of(fully_shard(model, mesh=mesh["dp"])) == expected
    assert domain_of(fully_shard(_model(), mesh=mesh["dp"])) == expected
    assert domain_of(DistributedDataParallel(_model(), process_group=mesh["dp"].get_group())) == tuple(
        sorted(dist.get_process_group_ranks(mesh["dp"].get_group()))
    )
    _flattened(mesh, expected)
    flattened_away = parallelize_module(_model(), mesh["tp"], PLAN)
    assert domain_of(FullyShardedDataParallel(flattened_away, device_mesh=mesh["dp"], device_id=CPU)) == expected
    # Stages that are meshes by themselves.
    first = rank // 4 * 4
    names = ("replicate", "shard")
    ours = DeviceMesh("cpu", [[first, first + 1], [first + 2, first + 3]], mesh_dim_names=names)
    assert domain_of(fully_shard(_model(), mesh=ours)) == expected


def _flattened(mesh: DeviceMesh, expected: tuple[int, ...]) -> None:
    flat = mesh["dp", "tp"]._flatten("everything")
    assert domain_of(fully_shard(_model(), mesh=flat)) == expected


def _two_dimensions() -> None:
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("replicate", "shard"))
    assert domain_of(fully_shard(_model(), mesh=mesh)) == _everywhere()
    assert domain_of(fully_shard(_model(), mesh=mesh["shard"])) == _everywhere()
    hybrid = FullyShardedDataParallel(
        _model(),
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        device_id=CPU,
    )
    assert domain_of(hybrid) == _everywhere()


def _grids_of_groups() -> None:
    """DDP over pairs of tensor-parallel ranks whose meshes know nothing of each other."""
    rank = dist.get_rank()
    pairs = [DeviceMesh("cpu", [first, first + 1]) for first in range(0, 8, 2)]
    rows = [dist.new_group([0, 2]), dist.new_group([1, 3]), dist.new_group([4, 6]), dist.new_group([5, 7])]
    model = parallelize_module(_model(), pairs[rank // 2], PLAN)
    assert domain_of(model) == (rank // 2 * 2, rank // 2 * 2 + 1)
    row = rows[rank // 4 * 2 + rank % 2]
    wrapped = nn.Sequential(model, DistributedDataParallel(_model(), process_group=row))
    assert domain_of(wrapped) == ((0, 1, 2, 3) if rank < 4 else (4, 5, 6, 7))


def _models_that_say_nothing() -> None:
    rank = dist.get_rank()
    model = _model()
    assert domain_of(model) is None
    assert domain_of(DistributedDataParallel(model)) == _everywhere()
    stage = PipelineStage(model, rank, dist.get_world_size(), CPU)
    assert domain_of(model) == (rank,)
    assert domain_of(_model()) is None
    del stage


def _given_ranks() -> None:
    assert global_ranks(None) == _everywhere()
    halves = [dist.new_group([0, 1, 2, 3]), dist.new_group([4, 5, 6, 7])]
    here = dist.get_rank() // 4
    assert global_ranks(halves[here]) == ((0, 1, 2, 3), (4, 5, 6, 7))[here]
    assert global_ranks([dist.get_rank()]) == (dist.get_rank(),)
    with pytest.raises(AgreementError, match="not this one"):
        global_ranks([(dist.get_rank() + 1) % 8])


CHECKS = (_pipelined_mesh, _two_dimensions, _grids_of_groups, _models_that_say_nothing, _given_ranks)


# One rank only: DTensor caches meshes, which know the rank that they were made on.
@pytest.mark.parametrize("check", CHECKS)
def test_domains_are_told_from_meshes_groups_and_stages(check: Callable[[], None]) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=6, world_size=8)
    try:
        check()
    finally:
        gc.collect()
        dist.destroy_process_group()


def test_a_process_on_its_own_has_none() -> None:
    assert domain_of(_model()) is None
