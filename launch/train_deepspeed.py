"""Trains the small GPT of train_text.py under DeepSpeed: a plain DeepSpeed script.

    torchrun --nproc-per-node 2 launch/train_deepspeed.py --deepspeed_config configs/deepspeed_zero2.json
    torchrun --nproc-per-node 2 -m gradckpt_dist run launch/train_deepspeed.py --deepspeed_config …
    deepspeed --module gradckpt_dist run launch/train_deepspeed.py --deepspeed_config …

The ``gradckpt`` section of the DeepSpeed configuration counts in the second and the third.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from text_model import GPT, Text, read_text
from torch.nn import functional


def train(options: argparse.Namespace, text: Text) -> None:
    torch.manual_seed(options.seed)  # the same weights on all ranks, then dropout and data of each rank's own
    sizes = {name: getattr(options, name) for name in ("context", "width", "layers", "heads", "dropout")}
    model = GPT(vocabulary=text.vocabulary, **sizes)
    engine, *_ = deepspeed.initialize(args=options, model=model, model_parameters=model.parameters())
    rank = dist.get_rank()
    torch.manual_seed(options.seed + rank)
    sampler = torch.Generator().manual_seed(options.seed + rank)
    if options.load:
        engine.load_checkpoint(options.load)
    while engine.global_steps < options.steps:
        loss = train_step(engine, text, options.context, sampler)
        if rank == 0:
            print(f"step {engine.global_steps}: loss {loss!r}")
    if options.save:
        engine.save_checkpoint(options.save)
    engine.destroy()


def train_step(engine: Any, text: Text, context: int, sampler: torch.Generator) -> float:
    """One optimizer step; this rank's mean loss (nats a character)."""
    losses = []
    for _ in range(engine.gradient_accumulation_steps()):
        windows = text.sample(engine.train_micro_batch_size_per_gpu(), context, sampler).to(engine.device)
        loss = functional.cross_entropy(engine(windows[:, :-1]).float(), windows[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small GPT on characters, under DeepSpeed.")
    for name, default in {"steps": 400, "context": 64, "width": 96, "layers": 6, "heads": 4, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default: {default}")
    parser.add_argument("--dropout", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--save", metavar="FOLDER", help="for DeepSpeed's checkpoint at the end")
    parser.add_argument("--load", metavar="FOLDER", help="go on from a checkpoint")
    parser.add_argument("--local_rank", type=int, help="given by DeepSpeed's launcher")
    deepspeed.add_config_arguments(parser)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    deepspeed.init_distributed()
    train(options, read_text(None))
    gc.collect()  # whatever still holds a process group in a reference cycle goes before the groups do
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
