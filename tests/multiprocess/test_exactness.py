"""Gradients under any mask of exact storages are bitwise those of the unmodified model, on every framework."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from frameworks import FRAMEWORKS, Model, assert_bitwise, train, wrap
from support import run_distributed_test
from torch.utils._python_dispatch import TorchDispatchMode

import gradckpt_dist

MASKS = [
    ["keep"] * 6,
    ["recompute"] * 6,
    ["recompute", "keep"] * 3,
    *([random.Random(seed).choice(["keep", "recompute"]) for _ in range(6)] for seed in range(3)),
]
CONFIG = {"policy": "threshold", "interval": 3, "warmup_steps": 0, "memory_budget": 0.5}


def _model(framework: str) -> torch.nn.Module:
    torch.manual_seed(7)
    return wrap(Model(), framework)


def _check_masks(framework: str) -> None:
    for autocast, accumulate in ((False, 1), (True, 1), (False, 3)):
        plain = train(_model(framework), steps=2, autocast=autocast, accumulate=accumulate)
        for storages in MASKS:
            model = _model(framework)
            engine = gradckpt_dist.enable(model, CONFIG)
            engine.set_mask(storages)
            assert_bitwise(train(model, steps=2, autocast=autocast, accumulate=accumulate), plain)
            assert engine.stats()["recomputes"] == _expected_recomputes(storages, 2 * accumulate)
            engine.disable()


def _expected_recomputes(storages: list[str], forwards: int) -> list[int]:
    """Block 2 is called twice in a forward."""
    return [(storage == "recompute") * forwards * (2 if block == 2 else 1) for block, storage in enumerate(storages)]


def _check_moving_mask(framework: str) -> None:
    plain = train(_model(framework), steps=24)
    for policy in ("threshold", "budget"):
        model = _model(framework)
        engine = gradckpt_dist.enable(model, CONFIG | {"policy": policy})
        assert_bitwise(train(model, steps=24), plain)
        assert engine.mask.epoch >= 3
        # Under either policy: the last block may be kept at whatever peak redoing it would need. Which storages beat
        # recomputing it is a matter of time.
        assert set(engine.mask.storages) != {"recompute"}
        engine.disable()


def _check_enabled_before_wrapping(framework: str) -> None:
    after = _model(framework)
    engine_after = gradckpt_dist.enable(after, CONFIG)
    torch.manual_seed(7)
    inner = Model()
    engine_before = gradckpt_dist.enable(inner, CONFIG)
    before = wrap(inner, framework)
    assert engine_before.mask == engine_after.mask
    assert_bitwise(train(before, steps=8), train(after, steps=8))
    for engine in (engine_before, engine_after):
        assert engine.mask.epoch > 0
    engine_before.disable()
    engine_after.disable()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_any_mask_is_bitwise(framework: str) -> None:
    if framework == "single":
        _check_masks(framework)
    else:
        run_distributed_test(_check_masks, 2, framework)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_moving_mask_is_bitwise(framework: str) -> None:
    if framework == "single":
        _check_moving_mask(framework)
    else:
        run_distributed_test(_check_moving_mask, 2, framework)


@pytest.mark.parametrize("framework", FRAMEWORKS[1:])
def test_enabling_before_wrapping_is_the_same(framework: str) -> None:
    run_distributed_test(_check_enabled_before_wrapping, 2, framework)


class _GatherCount(TorchDispatchMode):
    """Counts the all-gathers of FSDP1 and FSDP2 alike."""

    def __init__(self) -> None:
        super().__init__()
        self.gathers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.gathers += "allgather" in func.name()
        return func(*args, **(kwargs or {}))


def _count_gathers(model: torch.nn.Module) -> int:
    with _GatherCount() as count:
        train(model, steps=3)
    return count.gathers


def _check_structure_and_gathers(framework: str) -> None:
    plain = _model(framework)
    expected_gathers = _count_gathers(plain)
    model = _model(framework)
    before = _structure(model)
    engine = gradckpt_dist.enable(model, CONFIG)
    for storages in (["keep"] * 6, ["recompute"] * 6):
        engine.set_mask(storages)
        assert _structure(model) == before
        assert _count_gathers(model) == expected_gathers
    assert (expected_gathers > 0) == (framework != "ddp")
    engine.disable()
    assert _structure(model) == before


def _structure(model: torch.nn.Module) -> tuple[list[str], list[str], list[str], str]:
    names = [name for name, _ in model.named_parameters()]
    return list(model.state_dict()), names, [name for name, _ in model.named_modules()], repr(model)


@pytest.mark.parametrize("framework", ["ddp", "fsdp1", "fsdp1_flat", "fsdp2"])
def test_names_and_gathers_are_unchanged(framework: str) -> None:
    run_distributed_test(_check_structure_and_gathers, 2, framework)
