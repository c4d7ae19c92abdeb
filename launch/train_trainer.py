"""Trains a small Llama to predict the next character, by transformers' ``Trainer`` with gradckpt_dist's callback.

    python launch/train_trainer.py configs/trainer.yaml
    torchrun --nproc-per-node 2 launch/train_trainer.py configs/trainer.yaml --max-steps 200
    torchrun --nproc-per-node 2 launch/train_trainer.py configs/trainer.yaml --deepspeed zero3.json
    torchrun --nproc-per-node 2 launch/train_trainer.py configs/trainer.yaml --resume runs/trainer/checkpoint-100

The YAML file holds ``TrainingArguments``, and the plugin's keys in its section ``gradckpt``. The text ships with Python
(``pydoc_data.topics``), so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from text_model import Text, read_text
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from gradckpt_dist import GradckptCallback

CONTEXT = 64


class Stretches(Dataset[dict[str, Tensor]]):
    """The training text, cut into stretches of ``CONTEXT`` characters."""

    def __init__(self, text: Text) -> None:
        self.rows = text.train.unfold(0, CONTEXT, CONTEXT)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def build(vocabulary: int, lora_rank: int) -> nn.Module:
    """Six decoder layers; with a ``lora_rank`` above 0 they are frozen, beside trained adapters of that rank."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_dropout=0.1,
    )
    model = LlamaForCausalLM(config)
    if not lora_rank:
        return model
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    return get_peft_model(model, LoraConfig(r=lora_rank, target_modules="all-linear", lora_dropout=0.05))


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    """The file's keys, save the plugin's section; then what the command line says."""
    given: dict[str, Any] = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    given.pop("gradckpt", None)
    # Without it Accelerate would leave the ranks on a CPU to themselves.
    given.setdefault("use_cpu", not torch.accelerator.is_available())
    for name in ("max_steps", "output_dir", "deepspeed"):
        if getattr(options, name) is not None:
            given[name] = getattr(options, name)
    return TrainingArguments(**given)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small Llama on characters by transformers' Trainer.")
    add = parser.add_argument
    add("config", type=Path, metavar="FILE", help="YAML: TrainingArguments, and a section gradckpt")
    add("--lora", type=int, default=0, metavar="RANK", help="train LoRA adapters of this rank (needs peft)")
    add("--deepspeed", metavar="FILE", help="DeepSpeed's JSON")
    add("--max-steps", type=int, metavar="N", help="in place of the file's")
    add("--output-dir", metavar="DIR", help="in place of the file's")
    add("--resume", metavar="DIR", help="a checkpoint to go on from")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    arguments = training_arguments(options)
    torch.manual_seed(arguments.seed)
    text = read_text(None)
    callback = GradckptCallback(options.config)
    trainer = Trainer(
        model=build(text.vocabulary, options.lora),
        args=arguments,
        train_dataset=Stretches(text),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=options.resume)
    if trainer.is_world_process_zero() and callback.engine is not None:
        print(f"step {trainer.state.global_step}: {', '.join(callback.engine.mask.storages)}")


if __name__ == "__main__":
    main()
    # Wrapped models, in reference cycles, hold process groups: they have to go first.
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
