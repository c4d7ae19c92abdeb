"""transformers' Trainer with the callback, and without a change to the script."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist
from frameworks import assert_bitwise
from support import run_distributed_test
from trainer_support import BLOCKS, MOVING, Run, deepspeed_config, join_group, train

from gradckpt_dist.launcher.script import ModelWatch, _tell_trainer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


SAVED = 8


def _assert_same(ours: Run, plain: Run) -> None:
    assert ours.losses == plain.losses
    assert len(plain.losses) >= 6
    assert list(ours.weights) == list(plain.weights)
    assert_bitwise(list(ours.weights.values()), list(plain.weights.values()))


def _assert_moved(run: Run) -> None:
    """The mask moved, and at each step it was the same on all ranks."""
    assert len(set(run.masks)) >= 2
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, run.masks)
        assert everyone == [run.masks] * len(everyone)


def _check_ways_in(folder: Path, **options: object) -> None:
    from gradckpt_dist.launcher.trainer import GradckptCallback

    plain = train(folder / "plain", **options)
    callback = GradckptCallback(MOVING)
    ours = train(folder / "ours", [callback], **options)
    _assert_same(ours, plain)
    _assert_moved(ours)
    assert list(callback.engine.mask.blocks) == BLOCKS
    assert not callback.engine.enabled

    watch = ModelWatch(MOVING, on_enabled=_tell_trainer)
    watch.arm()
    unchanged = train(folder / "unchanged", **options)
    _assert_same(unchanged, plain)
    assert unchanged.masks == ours.masks

    # Every checkpoint serves with the plugin and without.
    for written in ("plain", "ours", "unchanged"):
        checkpoint = folder / written / f"checkpoint-{SAVED}"
        for callbacks in ([], [GradckptCallback(MOVING)]):
            resumed = train(folder / f"{written} {len(callbacks)}", callbacks, resume=checkpoint, **options)
            assert resumed.losses == plain.losses
            assert_bitwise(list(resumed.weights.values()), list(plain.weights.values()))
            if callbacks:
                started = len(BLOCKS) * ("recompute",) if written == "plain" else ours.masks[SAVED - 1]
                assert resumed.masks[0] == started
    assert ours.masks[SAVED - 1] != len(BLOCKS) * ("recompute",)


def _check_rank(stage: int | None) -> None:
    join_group()
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    options = {} if stage is None else {"deepspeed": deepspeed_config(stage)}
    _check_ways_in(Path(folder[0]), **options)


def test_one_process(tmp_path: Path) -> None:
    with patch.dict(os.environ):  # the Trainer's libraries set some
        _check_ways_in(tmp_path)


def test_data_parallel() -> None:
    run_distributed_test(_check_rank, 2, None)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed(stage: int) -> None:
    run_distributed_test(_check_rank, 2, stage, timeout_seconds=280)
