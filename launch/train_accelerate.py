"""Trains a small GPT under Accelerate: a plain Accelerate script, which knows nothing of gradckpt.

    gradckpt accelerate launch --config_file configs/accelerate_ddp.yaml launch/train_accelerate.py --steps 100
    gradckpt accelerate launch --config_file configs/accelerate_fsdp2.yaml launch/train_accelerate.py
    gradckpt accelerate launch --config_file configs/accelerate_deepspeed.yaml launch/train_accelerate.py

Without a GPU, Accelerate has to be told so for the first two: ``ACCELERATE_USE_CPU=true gradckpt …``. It then trains
with DDP, whatever the file says of FSDP.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from text_model import GPT, Text, read_text
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


def train(accelerator: Accelerator, options: argparse.Namespace, text: Text) -> None:
    set_seed(options.seed)
    sizes = {name: getattr(options, name) for name in ("context", "width", "layers", "heads", "dropout")}
    model = GPT(vocabulary=text.vocabulary, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    windows = text.train.unfold(0, options.context + 1, options.context)
    loader = DataLoader(TensorDataset(windows), batch_size=options.batch, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if options.resume:
        accelerator.load_state(str(options.checkpoint))
    model.train()
    for step, (batch,) in enumerate(islice(loader, options.steps), 1):
        logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.float(), batch[:, 1:].flatten())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step}: loss {loss.item()}")
    if options.checkpoint:
        accelerator.save_state(str(options.checkpoint))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small GPT on characters, under Accelerate.")
    parser.add_argument("--text", type=Path, help="the text to learn; default: the help texts that ship with Python")
    sizes = {"steps": 100, "batch": 8, "context": 64, "width": 96, "layers": 6, "heads": 4, "seed": 0}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default: {default}")
    parser.add_argument("--lr", type=float, default=3e-3, help="default: %(default)s")
    parser.add_argument("--dropout", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="where the state is saved at the end")
    parser.add_argument("--resume", action="store_true", help="load it first")
    options = parser.parse_args()
    # Without a GPU, Accelerate has no backend of its own for DeepSpeed, and would take each process for the only one.
    backend = InitProcessGroupKwargs(backend=None if torch.cuda.is_available() else "gloo")
    accelerator = Accelerator(kwargs_handlers=[backend])
    train(accelerator, options, read_text(options.text))
    accelerator.free_memory()  # wrapped models have to go before the process group that they hold
    accelerator.end_training()


if __name__ == "__main__":
    main()
