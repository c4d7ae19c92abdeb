"""A saved engine as plain values, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import Trainer, build

import gradckpt_dist
from gradckpt_dist import MaskError
from gradckpt_dist.saved_state import SavedState

CONFIG = {"interval": 6, "warmup_steps": 1, "memory_budget": 0.5, "gradient_tolerance": 0.1}


def _state(steps: int) -> dict[str, Any]:
    trainer = Trainer(build())
    engine = gradckpt_dist.enable(trainer.model, CONFIG)
    trainer.train(steps)
    state = engine.state_dict()
    engine.disable()
    return state


def test_a_new_engine_has_the_keys_of_a_trained_one_and_no_nested_ones_that_differ() -> None:
    new, trained = _state(0), _state(16)
    assert new.keys() == trained.keys()
    for state in (new, trained):
        assert json.loads(json.dumps(state)) == state
        assert {name for name, value in state.items() if isinstance(value, dict)} == {"noise"}
        assert SavedState.from_dict(state).to_dict() == state
    assert json.loads(trained["knowledge"])["costs"] != json.loads(new["knowledge"])["costs"]


def test_the_window_adds_up_to_itself_over_ranks_of_any_number() -> None:
    saved = SavedState.from_dict(_state(14))
    assert saved.window is not None
    assert saved.ranks == 1
    whole = torch.tensor(saved.window["sums"], dtype=torch.float64)
    for ranks in (1, 2, 5):
        windows = [saved.window_for(rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.stack([window.sums for window in windows if window]).sum(0), whole)
        assert all(window.maxima == (saved.window["maxima"] if ranks == 1 else []) for window in windows if window)
    assert replace(saved, window=None).window_for(0, 1) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"knowledge": None}, "cannot be read"),
        ({"window": "[" * 100_000}, "cannot be read"),
        ({"totals": "\x80"}, "cannot be read"),
        ({"in_flight": "ELSEWHERE"}, "cannot be read"),
    ],
)
def test_what_is_no_state_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MaskError, match=message):
        SavedState.from_dict(_state(0) | change)


def test_a_missing_key_and_other_blocks_are_named() -> None:
    state = _state(0)
    with pytest.raises(MaskError, match=r"the state is of 4 blocks .* this model has 1 blocks \['x'\]"):
        SavedState.from_dict(state).require_blocks(["x"])
    del state["theta"], state["step"]
    with pytest.raises(MaskError, match="the state has no step, theta; give what state_dict"):
        SavedState.from_dict(state)
