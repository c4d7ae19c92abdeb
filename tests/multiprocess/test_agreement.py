"""All ranks hold the same mask at the same step, or stop with an error that names rank, step and reason."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from frameworks import Model, train, wrap
from support import run_distributed_test
from torch.distributed.distributed_c10d import _get_default_store

import gradckpt_dist
from gradckpt_dist import AgreementError, BlocksNotFoundError, ConfigError, MaskError

CONFIG = {
    "policy": "threshold",
    "interval": 4,
    "warmup_steps": 0,
    "memory_budget": 0.5,
    "log_level": "debug",
}


def _decisions(folder: str, rank: int) -> list[dict[str, Any]]:
    name = "gradckpt.jsonl" if rank == 0 else f"gradckpt.rank{rank}.jsonl"
    events = [json.loads(line) for line in Path(folder, name).read_text().splitlines()]
    return [event for event in events if event["event"] == "decision"]


def _assert_same_masks(folder: str, ranks: int, at_least: int) -> list[dict[str, Any]]:
    logs = [[(d["step"], d["epoch"], d["digest"]) for d in _decisions(folder, rank)] for rank in range(ranks)]
    assert all(log == logs[0] for log in logs)
    assert len(logs[0]) >= at_least
    decisions = _decisions(folder, 0)
    assert all(math.isfinite(impact) for decision in decisions for impact in decision["impacts"])
    return decisions


def _train_with_log(folder: str, steps: int, disturb: str = "nothing", **settings: Any) -> None:
    torch.manual_seed(3)
    model = wrap(Model(), "ddp")
    engine = gradckpt_dist.enable(model, CONFIG | {"log_dir": folder, **settings})
    if dist.get_rank() == dist.get_world_size() - 1:
        _disturb(engine, disturb)
    train(model, steps=steps)
    engine.disable()


def _disturb(engine: gradckpt_dist.Engine, disturb: str) -> None:
    """Make this rank's own statistics faulty; no real model does it on one rank only and on demand."""
    impact = engine._observer.impact
    if disturb == "samples nothing":
        impact.watch = lambda index, output, inputs: None
    elif disturb in {"nan", "inf"}:
        end_step = impact.end_step

        def poisoned() -> None:
            impact._step.fill(float(disturb))
            end_step()

        impact.end_step = poisoned
    elif disturb.startswith("window "):
        take_window = impact.take_window
        value = float(disturb.removeprefix("window "))
        impact.take_window = lambda: take_window().fill_(value)


@pytest.mark.parametrize("ranks", [2, 4])
def test_masks_are_the_same_on_all_ranks(ranks: int, tmp_path: Path) -> None:
    run_distributed_test(_train_with_log, ranks, str(tmp_path), 20)
    decisions = _assert_same_masks(str(tmp_path), ranks, at_least=3)
    assert all(decision["ranks"] == ranks for decision in decisions)
    assert set(decisions[-1]["mask"]) == {"keep", "recompute"}


def _train_by_budget(folder: str, steps: int, tolerance: float) -> None:
    _train_with_log(folder, steps, policy="budget", gradient_tolerance=tolerance, memory_budget=0.3)


@pytest.mark.parametrize("tolerance", [0.0, 0.2])
def test_ranks_measure_for_themselves_and_hold_the_same_masks(tolerance: float, tmp_path: Path) -> None:
    run_distributed_test(_train_by_budget, 2, str(tmp_path), 24, tolerance)
    decisions = _assert_same_masks(str(tmp_path), 2, at_least=3)
    assert "keep" in decisions[-1]["mask"]
    assert decisions[-1]["theta"] >= 0
    assert decisions[-1]["relative_error_predicted"] <= tolerance


@pytest.mark.parametrize("disturb", ["nan", "inf", "samples nothing", "window nan", "window inf", "window -1e9"])
def test_a_faulty_rank_leaves_masks_identical_and_finite(disturb: str, tmp_path: Path) -> None:
    run_distributed_test(_train_with_log, 2, str(tmp_path), 12, disturb)
    decisions = _assert_same_masks(str(tmp_path), 2, at_least=2)
    if disturb in {"nan", "inf"}:
        assert decisions[-1]["dropped_samples"] >= 4


def _unequal(what: str) -> None:
    rank = dist.get_rank()
    config: dict[str, Any] = dict(CONFIG)
    model = Model()
    blocks = None
    if what == "config":
        config["interval"] = 4 + rank
    elif what == "block list":
        blocks = ["blocks.*"] if rank == 0 else ["blocks.[0-4]"]
    elif what == "version":
        gradckpt_dist.api.__version__ = f"0.{rank}"
    elif what == "bad config" and rank == 1:
        config["intervall"] = 3
    elif what == "no blocks" and rank == 1:
        blocks = ["nothing.*"]
    own = {"bad config": ConfigError, "no blocks": BlocksNotFoundError}
    expected = own[what] if rank == 1 and what in own else AgreementError
    words = {"config": "config.interval", "block list": "blocks", "version": "version"}
    started = time.monotonic()
    with pytest.raises(expected) as caught:
        gradckpt_dist.enable(model, config, blocks=blocks)
    assert time.monotonic() - started < 30
    if expected is AgreementError:
        assert caught.value.rank == 1
        assert "rank 1" in str(caught.value)
        assert words.get(what, "Error") in str(caught.value)


