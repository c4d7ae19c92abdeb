"""Saved and loaded by torch.distributed.checkpoint, a run goes on as if it had never stopped."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from frameworks import WIDTH, Model, wrap
from support import run_distributed_test
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful

import gradckpt_dist
from gradckpt_dist import AgreementError
from gradckpt_dist.agreement import roll_call
from gradckpt_dist.schedule import Turn

CONFIG = {"policy": "threshold", "impact": "norm", "interval": 6, "warmup_steps": 1, "memory_budget": 0.5}
STEPS = 26


class Run:
    """FSDP2 under the plugin; data and dropout depend on step and rank alone."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(7)
        self.model = wrap(Model(), "fsdp2")
        self.engine = gradckpt_dist.enable(self.model, CONFIG | settings)
        assert isinstance(self.engine, Stateful)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.01)
        self.steps = 0

    def train(self, until: int) -> list[tuple[float, str, int]]:
        """Loss, and digest and epoch of the mask, by step."""
        record = []
        while self.steps < until:
            seed = 1000 * self.steps + dist.get_rank()
            torch.manual_seed(seed)
            self.optimizer.zero_grad()
            loss = self.model(torch.randn(8, WIDTH)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.steps += 1
            record.append((loss.item(), self.engine.mask.digest, self.engine.mask.epoch))
        return record

    def save(self, folder: str) -> None:
        weights, moments = get_state_dict(self.model, self.optimizer)
        state = {"model": weights, "optimizer": moments, "gradckpt": self.engine, "steps": self.steps}
        dcp.save(state, checkpoint_id=folder)

    def load(self, folder: str) -> None:
        weights, moments = get_state_dict(self.model, self.optimizer)
        state: dict[str, Any] = {"model": weights, "optimizer": moments, "gradckpt": self.engine, "steps": 0}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=weights, optim_state_dict=moments)
        self.steps = state["steps"]

    def close(self) -> None:
        self.engine.disable()
        del self.model, self.optimizer
        gc.collect()


def _goes_on(folder: str, settings: dict[str, Any]) -> None:
    whole = Run(**settings)
    record, turns = [], {}
    for step in range(STEPS):
        record += whole.train(step + 1)
        turn = whole.engine._turn
        if step > 8 and turn not in turns:
            turns[turn] = step + 1
            whole.save(f"{folder}/{turn.name}")
    assert set(turns) == set(Turn)
    assert len({digest for _, digest, _ in record}) >= 2
    whole.close()
    for turn, steps in turns.items():
        resumed = Run(**settings)
        resumed.train(2)  # what it has seen itself counts no more
        resumed.load(f"{folder}/{turn.name}")
        ours = resumed.train(STEPS)
        assert ours == record[steps:], turn
        resumed.close()


def test_losses_and_masks_are_those_of_the_unbroken_run(tmp_path: Path) -> None:
    run_distributed_test(_goes_on, 2, str(tmp_path), {})


def _save(folder: str, settings: dict[str, Any]) -> None:
    run = Run(**settings)
    run.train(16)
    run.save(folder)
    if dist.get_rank() == 0:
        known = run.engine.stats()
        Path(folder, "known.json").write_text(json.dumps({"stats": known, "mask": run.engine.mask.storages}))
    dist.barrier()
    run.close()


def _load(folder: str, settings: dict[str, Any]) -> None:
    run = Run(**settings)
    run.load(folder)
    known = json.loads(Path(folder, "known.json").read_text())
    stats = run.engine.stats()
    assert list(run.engine.mask.storages) == known["mask"]
    for name in ("impacts", "stored_bytes", "epoch", "theta", "dropped_samples"):
        assert stats[name] == known["stats"][name]
    assert known["stats"]["process_peak_bytes"] > 0
    assert stats["process_peak_bytes"] == stats["held_bytes"] == 0
    epoch = run.engine.mask.epoch
    run.train(32)
    assert run.engine.mask.epoch > epoch
    assert run.engine.stats()["process_peak_bytes"] > 0
    run.close()


@pytest.mark.parametrize(("ranks", "tolerance"), [(3, 0.2), (1, 0.0)])
@pytest.mark.slow
def test_another_number_of_ranks_keeps_what_holds_and_measures_the_rest(
    ranks: int, tolerance: float, tmp_path: Path
) -> None:
    settings = {"policy": "budget", "impact": "probe", "gradient_tolerance": tolerance}
    run_distributed_test(_save, 2, str(tmp_path), settings)
    run_distributed_test(_load, ranks, str(tmp_path), settings)


def _saved_by_one_rank() -> None:
    roll_call.JOINED_SECONDS = 0.5
    run = Run()
    run.train(10)
    if dist.get_rank() == 0:
        assert json.loads(run.engine.state_dict()["window"]) is None
    run.train(12)
    state = run.engine.state_dict()
    assert json.loads(state["window"]) is None
    assert run.engine.mask.epoch >= 1
    if dist.get_rank() == 1:
        state["epoch"] += 1
    with pytest.raises(AgreementError, match=r"rank 1.*epoch differs"):
        run.engine.load_state_dict(state)
    run.close()


def test_a_rank_that_saves_alone_leaves_the_window_out_and_hangs_no_other() -> None:
    run_distributed_test(_saved_by_one_rank, 2)
