"""Every exact storage on every framework, for every kind of block: bitwise the gradients and buffers of ``keep``."""

from __future__ import annotations

import pytest
import torch
from frameworks import assert_bitwise, train, wrap
from matrix_blocks import CASES, model
from models import operations
from support import run_distributed_test

import gradckpt_dist
from gradckpt_dist.storage import STORAGES

EXACT = tuple(name for name, storage in STORAGES.items() if storage.exact)
CONFIG = {"storages": list(EXACT), "interval": 1000, "warmup_steps": 0}
STEPS = 3


def _check(framework: str) -> None:
    for case, options in CASES.items():
        plain = train(wrap(model(case), framework), steps=STEPS, **options)
        for storage in EXACT:
            wrapped = wrap(model(case), framework)
            engine = gradckpt_dist.enable(wrapped, CONFIG)
            engine.set_mask([storage] * 3)
            ours = train(wrapped, steps=STEPS, **options)
            try:
                assert_bitwise(ours, plain)
            except AssertionError as error:
                raise AssertionError(f"{storage}, {framework}, {case}: {error}") from error
            runs = STEPS if storage == "recompute" else 0
            assert engine.stats()["recomputes"] == [runs] * 3, f"{storage}, {framework}, {case}"
            engine.disable()


@pytest.mark.parametrize("framework", ["single", "ddp", "fsdp1", "fsdp2"])
def test_gradients_and_buffers_are_bitwise(framework: str) -> None:
    assert {"recompute", "selective", "selective_half", "offload"} <= set(EXACT)
    if framework == "single":
        _check(framework)
    else:
        run_distributed_test(_check, 2, framework)


def _check_work(framework: str) -> None:
    """Weights that are gathered anew are the same weights to ``selective``."""
    wrapped = wrap(model("dropout"), framework)
    engine = gradckpt_dist.enable(wrapped, CONFIG)
    products = {}
    for storage in ("keep", "selective", "recompute"):
        engine.set_mask([storage] * 3)
        output = wrapped(torch.randn(CASES["dropout"]["shape"]))
        with operations() as names:
            output.sum().backward()
        products[storage] = sum(name.startswith("aten.addmm") for name in names)
    assert products == {"keep": 0, "selective": 0, "recompute": 12}
    engine.disable()


@pytest.mark.parametrize("framework", ["ddp", "fsdp1", "fsdp1_flat", "fsdp2"])
def test_selective_finds_what_it_holds(framework: str) -> None:
    run_distributed_test(_check_work, 2, framework)
