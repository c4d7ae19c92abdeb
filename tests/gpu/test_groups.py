"""Process groups on a GPU: NCCL with one rank, gloo with two that share the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from support import run_distributed_test
from text_model import GPT
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import gradckpt_dist

CONFIG = {"interval": 6, "warmup_steps": 1, "memory_budget": 0.4, "storages": ["keep", "recompute", "selective"]}


def _ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def _fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.cuda.current_device())


def _fsdp2(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": _ddp, "fsdp1": _fsdp1, "fsdp2": _fsdp2}


def _losses(wrapper: str, config: dict | None) -> tuple[list[float], list[tuple[str, ...]]]:
    torch.manual_seed(0)
    model = WRAPPERS[wrapper](GPT(vocabulary=64, context=64, width=128, layers=4, heads=4, dropout=0.1).cuda())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = None if config is None else gradckpt_dist.enable(model, config, optimizer=optimizer)
    torch.manual_seed(1 + dist.get_rank())
    tokens = torch.randint(64, (4, 64)).cuda()
    losses, masks = [], []
    for _ in range(24):
        loss = functional.cross_entropy(model(tokens), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if engine is not None:
            masks.append(engine.mask.storages)
    if engine is not None:
        engine.disable()
    return torch.stack(losses).tolist(), masks


def _train(backend: str, wrapper: str) -> None:
    torch.use_deterministic_algorithms(True)
    if backend == "nccl":
        dist.destroy_process_group()
        torch.cuda.set_device(0)
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    plain, _ = _losses(wrapper, None)
    ours, masks = _losses(wrapper, CONFIG)
    assert ours == plain
    assert len(set(masks)) >= 2
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, masks)
    assert all(one == masks for one in gathered)


@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_one_rank_of_nccl(wrapper: str) -> None:
    run_distributed_test(_train, 1, "nccl", wrapper)


def test_two_ranks_of_gloo_share_a_device() -> None:
    run_distributed_test(_train, 2, "gloo", "ddp")
