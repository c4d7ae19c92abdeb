"""What the plugin holds does not grow with the number of decisions."""

from __future__ import annotations

import gc
import os
import sys
import tracemalloc

import pytest
import torch
from torch import nn

import gradckpt_dist
from gradckpt_dist.memory import _STATUS, _kibibytes

CONFIG = {"interval": 2, "warmup_steps": 0, "memory_budget": 0.5, "gradient_tolerance": 0.1}
WARM_UP = 400
DECISIONS = int(os.environ.get("GRADCKPT_TEST_DECISIONS", "300"))
MEBIBYTE = 1 << 20


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def _decide(model: nn.Module, engine: gradckpt_dist.Engine, optimizer: torch.optim.Optimizer, decisions: int) -> None:
    x = torch.ones(2, 4)
    end = engine.mask.epoch + decisions
    while engine.mask.epoch < end:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def _settle_interned_strings() -> None:
    """Bring Python's table of interned strings to its final size: it never shrinks, and grows when names come and go.

    torch makes names in each step, so that the table is made anew, with 4 MiB more, after some 30,000 steps, whether
    there is a plugin or not.
    """
    for number in range(1 << 20):
        sys.intern(f"gradckpt {number}")


@pytest.mark.timeout(300 + DECISIONS // 10)
@pytest.mark.parametrize("policy", ["threshold", "budget"])
def test_decisions_leave_nothing_behind(policy: str) -> None:
    torch.manual_seed(0)
    model = _Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine = gradckpt_dist.enable(model, CONFIG | {"policy": policy})
    _decide(model, engine, optimizer, min(WARM_UP, DECISIONS))
    _settle_interned_strings()  # once all modules have been imported: how large it becomes depends on their names
    gc.collect()
    resident = _kibibytes(_STATUS, "VmRSS") << 10
    tracemalloc.start()
    try:
        _decide(model, engine, optimizer, DECISIONS // 3)  # what tracing itself needs
        gc.collect()
        traced = tracemalloc.get_traced_memory()[0]
        _decide(model, engine, optimizer, DECISIONS // 3)
        gc.collect()
        growth = tracemalloc.get_traced_memory()[0] - traced
    finally:
        tracemalloc.stop()
    assert growth < 16 * 1024
    before = _kibibytes(_STATUS, "VmRSS") << 10
    assert before >= resident / 2
    _decide(model, engine, optimizer, DECISIONS)
    gc.collect()
    assert (_kibibytes(_STATUS, "VmRSS") << 10) - before < MEBIBYTE
    engine.disable()
