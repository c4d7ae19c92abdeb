"""DeepSpeed's engine: its section is enough, at every ZeRO stage, and its checkpoints hold our state."""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_support import LAYERS, SETTINGS, document, start, train, use_cpu
from frameworks import assert_bitwise
from models import operations
from support import run_command, run_distributed_test

import gradckpt_dist
from gradckpt_dist.errors import ConfigError

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

STEPS = 12


def _shared_folder() -> Path:
    """The same new folder on all ranks."""
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)
    return Path(str(name[0]))


def _same_on_all_ranks(value: Any) -> None:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    assert all(other == value for other in values)


def _check_stage(stage: int) -> None:
    plain = start(document(stage))
    reference, keys = train(plain, STEPS + 2), set(plain.module.state_dict())
    plain.destroy()

    trainer = start(document(stage, gradckpt=SETTINGS))
    engine = gradckpt_dist.enable(trainer)
    assert (engine.config.interval, engine.config.policy) == (4, "threshold")
    assert engine.mask.blocks == tuple(f"blocks.{i}" for i in range(LAYERS))
    assert set(trainer.module.state_dict()) == keys
    masks = []
    losses = []
    for _ in range(STEPS):
        losses += train(trainer, 1)
        masks.append(engine.mask.storages)
    assert_bitwise(losses, reference[:STEPS])
    assert len(set(masks)) > 1, masks
    _same_on_all_ranks((masks, engine.mask.digest))

    folder = _shared_folder()
    trainer.save_checkpoint(str(folder), client_state={"mine": 1})
    rng = torch.get_rng_state()
    saved = engine.state_dict()
    engine.disable()
    assert "save_checkpoint" not in trainer.__dict__
    trainer.destroy()

    # Without us: the client state has one more key, and nothing else is different.
    plain = start(document(stage))
    _, client_state = plain.load_checkpoint(str(folder))
    assert client_state["mine"] == 1
    torch.set_rng_state(rng)
    assert_bitwise(train(plain, 2), reference[STEPS:])
    plain.save_checkpoint(str(folder), tag="plain")
    plain.destroy()

    # With us again, from the checkpoint with our state and from the one without.
    trainer = start(document(stage, gradckpt=SETTINGS))
    engine = gradckpt_dist.enable(trainer)
    _, client_state = trainer.load_checkpoint(str(folder), tag=f"global_step{STEPS}")
    assert client_state["mine"] == 1
    assert "gradckpt" not in client_state
    assert engine.state_dict() == saved
    torch.set_rng_state(rng)
    assert_bitwise(train(trainer, 2), reference[STEPS:])
    trainer.load_checkpoint(str(folder), tag="plain")
    engine.disable()
    trainer.destroy()


def _gathers(trainer: Any, steps: int) -> list[int]:
    """All-gathers of parameters in each of these steps."""
    counts = []
    for _ in range(steps):
        with operations() as names:
            train(trainer, 1)
        counts.append(sum("allgather" in name for name in names))
    return counts


def _check_gathers() -> None:
    """Under ZeRO-3, a kept block gathers no more than without us; a recomputed one gathers its own once more."""
    plain = start(document(3))
    usual = _gathers(plain, 6)[-1]
    plain.destroy()
    trainer = start(document(3))
    engine = gradckpt_dist.enable(trainer, {"warmup_steps": 500})
    assert (engine.config.interval, engine.config.hysteresis) == (200, 0.1)
    engine.set_mask(["keep"] * LAYERS)
    kept = _gathers(trainer, 6)[-1]
    engine.set_mask(["keep", "recompute", "keep", "keep"])
    recomputed = _gathers(trainer, 6)[-1]
    assert 0 < kept == usual < recomputed, (usual, kept, recomputed)
    # The trace was recorded anew after the change, what that took was noted, and it holds again.
    train(trainer, 8)
    assert trainer.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
    engine.disable()
    assert "_take_model_step" not in trainer.__dict__
    trainer.destroy()


