"""Accelerate on the default gloo group of a test's ranks, with FSDP too."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, TorchDynamoPlugin
from models import backward, batch, build
from torch import nn


def accelerator(framework: str, dynamo_plugin: TorchDynamoPlugin | None = None, **fsdp: Any) -> Accelerator:
    """One for ``single``, ``ddp``, ``fsdp1`` or ``fsdp2``; ``fsdp`` is for its FSDP plugin.

    On a CPU, Accelerate takes DDP where FSDP is asked for. Its state is therefore told that this is FSDP, and prepares
    models as it does on GPUs from there on.
    """
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    if dist.is_initialized():
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
        os.environ |= dict(zip(names, (rank, rank, ranks, ranks), strict=True))
    made = Accelerator(cpu=True, dynamo_plugin=dynamo_plugin)
    if framework.startswith("fsdp"):
        version = int(framework[-1])
        plugin = fsdp_plugin(version, **fsdp)
        # What AcceleratorState() takes over each time that it is asked for.
        PartialState._shared_state |= {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}
        made.state.__dict__ |= {**PartialState._shared_state, "fsdp_plugin": plugin}
        assert made.is_fsdp2 == (version == 2)
    return made


def fsdp_plugin(version: int, **options: Any) -> FullyShardedDataParallelPlugin:
    """Accelerate's settings of FSDP1 or FSDP2, each ``Block`` a unit."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
        use_orig_params=True if version == 1 else None,
        state_dict_type="SHARDED_STATE_DICT",  # gathered ones, offloaded to the CPU, crash FSDP1 there (torch 2.13)
        **options,
    )


class Run:
    """A model with dropout, prepared by an Accelerator, and its losses on data of each rank's own."""

    def __init__(self, framework: str, **options: Any) -> None:
        self.accelerator = accelerator(framework, **options)
        inner: nn.Module = build()
        self.model, self.optimizer = self.accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=0.05))
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.step = 0
        torch.manual_seed(self.rank)
        self._random = torch.get_rng_state()

    def save(self, folder: str) -> None:
        """By Accelerate, with the random state of this run."""
        torch.set_rng_state(self._random)
        self.accelerator.save_state(folder)

    def load(self, folder: str, step: int) -> None:
        """By Accelerate; the state was saved after that many steps."""
        self.accelerator.load_state(folder)
        self._random = torch.get_rng_state()
        self.step = step

    def train(self, steps: int) -> list[float]:
        """That many steps; this rank's losses."""
        torch.set_rng_state(self._random)
        losses = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            losses.append(backward(self.model, batch(2 * self.step + self.rank)).item())
            self.optimizer.step()
            self.step += 1
        self._random = torch.get_rng_state()
        return losses
