"""The ``activation_checkpointing`` section of a DeepSpeed configuration, which DeepSpeed itself only parses."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Self

import torch.distributed as dist

from gradckpt_dist.adapters.deepspeed_parts import checkpointing, part
from gradckpt_dist.engine import Engine
from gradckpt_dist.storage.kept_inputs import KeptInputs

logger = logging.getLogger("gradckpt_dist")

REFUSALS = {
    "contiguous_memory_optimization": (
        "how many blocks keep their inputs changes with the mask, so that there is no buffer of one size to lay out; "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True keeps memory from being fragmented"
    ),
    "synchronize_checkpoint_boundary": (
        "it would hold up the host at each block, and the plugin never does; torch.profiler shows where blocks begin"
    ),
    "profile": "its timers would synchronise at each block; torch.profiler shows the time of forward and recomputation",
}
"""By key that is not carried out, why not."""

_FLAGS = {
    "partition_activations": "PARTITION_ACTIVATIONS",
    "cpu_checkpointing": "CPU_CHECKPOINT",
    "contiguous_memory_optimization": "CONTIGUOUS_CHECKPOINTING",
    "synchronize_checkpoint_boundary": "SYNCHRONIZE",
    "profile": "PROFILE_TIME",
}
"""By key, what ``deepspeed.checkpointing.configure`` sets."""


@dataclass(frozen=True, kw_only=True)
class ActivationSettings:
    """What the section asks for, or what the script gave to ``deepspeed.checkpointing.configure``."""

    partition_activations: bool
    cpu_checkpointing: bool
    number_checkpoints: int | None
    refused: tuple[str, ...]
    tensor_parallel_group: Any
    """None where there is one tensor-parallel rank."""

    @classmethod
    def of(cls, trainer: Any) -> Self:
        """The settings of a DeepSpeed engine."""
        section = trainer._config.activation_checkpointing_config
        asked = {
            name: bool(getattr(section, name)) for name in ("partition_activations", "cpu_checkpointing", *REFUSALS)
        }
        number = section.number_checkpoints
        configured = checkpointing()
        if configured.is_configured():
            asked |= {name: asked[name] or bool(getattr(configured, flag)) for name, flag in _FLAGS.items()}
            number = configured.num_layers if number is None else number
        mpu = _mpu(trainer.mpu if trainer.mpu is not None else configured.mpu)
        groups = part("utils.bwc")
        sharded = groups.bwc_tensor_model_parallel_world_size(mpu) > 1
        return cls(
            partition_activations=asked["partition_activations"],
            cpu_checkpointing=asked["cpu_checkpointing"],
            number_checkpoints=number,
            refused=tuple(name for name in REFUSALS if asked[name]),
            tensor_parallel_group=groups.bwc_tensor_model_parallel_group(mpu) if sharded else None,
        )

    def start(self, blocks: int) -> tuple[str, ...] | None:
        """``number_checkpoints`` of the blocks recomputed, evenly spread, the first included; None without it."""
        number = self.number_checkpoints
        if number is None:
            return None
        return tuple("recompute" if i * number % blocks < number else "keep" for i in range(blocks))

    def apply(self, engine: Engine) -> None:
        """Arrange where recomputed blocks keep their inputs, and say what became of each key."""
        group = self.tensor_parallel_group if self.partition_activations else None
        if group is not None or self.cpu_checkpointing:
            context = engine.gate.context
            context.kept_inputs = KeptInputs(group, context.lane if self.cpu_checkpointing else None)
        if dist.get_rank() == 0:
            self._tell(engine)

    def _tell(self, engine: Engine) -> None:
        if self.number_checkpoints is not None:
            recomputed = engine.mask.storages.count("recompute")
            logger.info(
                "gradckpt: number_checkpoints %d: training starts with %d of %d blocks recomputed",
                self.number_checkpoints,
                recomputed,
                len(engine.mask),
            )
        if self.cpu_checkpointing:
            offload = "is allowed" if "offload" in engine.config.storages else "is not among the storages given"
            logger.info(
                "gradckpt: cpu_checkpointing: recomputed blocks keep their inputs in host memory; storage 'offload' %s",
                offload,
            )
        if self.partition_activations:
            ranks = 1 if self.tensor_parallel_group is None else dist.get_world_size(self.tensor_parallel_group)
            logger.info(
                "gradckpt: partition_activations: recomputed blocks keep 1/%d of their inputs on each "
                "tensor-parallel rank",
                ranks,
            )
        for name in self.refused:
            logger.warning("gradckpt: activation_checkpointing.%s is not carried out: %s", name, REFUSALS[name])


def _mpu(mpu: Any) -> Any:
    """None where it does not know tensor-parallel ranks: sequence parallelism's unit has none."""
    known = ("get_tensor_model_parallel_world_size", "get_slice_parallel_world_size", "get_model_parallel_world_size")
    return mpu if any(hasattr(mpu, name) for name in known) else None
