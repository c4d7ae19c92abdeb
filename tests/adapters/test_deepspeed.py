"""DeepSpeed's engine: its section is enough, at every ZeRO stage, and its checkpoints hold our state."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_support import LAYERS, SETTINGS, document, start, train, use_cpu
from frameworks import assert_bitwise
from support import run_distributed_test

import gradckpt_dist

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


def _check_stages(*stages: int) -> None:
    use_cpu()
    for stage in stages:
        _check_stage(stage)


def test_section_is_enough_under_zero2() -> None:
    run_distributed_test(_check_stages, 2, 2, timeout_seconds=250)


@pytest.mark.slow
def test_section_is_enough_at_every_other_stage() -> None:
    run_distributed_test(_check_stages, 2, 0, 1, 3, timeout_seconds=290)