@pytest.mark.parametrize("what", ["config", "block list", "version", "bad config", "no blocks"])
def test_unequal_ranks_all_stop_and_name_rank_and_field(what: str) -> None:
    run_distributed_test(_unequal, 2, what)


def _a_rank_stays_away() -> None:
    if dist.get_rank() == 1:
        _get_default_store().wait(["rank 0 is done"])
        return
    with pytest.raises(AgreementError, match=r"rank 1.*did not take part within 2 s") as caught:
        gradckpt_dist.enable(Model(), CONFIG | {"agreement_timeout_s": 2})
    assert caught.value.rank == 1
    _get_default_store().set("rank 0 is done", "1")


def test_a_rank_that_never_enables_is_named() -> None:
    run_distributed_test(_a_rank_stays_away, 2)


def _a_rank_dies(folder: str) -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Model()
    engine = gradckpt_dist.enable(model, CONFIG | {"agreement_timeout_s": 20})
    started = time.monotonic()
    with pytest.raises(AgreementError) as caught:
        for step in range(40):
            if rank == 1 and step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            train(model, steps=1)
    assert time.monotonic() - started < 20
    assert caught.value.rank == 1
    assert caught.value.step > 0
    Path(folder, f"survivor{rank}").write_text(str(caught.value))
    assert engine.enabled


def test_a_dead_rank_is_named_by_the_survivors(tmp_path: Path) -> None:
    run_distributed_test(_a_rank_dies, 3, str(tmp_path), may_die=[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["survivor0", "survivor2"]


def _engines_one_after_the_other() -> None:
    torch.manual_seed(0)
    groups = set()
    for _ in range(6):
        model = Model()
        engine = gradckpt_dist.enable(model, CONFIG)
        train(model, steps=9)
        assert engine.mask.epoch >= 1
        groups.add(engine._agreement._group)
        engine.disable()
    assert len(groups) == 1
    models = [Model(), Model()]
    engines = [gradckpt_dist.enable(model, CONFIG) for model in models]
    for model in models:
        train(model, steps=9)
    assert len({engine._agreement._group for engine in engines}) == 2
    for engine in engines:
        assert engine.mask.epoch >= 1
        engine.disable()


def test_an_engine_uses_the_group_of_the_one_before_and_none_of_another() -> None:
    run_distributed_test(_engines_one_after_the_other, 2)


def _masks_set_by_hand() -> None:
    rank = dist.get_rank()
    engine = gradckpt_dist.enable(Model(), CONFIG | {"agreement_timeout_s": 2})
    engine.set_mask(["keep"] * 6)
    assert engine.mask.storages == ("keep",) * 6
    epoch = engine.mask.epoch
    with pytest.raises(MaskError, match="5 storages for 6 blocks"):
        engine.set_mask(["keep"] * 5)
    with pytest.raises(AgreementError, match=r"mask\[5\] differs") as caught:
        engine.set_mask(["keep"] * 5 + [("keep", "recompute")[rank]])
    assert caught.value.rank == 1
    assert engine.mask.epoch == epoch
    if rank == 0:
        with pytest.raises(AgreementError, match=r"did not take part within 2 s"):
            engine.set_mask(["recompute"] * 6)
    assert engine.mask.storages == ("keep",) * 6
    dist.barrier()


def test_a_mask_set_by_hand_is_compared() -> None:
    run_distributed_test(_masks_set_by_hand, 2)


def _corrupted_broadcast() -> None:
    torch.manual_seed(0)
    model = Model()
    engine = gradckpt_dist.enable(model, CONFIG)
    agreement = engine._agreement
    make = agreement._new_message

    def corrupted(decision: Any, blocks: int) -> torch.Tensor:
        message = make(decision, blocks)
        if decision is not None:
            message[3] ^= 1
        return message

    agreement._new_message = corrupted
    with pytest.raises(AgreementError, match="does not match its digest"):
        train(model, steps=12)


def test_a_corrupted_broadcast_is_found_on_every_rank() -> None:
    run_distributed_test(_corrupted_broadcast, 2)


def _ranks_at_different_steps() -> None:
    torch.manual_seed(0)
    model = Model()
    engine = gradckpt_dist.enable(model, CONFIG)
    if dist.get_rank() == 1:
        engine._step += 5
    with pytest.raises(AgreementError, match=r"rank 1.*step differs"):
        train(model, steps=12)


def test_ranks_at_different_steps_are_named() -> None:
    run_distributed_test(_ranks_at_different_steps, 2)
