"""A small GPT under a real DeepSpeed engine on the CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from text_model import GPT

LAYERS = 4
SETTINGS = {"policy": "threshold", "memory_budget": 0.5, "interval": 4, "warmup_steps": 0, "log_level": "warning"}


def use_cpu() -> None:
    """Let DeepSpeed use this rank's process group, and no accelerator."""
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "DS_ACCELERATOR": "cpu"}
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def build() -> GPT:
    """The same weights at every call, with dropout."""
    torch.manual_seed(0)
    return GPT(vocabulary=11, context=16, width=32, layers=LAYERS, heads=2, dropout=0.1)


# Every parameter is partitioned, gathered at each use by itself, and let go after it.
ZERO3 = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


def document(stage: int, **sections: Any) -> dict[str, Any]:
    """A DeepSpeed configuration."""
    zero = {"stage": stage} | (ZERO3 if stage == 3 else {})
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        **sections,
    }


class Units:
    """A Megatron-like ``mpu``: all ranks are tensor-parallel."""

    def __init__(self) -> None:
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        self.data = alone[dist.get_rank()]

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_model_parallel_group(self) -> Any:
        return dist.group.WORLD

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> Any:
        return self.data


def start(config: dict[str, Any] | Path, model: torch.nn.Module | None = None, mpu: Any = None) -> Any:
    """An engine of DeepSpeed's, on every rank."""
    import deepspeed

    model = build() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    given = str(config) if isinstance(config, Path) else config
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=given, mpu=mpu, dist_init_required=False)
    torch.manual_seed(dist.get_rank())
    return engine


def train(engine: Any, steps: int) -> list[torch.Tensor]:
    """This rank's losses."""
    losses = []
    for _ in range(steps):
        tokens = torch.randint(11, (2, 17))
        logits = engine(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().clone())
    return losses
