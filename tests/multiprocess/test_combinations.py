"""Kinds of parallelism together: several stages a rank, pipelines beside FSDP2, FSDP1 over tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from frameworks import assert_bitwise, local
from meshes import Stage, Transformer, batches, loss_of, replica_of, train, transformer
from support import run_distributed_test
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

import gradckpt_dist

MICRO_BATCHES = 4
BLOCKS_A_STAGE = 2
CPU = torch.device("cpu")
EXACT = {"storages": ["keep", "recompute", "selective"], "interval": 1000}
MOVING = {"storages": ["keep", "recompute"], "interval": 4, "warmup_steps": 0, "memory_budget": 0.5}
MOVING_STEPS = 20


class Pipeline:
    """This rank's stages, and how they train: two on each of two ranks in turn, or one each over FSDP2."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        place, replicas = (dist.get_rank(), None) if mesh is None else (mesh.get_local_rank("pp"), mesh["dp"])
        indices, stages = ((place, place + 2), 4) if mesh is None else ((place,), 2)
        group = None if mesh is None else mesh.get_group("pp")
        self._data = 0 if mesh is None else mesh.get_local_rank("dp")
        torch.manual_seed(7)
        model = Transformer(dropout=0.1, depth=BLOCKS_A_STAGE * stages)
        self.stages = [Stage(model, index, stages) for index in indices]
        for stage in self.stages if replicas is not None else ():
            for block in stage.blocks:
                fully_shard(block, mesh=replicas)
            fully_shard(stage, mesh=replicas)
        run = [PipelineStage(s, i, stages, CPU, group=group) for s, i in zip(self.stages, indices, strict=True)]
        self._schedule: Any = (
            ScheduleInterleaved1F1B(run, MICRO_BATCHES, loss_fn=loss_of)
            if mesh is None
            else Schedule1F1B(run[0], MICRO_BATCHES, loss_fn=loss_of)
        )
        self._first, self._last = place == 0, place == 1

    def train(self, steps: int) -> list[Tensor]:
        """Losses where they are, gradients of every step; the random state last."""
        torch.manual_seed(100 + dist.get_rank())
        parameters = [p for stage in self.stages for p in stage.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        record: list[Tensor] = []
        for tokens in batches(steps, self._data):
            optimizer.zero_grad()
            losses: list[Tensor] = []
            given = (tokens[:, :-1],) if self._first else ()
            self._schedule.step(*given, **({"target": tokens[:, 1:], "losses": losses} if self._last else {}))
            record += [*(local(loss.detach()) for loss in losses), *(local(p.grad).clone() for p in parameters)]
            optimizer.step()
        return [*record, torch.get_rng_state()]


def _check_pipeline(make: Callable[[], Pipeline], ranks: int) -> None:
    """``ranks`` of a domain; each stage has a mask of its own."""
    plain = make().train(3)
    pipeline = make()
    engines = [gradckpt_dist.enable(stage, EXACT) for stage in pipeline.stages]
    for number, engine in enumerate(engines):
        assert engine._agreement.ranks == ranks
        assert len(engine.mask) == BLOCKS_A_STAGE
        engine.set_mask(["recompute", "selective"] if number == 0 else ["selective", "keep"])
    assert_bitwise(pipeline.train(3), plain)
    for engine in engines:
        engine.disable()
    _check_moving_masks(make)


def _check_moving_masks(make: Callable[[], Pipeline]) -> None:
    plain = make().train(MOVING_STEPS)
    pipeline = make()
    engines = [gradckpt_dist.enable(stage, MOVING) for stage in pipeline.stages]
    assert_bitwise(pipeline.train(MOVING_STEPS), plain)
    for engine in engines:
        assert engine.mask.epoch >= 3
        assert engine.stats()["held_bytes"] > 0
        engine.disable()


def _check_interleaved() -> None:
    _check_pipeline(Pipeline, 1)


def _check_pipeline_and_fsdp2() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    _check_pipeline(partial(Pipeline, mesh), 2)


def _fsdp1_over_tensor_parallelism(mesh: DeviceMesh) -> nn.Module:
    model = transformer("tensor", mesh["tp"])
    return FullyShardedDataParallel(model, device_mesh=mesh["dp"], use_orig_params=True, device_id=CPU)


def _check_fsdp1_and_tensor_parallelism() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plain = train(_fsdp1_over_tensor_parallelism(mesh), 3, replica_of())
    model = _fsdp1_over_tensor_parallelism(mesh)
    engine = gradckpt_dist.enable(model, EXACT)
    assert engine._agreement.ranks == 4
    engine.set_mask(["recompute", "selective", "keep"])
    assert_bitwise(train(model, 3, replica_of()), plain)
    engine.disable()
    plain = train(_fsdp1_over_tensor_parallelism(mesh), MOVING_STEPS, replica_of())
    model = _fsdp1_over_tensor_parallelism(mesh)
    engine = gradckpt_dist.enable(model, MOVING)
    assert_bitwise(train(model, MOVING_STEPS, replica_of()), plain)
    assert engine.mask.epoch >= 3
    assert len(set(engine.mask.storages)) == 2
    engine.disable()


@pytest.mark.slow
def test_interleaved_1f1b_has_a_domain_for_each_of_two_stages_a_rank() -> None:
    run_distributed_test(_check_interleaved, 2, timeout_seconds=250)


@pytest.mark.slow
def test_pipeline_beside_fsdp2_on_four_ranks() -> None:
    run_distributed_test(_check_pipeline_and_fsdp2, 4, timeout_seconds=250)


@pytest.mark.slow
def test_fsdp1_over_tensor_parallelism_on_four_ranks() -> None:
    run_distributed_test(_check_fsdp1_and_tensor_parallelism, 4, timeout_seconds=250)
