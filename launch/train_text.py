"""Trains a small GPT to predict the next character: a plain PyTorch script.

    python launch/train_text.py --steps 100
    torchrun --nproc-per-node 2 launch/train_text.py --parallel ddp --checkpoint runs/text.pt
    torchrun --nproc-per-node 2 launch/train_text.py --parallel ddp --checkpoint runs/text.pt --resume --steps 800

The text ships with Python (``pydoc_data.topics``), so that nothing is downloaded; ``--text FILE`` takes another.
``--metrics FILE`` receives one JSON object a line: ``start``, then ``step`` and ``validation``.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from text_model import GPT, Block, Text, read_text
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

WARMUP_STEPS = 20


class Trainer:
    """The training of one rank."""

    def __init__(self, options: argparse.Namespace, text: Text) -> None:
        self.options, self.text = options, text
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = options.device
        torch.manual_seed(options.seed)  # the same weights on all ranks, then dropout and data of each rank's own
        self.model = wrap(build(options, text.vocabulary).to(self.device), options.parallel, self.device)
        torch.manual_seed(options.seed + self.rank)
        self.sampler = torch.Generator().manual_seed(options.seed + self.rank)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr)
        self.step = 0

    def train_step(self) -> float:
        """One optimizer step; this rank's mean loss (nats a character)."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * min(1.0, (self.step + 1) / WARMUP_STEPS)
        self.optimizer.zero_grad()
        losses = []
        for left in reversed(range(self.options.accumulate)):
            windows = self.text.sample(self.options.batch, self.options.context, self.sampler)
            with synchronise_gradients(self.model, last=left == 0):
                loss = self.loss(windows).mean()
                (loss / self.options.accumulate).backward()
            losses.append(loss.detach())
        self.optimizer.step()
        self.step += 1
        return torch.stack(losses).mean().item()

    def loss(self, windows: Tensor) -> Tensor:
        """The loss of each prediction (nats): [batch, context + 1] -> [batch * context]."""
        windows = windows.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.autocast == "bf16"):
            logits = self.model(windows[:, :-1])
        return functional.cross_entropy(logits.float(), windows[:, 1:].flatten(), reduction="none")

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The mean loss over the held-out text, summed in float64 over all ranks."""
        self.model.eval()
        windows = self.text.validation_windows(self.options.validation_tokens, self.options.context, self.ranks)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in torch.split(windows[self.rank :: self.ranks], self.options.batch):
            losses = self.loss(batch)
            total += torch.stack([losses.double().sum(), total.new_tensor(losses.numel())])
        if self.ranks > 1:
            dist.all_reduce(total)
        loss, tokens = (total[0] / total[1]).item(), int(total[1].item())
        return {"loss": loss, "bits_per_character": loss / math.log(2), "tokens": tokens}

    def save(self, path: Path) -> None:
        """Rank 0 writes the whole state, with the random state of every rank."""
        gather = StateDictOptions(full_state_dict=True)  # torch 2.13: cpu_offload crashes FSDP1 on a CPU
        model, optimizer = get_state_dict(self.model, self.optimizer, options=gather)
        mine = [torch.get_rng_state(), self.sampler.get_state()]
        if self.device.type == "cuda":
            mine.append(torch.cuda.get_rng_state(self.device))
        random: list[Any] = [mine] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(random, mine)
        if self.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(path.name + ".unfinished")
            torch.save({"model": model, "optimizer": optimizer, "step": self.step, "random": random}, unfinished)
            unfinished.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if len(state["random"]) != self.ranks:
            raise SystemExit(f"{path} was written by {len(state['random'])} ranks; resume it with as many")
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        self.step = state["step"]
        default, sampler, *cuda = state["random"][self.rank]
        torch.set_rng_state(default)
        self.sampler.set_state(sampler)
        if cuda and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda[0], self.device)


def build(options: argparse.Namespace, vocabulary: int) -> GPT:
    sizes = {name: getattr(options, name) for name in ("context", "width", "layers", "heads", "dropout")}
    return GPT(vocabulary=vocabulary, **sizes)


def wrap(model: GPT, parallel: str, device: torch.device) -> nn.Module:
    if parallel == "ddp":
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if parallel == "fsdp1":
        policy = ModuleWrapPolicy({Block})
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=device, use_orig_params=True)
    if parallel == "fsdp2":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


@contextmanager
def synchronise_gradients(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Lets the ranks exchange gradients in the last micro-batch of a step only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    with nullcontext() if last else getattr(model, "no_sync", nullcontext)():
        yield


class Metrics:
    """One JSON object a line; only rank 0 writes."""

    def __init__(self, options: argparse.Namespace, rank: int) -> None:
        path = options.metrics if options.metrics and rank == 0 else Path(os.devnull)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a" if options.resume else "w", encoding="utf-8", buffering=1)

    def write(self, event: str, **fields: Any) -> None:
        self.file.write(json.dumps({"event": event, **fields}) + "\n")


@contextmanager
def progress_bar(options: argparse.Namespace, trainer: Trainer) -> Iterator[Callable[[float], None]]:
    """A bar on rank 0, if someone is watching; the function it gives is called with the loss of each step."""
    if trainer.rank != 0 or not (options.progress or sys.stderr.isatty()):
        yield lambda loss: None
        return
    console = Console(stderr=True, force_terminal=options.progress or None)
    with Progress(*Progress.get_default_columns(), console=console) as progress:
        task = progress.add_task("training", total=options.steps, completed=trainer.step)
        yield lambda loss: progress.update(task, advance=1, description=f"loss {loss:.3f}")


def train(options: argparse.Namespace, text: Text) -> None:
    trainer = Trainer(options, text)
    if options.resume:
        trainer.load(options.checkpoint)
    metrics = Metrics(options, trainer.rank)
    metrics.write("start", sha256=text.sha256, ranks=trainer.ranks, torch=torch.__version__, completed=trainer.step)
    with metrics.file, progress_bar(options, trainer) as show:
        while trainer.step < options.steps:
            started = time.monotonic()
            loss = trainer.train_step()
            ended = time.monotonic()
            metrics.write("step", step=trainer.step, loss=loss, seconds=ended - started, started=started, ended=ended)
            show(loss)
            if trainer.step == options.steps or trainer.step % (options.validate_every or options.steps) == 0:
                validation = trainer.validate()
                metrics.write("validation", step=trainer.step, **validation)
                if options.checkpoint:
                    trainer.save(options.checkpoint)
                if trainer.rank == 0:
                    print("step {}: validation loss {loss:.4f} nats a character".format(trainer.step, **validation))


def at_least(minimum: int) -> Callable[[str], int]:
    def whole_number(given: str) -> int:
        if int(given) < minimum:
            raise argparse.ArgumentTypeError(f"{given} is too small; give at least {minimum}")
        return int(given)

    return whole_number


def parse_arguments() -> tuple[argparse.Namespace, Text]:
    parser = argparse.ArgumentParser(description="Train a small GPT on characters.")
    add = parser.add_argument
    add("--parallel", choices=["none", "ddp", "fsdp1", "fsdp2"], default="none", help="all but none need torchrun")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU for each rank, or else the CPU")
    add("--text", type=Path, metavar="FILE", help="the text to learn; default: the help texts that ship with Python")
    sizes = {"steps": 1000, "batch": 8, "context": 64, "width": 96, "layers": 6, "heads": 4, "accumulate": 1}
    for name, default in sizes.items():
        add(f"--{name}", type=at_least(1), default=default, metavar="N", help=f"default: {default}")
    add("--lr", type=float, default=3e-3, help="learning rate after the warm-up (default: %(default)s)")
    add("--dropout", type=float, default=0.1, help="default: %(default)s")
    add("--seed", type=at_least(0), default=0, metavar="N", help="rank r draws its data with seed + r")
    add("--autocast", choices=["none", "bf16"], default="none")
    add("--validate-every", type=at_least(0), default=0, metavar="N", help="steps; 0: at the end only")
    add("--validation-tokens", type=at_least(1), default=48_000, metavar="N", help="at least (default: %(default)s)")
    add("--checkpoint", type=Path, metavar="FILE", help="written after each validation")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--metrics", type=Path, metavar="FILE", help="JSON lines: start, step, validation")
    add("--progress", action="store_true", help="show the bar even if stderr is no terminal")
    options = parser.parse_args()
    try:
        check(options)
        text = read_text(options.text)
        text.validation_windows(options.validation_tokens, options.context, int(os.environ.get("WORLD_SIZE", "1")))
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    return options, text


def check(options: argparse.Namespace) -> None:
    """Looks at what no single argument can tell, and puts this rank's device into ``options.device``."""
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "0")), torch.cuda.device_count()
    if options.parallel == "none" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--parallel none is for one process; give ddp, fsdp1 or fsdp2 under torchrun")
    if options.parallel != "none" and not ranks:
        raise ValueError(f"--parallel {options.parallel} needs torchrun: torchrun --nproc-per-node 2 {sys.argv[0]} ...")
    if options.width % options.heads:
        raise ValueError(f"--width {options.width} is no multiple of --heads {options.heads}")
    if not 0 <= options.dropout < 1:
        raise ValueError(f"--dropout {options.dropout} is out of range; give 0 or more, and less than 1")
    if options.resume and (options.checkpoint is None or not options.checkpoint.is_file()):
        raise ValueError(f"--resume finds no checkpoint at {options.checkpoint}; give --checkpoint FILE")
    if options.device == "cuda" and gpus < max(ranks, 1):
        raise ValueError(f"--device cuda needs a GPU for each rank; there are {gpus} for {max(ranks, 1)}")
    on_gpu = options.device != "cpu" and gpus >= max(ranks, 1)
    options.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")


def main() -> None:
    options, text = parse_arguments()
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)
    if options.parallel == "none":
        train(options, text)
        return
    dist.init_process_group("nccl" if options.device.type == "cuda" else "gloo")
    try:
        train(options, text)
    finally:
        # DDP, in a reference cycle, holds the group. It has to go first: if DDP drops the group last, it does so with
        # Python's lock held, for which a thread of gloo's may be waiting that the group waits for (torch 2.13).
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
