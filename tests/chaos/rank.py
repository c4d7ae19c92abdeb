"""One rank of a chaos run: trains twice, without the plugin and with it, and writes down each step."""

from __future__ import annotations

import json
import os
import signal
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch._inductor.compile_fx  # in the parent of all ranks: it takes seconds
import torch.distributed as dist
from faults import STEPS, Plan, arrange, full_disk
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradckpt_dist

WIDTH = 16
COMPLETED, STOPPED, FAILED = 0, 3, 4


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class Block(nn.Module):
    """With ``coupled``, the ranks hold parts of the hidden layer: differing masks pair the wrong collectives."""

    def __init__(self, coupled: bool) -> None:
        super().__init__()
        self.coupled = coupled
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        inner = _SumBackward.apply(x) if self.coupled else x
        inner = self.down(torch.tanh(self.up(inner)))
        return x + self.dropout(_SumForward.apply(inner) if self.coupled else inner)


class Model(nn.Module):
    def __init__(self, coupled: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(coupled) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def run(plan: Plan, rank: int) -> None:
    """Never returns; the exit status says how it ended, the file ``rank<N>.jsonl`` what happened."""
    status = FAILED
    record = os.open(f"{plan.folder}/rank{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(**found: Any) -> None:
        os.write(record, (json.dumps(found) + "\n").encode())

    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        warnings.simplefilter("ignore")
        store = dist.FileStore(f"{plan.folder}/store", plan.ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=plan.ranks)
        _train(plan, rank, write)
        status = COMPLETED
    except gradckpt_dist.AgreementError as error:
        write(error=error.reason, rank=error.rank, at=error.step)
        status = STOPPED
    except SystemExit:
        status = STOPPED
    except BaseException:
        write(failure=traceback.format_exc())
    finally:
        os._exit(status)


def _train(plan: Plan, rank: int, write: Any) -> None:
    expected = [[gradient.clone() for gradient in gradients] for gradients in _Steps(plan, rank)]
    dist.barrier()
    steps = _Steps(plan, rank)
    config = dict(plan.config)
    if plan.fault == "full disk":
        config["log_dir"] = full_disk(Path(plan.folder), rank)
    engine = gradckpt_dist.enable(steps.model, config)
    disturb = arrange(plan, engine, rank)
    for step, reference in enumerate(expected):
        disturb(step)
        gradients = next(steps)
        exact = all(torch.equal(one, other) for one, other in zip(gradients, reference, strict=True))
        write(step=step, epoch=engine.mask.epoch, digest=engine.mask.digest, exact=exact)
    write(decisions=engine.mask.epoch, storages=engine.mask.storages)
    engine.disable()


class _Steps:
    """The gradients of each step in turn; weights, data and dropout come from the seed."""

    def __init__(self, plan: Plan, rank: int) -> None:
        coupled = plan.form == "coupled"
        torch.manual_seed(plan.seed)
        model: nn.Module = Model(coupled)
        if coupled:  # parts of their own, on the same data
            torch.manual_seed(plan.seed * 64 + rank)
            for block in model.blocks:
                nn.init.normal_(block.up.weight, std=0.2)
        self.model = DistributedDataParallel(model) if plan.form == "ddp" else model
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self._data_seed = plan.seed * 64 + (0 if coupled else rank)
        self._step = 0

    def __iter__(self) -> _Steps:
        return self

    def __next__(self) -> list[Tensor]:
        if self._step == STEPS:
            raise StopIteration
        torch.manual_seed(self._data_seed * 1000 + self._step)
        self._optimizer.zero_grad()
        self.model(torch.randn(4, WIDTH)).square().mean().backward()
        self._step += 1
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self._optimizer.step()
        return gradients
