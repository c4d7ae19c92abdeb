"""Models that Accelerate prepared: found, trained bitwise as without us, and saved with their mask."""

from __future__ import annotations

import copy
import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from accelerate_support import Run
from support import run_distributed_test

import gradckpt_dist
from gradckpt_dist import Engine
from gradckpt_dist.adapters import adapter_of
from gradckpt_dist.adapters.accelerate import AccelerateAdapter, save_with
from gradckpt_dist.adapters.accelerate_checkpoint import remember_loads

CONFIG = {"policy": "threshold", "memory_budget": 0.5, "interval": 4, "warmup_steps": 0, "agreement_timeout_s": 60}
STEPS, MORE_STEPS = 12, 5


def _ours(framework: str, **options: Any) -> tuple[Run, Engine]:
    run = Run(framework, **options)
    return run, gradckpt_dist.enable(run.model, CONFIG, optimizer=run.optimizer)


def _everywhere(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _check(framework: str, folder: str, fsdp: dict[str, bool]) -> None:
    plain = Run(framework)
    expected = plain.train(STEPS)
    run, engine = _ours(framework, **fsdp)
    assert isinstance(adapter_of(run.model), AccelerateAdapter)
    assert engine.mask.blocks == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    assert set(engine.mask.storages) == {"recompute"}
    assert run.train(STEPS) == expected
    assert set(engine.mask.storages) == {"keep", "recompute"}
    masks = _everywhere((engine.mask.epoch, engine.mask.digest, engine.mask.storages))
    assert len(set(masks)) == 1
    assert list(run.model.state_dict()) == list(plain.model.state_dict())
    _check_checkpoints(framework, Path(folder), fsdp, plain, run, engine)
    engine.disable()


def _check_checkpoints(
    framework: str, folder: Path, fsdp: dict[str, bool], plain: Run, run: Run, engine: Engine
) -> None:
    ours, theirs = str(folder / "ours"), str(folder / "theirs")
    plain.save(theirs)
    run.save(ours)
    mask = engine.mask
    expected = plain.train(MORE_STEPS)
    assert run.train(MORE_STEPS) == expected

    without = Run(framework)
    without.load(ours, STEPS)
    assert without.train(MORE_STEPS) == expected

    started, fresh = _ours(framework, **fsdp)
    started.load(theirs, STEPS)
    assert fresh.mask.epoch == 0
    assert started.train(MORE_STEPS) == expected
    fresh.disable()

    resumed, again = _ours(framework, **fsdp)
    resumed.load(ours, STEPS)
    assert (again.mask.epoch, again.mask.storages) == (mask.epoch, mask.storages)
    assert resumed.train(MORE_STEPS) == expected
    again.disable()


def _check_all(folder: str, cases: list[tuple[str, dict[str, bool]]]) -> None:
    for number, (framework, fsdp) in enumerate(cases):
        _check(framework, f"{folder}/{number}", fsdp)
        gc.collect()


def test_one_process(tmp_path: Path) -> None:
    _check("single", str(tmp_path), {})


def test_ddp_and_fsdp2_whose_checkpointing_is_taken_over(tmp_path: Path) -> None:
    cases = [("ddp", {}), ("fsdp2", {"activation_checkpointing": True})]
    run_distributed_test(_check_all, 2, str(tmp_path), cases)


def test_blocks_that_accelerate_compiled() -> None:
    compiled = TorchDynamoPlugin(backend="aot_eager", use_regional_compilation=True)
    expected = Run("single", dynamo_plugin=compiled).train(STEPS)
    run, engine = _ours("single", dynamo_plugin=compiled)
    assert run.train(STEPS) == expected
    assert set(engine.mask.storages) == {"keep", "recompute"}
    engine.disable()


@pytest.mark.slow
def test_fsdp(tmp_path: Path) -> None:
    cases = [("fsdp1", {}), ("fsdp1", {"activation_checkpointing": True}), ("fsdp2", {})]
    run_distributed_test(_check_all, 2, str(tmp_path), cases)


def _check_that_accelerates_own_loses_random_numbers() -> None:
    own = Run("fsdp2", activation_checkpointing=True).train(STEPS)
    assert own[0] == (plain := Run("fsdp2").train(STEPS))[0]
    assert own != plain


@pytest.mark.slow
def test_what_is_taken_over_is_wrong_without_us() -> None:
    """Should this fail, Accelerate preserves the random numbers itself, and docs/accelerate.md is out of date."""
    run_distributed_test(_check_that_accelerates_own_loses_random_numbers, 2)


def test_disabled_engine_leaves_no_trace_in_the_accelerator(tmp_path: Path) -> None:
    run = Run("single")
    before = [dict(hooks) for hooks in _hooks(run)]
    engine = gradckpt_dist.enable(run.model, CONFIG)
    assert _hooks(run) != before
    engine.disable()
    assert _hooks(run) == before
    run.accelerator.save_state(str(tmp_path))
    assert not list(tmp_path.glob("gradckpt*"))


def test_engine_takes_over_what_was_loaded_before_if_accelerate_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, engine = _ours("single")
    engine.set_mask(["keep"] * 4)
    run.save(str(tmp_path))
    engine.disable()
    monkeypatch.setattr(Accelerator, "__init__", before := Accelerator.__init__)
    remember_loads()
    assert Accelerator.__init__ is before
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    remember_loads()
    resumed = Run("single")
    resumed.load(str(tmp_path), STEPS)
    engine = gradckpt_dist.enable(resumed.model, CONFIG)
    assert engine.mask.storages == ("keep",) * 4
    engine.disable()


def test_two_engines_have_two_files(tmp_path: Path) -> None:
    """The second one is of a model that was not prepared, and so has to be given."""
    run, first = _ours("single")
    other = gradckpt_dist.enable(copy.deepcopy(run.model), CONFIG)
    undo = save_with(run.accelerator, other)
    first.set_mask(["keep"] * 4)
    other.set_mask(["keep", "recompute"] * 2)
    run.accelerator.save_state(str(tmp_path))
    for engine in (first, other):
        engine.set_mask(["recompute"] * 4)
    run.accelerator.load_state(str(tmp_path))
    assert first.mask.storages == ("keep",) * 4
    assert other.mask.storages == ("keep", "recompute") * 2
    undo()
    first.disable()
    other.disable()


def test_state_of_a_mask_that_is_no_longer_allowed_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, engine = _ours("single")
    engine.set_mask(["selective"] * 4)
    run.accelerator.save_state(str(tmp_path))
    engine.disable()
    engine = gradckpt_dist.enable(run.model, {**CONFIG, "storages": ["keep", "recompute"]})
    with caplog.at_level(logging.WARNING, logger="gradckpt_dist"):
        run.accelerator.load_state(str(tmp_path))
    assert set(engine.mask.storages) == {"recompute"}
    (line,) = caplog.messages
    assert "gradckpt.pt is not taken" in line
    assert "selective" in line
    engine.disable()


def _hooks(run: Run) -> list[dict[int, Any]]:
    return [dict(run.accelerator._save_model_state_pre_hook), dict(run.accelerator._load_model_state_pre_hook)]
