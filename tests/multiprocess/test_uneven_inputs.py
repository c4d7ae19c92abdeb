"""Ranks that run out of data: equal masks under DDP's join, and an error rather than a hang without it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from frameworks import Model, assert_bitwise, without_sync, wrap
from support import run_distributed_test
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parallel import DistributedDataParallel

import gradckpt_dist
from gradckpt_dist import AgreementError

CONFIG = {"interval": 3, "warmup_steps": 0, "memory_budget": 0.5, "log_level": "debug", "agreement_timeout_s": 20}


def _batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(8, 32, generator=generator) for _ in range(count)]


def _epochs(model: nn.Module, counts: list[list[int]], accumulate: int, *, sync: bool = False) -> list[Tensor]:
    """Epochs under join, of as many batches as ``counts`` has for each rank; gradients of each step and weights."""
    torch.manual_seed(100 + dist.get_rank())
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    record: list[Tensor] = []
    for count in counts:
        with model.join():
            for number, batch in enumerate(_batches(count[dist.get_rank()]), start=1):
                if number % accumulate and not sync:
                    with without_sync(model):
                        model(batch).square().mean().backward()
                    continue
                model(batch).square().mean().backward()
                if number % accumulate == 0:
                    record += [p.grad.clone() for p in model.parameters() if p.grad is not None]
                    optimizer.step()
                    optimizer.zero_grad()
        record += [p.detach().clone() for p in model.parameters()]
    return record


def _logs(folder: str) -> list[list[str]]:
    dist.barrier()
    names = ["gradckpt.jsonl", *(f"gradckpt.rank{rank}.jsonl" for rank in range(1, dist.get_world_size()))]
    fields = ('"step"', '"epoch"', '"digest"')
    logs = [Path(folder, name).read_text().splitlines() for name in names]
    return [
        [",".join(part for part in line.split(", ") if part.startswith(fields)) for line in log if '"decision"' in line]
        for log in logs
    ]


def _new(enable_first: bool, folder: str, **settings: Any) -> tuple[nn.Module, gradckpt_dist.Engine]:
    torch.manual_seed(7)
    model = Model()
    if enable_first:
        engine = gradckpt_dist.enable(model, CONFIG | {"log_dir": folder, **settings})
        return wrap(model, "ddp"), engine
    wrapped = wrap(model, "ddp")
    return wrapped, gradckpt_dist.enable(wrapped, CONFIG | {"log_dir": folder, **settings})


CASES: dict[str, dict[str, Any]] = {
    "rank 0 runs out first": {"counts": [[5, 17], [6, 6]], "accumulate": 1},
    "rank 1 does, amid a step": {"counts": [[24, 9], [12, 12]], "accumulate": 2},
    "gradients are exchanged in each micro-batch": {"counts": [[24, 8], [12, 12]], "accumulate": 2, "sync": True},
}


def _check_join() -> None:
    for enable_first in (False, True):
        for name, case in CASES.items():
            torch.manual_seed(7)
            plain = _epochs(wrap(Model(), "ddp"), **case)
            folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
            dist.broadcast_object_list(folder)
            model, engine = _new(enable_first, folder[0])
            assert_bitwise(_epochs(model, **case), plain)
            logs = _logs(folder[0])
            assert logs[0] == logs[1], (name, logs)
            assert len(logs[0]) >= 3, (name, logs)
            assert engine.mask.epoch == len(logs[0])
            engine.disable()
    assert DistributedDataParallel.join_hook.__module__ == DistributedDataParallel.__module__


def _check_copies_know_nothing_of_it() -> None:
    model, engine = _new(False, tempfile.mkdtemp())
    assert "join_hook" not in vars(model)
    assert "join_hook" not in vars(copy.deepcopy(model.module))
    engine.disable()


def _check_early_termination() -> None:
    model, engine = _new(False, tempfile.mkdtemp())
    with pytest.raises(RuntimeError, match="exhausted"), model.join(throw_on_early_termination=True):
        for batch in _batches(12 if dist.get_rank() else 4):
            model(batch).square().mean().backward()
    engine.disable()


def _check_without_join() -> None:
    """No collective but ours, so that ours has to notice."""
    store = _get_default_store()
    model, _ = _new(False, tempfile.mkdtemp(), agreement_timeout_s=3)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)

    def steps(count: int) -> None:
        for batch in _batches(count):
            with without_sync(model):
                model(batch).square().mean().backward()
            optimizer.step()

    if dist.get_rank() == 1:
        steps(8)
        store.wait(["noticed"])
        return
    with pytest.raises(AgreementError, match=r"ranks \[1\] did not answer") as caught:
        steps(60)
    store.set("noticed", "1")
    assert caught.value.rank == 1
    assert caught.value.step is not None


def _check() -> None:
    checks: tuple[Callable[[], None], ...] = (
        _check_join,
        _check_copies_know_nothing_of_it,
        _check_early_termination,
        _check_without_join,
    )
    for check in checks:
        check()


def test_masks_stay_equal_and_nothing_hangs() -> None:
    run_distributed_test(_check, 2, timeout_seconds=200)