def _check_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that the loss scaler skips teach nothing, and training is bitwise as without us."""
    from deepspeed.accelerator import get_accelerator

    # Of a CPU without fast instructions for it, DeepSpeed says that it does not support fp16; PyTorch does.
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    scaled = {"fp16": {"enabled": True, "initial_scale_power": 18, "hysteresis": 1, "loss_scale_window": 100}}
    plain = start(document(2, **scaled))
    reference = train(plain, 16)
    assert 2 <= plain.skipped_steps <= 9
    plain.destroy()
    trainer = start(document(2, gradckpt=SETTINGS, **scaled))
    engine = gradckpt_dist.enable(trainer)
    assert_bitwise(train(trainer, 16), reference)
    stats = engine.stats()
    assert stats["step"] == 15 - trainer.skipped_steps
    assert stats["dropped_samples"] >= 1
    assert stats["decisions"] >= 1
    _same_on_all_ranks(engine.mask.storages)
    engine.disable()
    trainer.destroy()


def _check_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which configuration counts, and how a wrong one is refused."""
    folder = _shared_folder()
    monkeypatch.chdir(folder)
    (folder / "env.yaml").write_text("gradckpt: {interval: 7}")
    monkeypatch.setenv("GRADCKPT_CONFIG", str(folder / "env.yaml"))
    trainer = start(document(0, gradckpt={"interval": 9, "memory_budget": None, "threshold": {"value": None}}))
    for given, interval in ((None, 9), ({"interval": 5}, 5), (str(folder / "env.yaml"), 7)):
        engine = gradckpt_dist.enable(trainer, given)
        assert (engine.config.interval, engine.config.hysteresis) == (interval, 0.05)
        assert (engine.config.memory_budget, engine.config.threshold.value) == ("auto", "auto")
        engine.disable()
    trainer.destroy()
    trainer = start(document(0))
    engine = gradckpt_dist.enable(trainer)
    assert engine.config.interval == 7
    engine.disable()
    trainer.destroy()

    wrong = document(0, gradckpt={"intervall": 9})
    path = folder / f"wrong{dist.get_rank()}.json"
    path.write_text(json.dumps(wrong))
    other = folder / f"right{dist.get_rank()}.json"
    other.write_text(json.dumps(document(0, gradckpt={"interval": 9})))
    dist.barrier()
    expected = r"wrong\d.json: unknown key 'intervall'; did you mean 'interval'\?"
    trainer = start(path)
    with pytest.raises(ConfigError, match=expected):
        gradckpt_dist.enable(trainer)
    trainer.destroy()
    dist.barrier()
    path.unlink()
    dist.barrier()
    trainer = start(wrong)
    with pytest.raises(ConfigError, match=r"^section 'gradckpt' of the DeepSpeed configuration: unknown key"):
        gradckpt_dist.enable(trainer)
    trainer.destroy()


def _check_stages(*stages: int) -> None:
    use_cpu()
    for stage in stages:
        _check_stage(stage)


def _check_rest() -> None:
    use_cpu()
    _check_gathers()
    with pytest.MonkeyPatch.context() as monkeypatch:
        _check_overflow(monkeypatch)
        _check_configuration(monkeypatch)


def test_section_is_enough_under_zero2() -> None:
    run_distributed_test(_check_stages, 2, 2, timeout_seconds=250)


@pytest.mark.slow
def test_section_is_enough_at_every_other_stage() -> None:
    run_distributed_test(_check_stages, 2, 0, 1, 3, timeout_seconds=290)


def test_gathers_overflows_and_configurations() -> None:
    run_distributed_test(_check_rest, 2, timeout_seconds=250)


def test_nothing_is_imported_that_the_script_has_not_imported() -> None:
    script = """
import sys, torch, gradckpt_dist
from torch import nn
model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
gradckpt_dist.enable(model).disable()
print(sorted(name for name in ("deepspeed", "accelerate", "transformers") if name in sys.modules))
"""
    done = run_command([sys.executable, "-c", script])
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
