"""A small language model in transformers' own training loop."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from frameworks import assert_bitwise, local
from torch import Tensor, nn

LAYERS = 4
BLOCKS = [f"model.layers.{index}" for index in range(LAYERS)]
MOVING = {"policy": "threshold", "memory_budget": 0.5, "interval": 3, "warmup_steps": 0}
"""A configuration whose mask moves within a dozen steps."""

SAVED = 8
"""The step after which there is a checkpoint."""


@dataclass
class Run:
    """What one training left."""

    wrapper: str
    """The class in which the Trainer has wrapped the model."""
    losses: list[float]
    weights: dict[str, Tensor]
    history: list[dict[str, Any]]
    recorded: list[dict[str, Any]]
    """The training logs as a tracker sees them that stands before the user's callbacks."""
    masks: list[tuple[str, ...]] = field(default_factory=list)
    """In force at the end of each step."""


def llama(**options: Any) -> Any:
    """Four layers with dropout; the same weights at every call."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(num_hidden_layers=LAYERS, vocab_size=64, attention_dropout=0.1, **sizes)
    for name, value in options.items():
        setattr(config, name, value)
    return transformers.LlamaForCausalLM(config)


def with_adapters(model: Any) -> Any:
    """LoRA adapters beside every linear layer; the rest is frozen."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))


def texts() -> list[dict[str, Tensor]]:
    """64 stretches of 16 random tokens."""
    tokens = torch.randint(64, (64, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def deepspeed_config(stage: int) -> dict[str, Any]:
    """What the Trainer fills in is ``auto``."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True, **dict.fromkeys(auto, "auto")}


def train(
    folder: Path, callbacks: Sequence[Any] = (), *, model: Any = None, resume: Path | None = None, **arguments: Any
) -> Run:
    """Twelve steps of two micro-batches, with a checkpoint after ``SAVED``; in a process that trained before, too.

    ``callbacks`` may hold a ``GradckptCallback``; masks are recorded if one is there, or comes.
    """
    from accelerate.state import AcceleratorState, DistributedType, PartialState
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Record(TrainerCallback):
        def __init__(self) -> None:
            self.logs: list[dict[str, Any]] = []
            self.masks: list[tuple[str, ...]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.logs.append(dict(logs))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ours = [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "GradckptCallback"]
            self.masks += [c.engine.mask.storages for c in ours if c.engine is not None]

    AcceleratorState._reset_state()
    defaults = {
        "max_steps": 12,
        "save_steps": SAVED,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "log_level": "error"}
    settings = TrainingArguments(str(folder), use_cpu=True, **defaults | quiet | arguments)
    if "fsdp" in arguments:
        # On a CPU Accelerate takes no notice of FSDP, for no other reason than the name of what it found.
        PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
    record = Record()
    model = llama() if model is None else model
    trainer = Trainer(model=model, args=settings, train_dataset=texts(), callbacks=[record, *callbacks])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    history = trainer.state.log_history
    run = Run(
        wrapper=type(trainer.model_wrapped).__name__,
        losses=[entry["loss"] for entry in history if "loss" in entry],
        weights=_weights(trainer),
        history=history,
        recorded=record.logs,
        masks=record.masks,
    )
    _free(trainer)
    return run


def assert_same(ours: Run, plain: Run) -> None:
    """Bitwise the same losses and weights."""
    assert ours.losses == plain.losses
    assert len(plain.losses) >= 6
    assert list(ours.weights) == list(plain.weights)
    assert_bitwise(list(ours.weights.values()), list(plain.weights.values()))


def assert_moved(run: Run) -> None:
    """The mask moved, and at each step it was the same on all ranks."""
    assert len(set(run.masks)) >= 2
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, run.masks)
        assert everyone == [run.masks] * len(everyone)


def _weights(trainer: Any) -> dict[str, Tensor]:
    if trainer.is_fsdp_enabled:  # this rank's part: gathering FSDP1's crashes on a CPU (torch 2.13)
        return {name: local(tensor).detach().clone() for name, tensor in trainer.model_wrapped.named_parameters()}
    found = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def _free(trainer: Any) -> None:
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed.destroy()
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = nn.Identity()
    gc.collect()


def join_group() -> None:
    """What launchers tell a process, for a rank of ``run_distributed_test``."""
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
