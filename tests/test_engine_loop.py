"""The engine over a longer training of a small transformer: what runs again, what is held, what is left behind."""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Trainer, backward, batch, build, instance_state, operations

import gradckpt_dist
from gradckpt_dist import ConflictError, Engine, MaskError, StorageError
from gradckpt_dist.engine import Turn
from gradckpt_dist.storage import STORAGES

AUTO = {"policy": "threshold", "interval": 6, "warmup_steps": 2, "memory_budget": 0.5}


def _trained(config: dict[str, Any] | None, steps: int) -> tuple[Trainer, list[float], torch.Tensor]:
    trainer = Trainer(build())
    engine = None if config is None else gradckpt_dist.enable(trainer.model, config)
    torch.manual_seed(1)
    losses = trainer.train(steps)
    if engine is not None:
        engine.disable()
    return trainer, losses, torch.get_rng_state()


def test_sixty_steps_are_bitwise_those_without_the_plugin(tmp_path: Path) -> None:
    plain, losses, state = _trained(None, 60)
    ours, our_losses, our_state = _trained(AUTO | {"log_dir": str(tmp_path)}, 60)
    assert our_losses == losses
    assert torch.equal(our_state, state)
    for one, other in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(one, other)
    events = [json.loads(line) for line in (tmp_path / "gradckpt.jsonl").read_text().splitlines()]
    assert events[0]["event"] == "start"
    assert events[0]["mask"] == ["recompute"] * 4
    decisions = events[1:]
    # Launched before steps 6, 12, …; applied three boundaries later.
    assert [event["step"] for event in decisions] == list(range(9, 60, 6))
    assert [event["epoch"] for event in decisions] == list(range(1, 10))
    for event in decisions:
        assert event["mask"].count("recompute") == 2
        assert event["predicted_held_bytes"] <= event["predicted_peak_bytes"]


def test_runs_again_are_those_of_the_mask_in_every_step() -> None:
    trainer = Trainer(build())
    engine = gradckpt_dist.enable(trainer.model, AUTO)
    before, masks = [0] * 4, set()
    for _ in range(30):
        trainer.step()
        after = engine.stats()["recomputes"]
        assert tuple(trainer.recomputed) == engine.mask.storages
        assert [new - old for new, old in zip(after, before, strict=True)] == [
            int(storage == "recompute") for storage in engine.mask.storages
        ]
        before = after
        masks.add(engine.mask.storages)
    assert ("recompute",) * 4 in masks
    assert len(masks) >= 2
    engine.disable()


@pytest.mark.parametrize("high", [0, 1, 2, 3, 4])
def test_a_threshold_value_recomputes_exactly_the_blocks_above_it(high: int) -> None:
    probe = Trainer(build())
    engine = gradckpt_dist.enable(probe.model, AUTO)
    torch.manual_seed(1)
    probe.train(10)
    impacts = sorted(engine.stats()["impacts"], reverse=True)
    engine.disable()
    value = [2 * impacts[0], *((a + b) / 2 for a, b in itertools.pairwise(impacts)), 0.0][high]
    trainer = Trainer(build())
    engine = gradckpt_dist.enable(trainer.model, AUTO | {"threshold": {"value": value}})
    torch.manual_seed(1)
    trainer.train(10)
    stats = engine.stats()
    assert trainer.recomputed == ["recompute" if impact > value else "keep" for impact in stats["impacts"]]
    assert trainer.recomputed.count("recompute") == high
    assert stats["theta"] == value
    engine.disable()


def test_held_bytes_fall_by_what_the_mask_says() -> None:
    held, saved = {}, {}
    for every_n in (0, 1, 2, 3):
        trainer = Trainer(build())
        engine = gradckpt_dist.enable(trainer.model, AUTO | {"policy": "static", "every_n": every_n})
        trainer.train(8)
        stats = engine.stats()
        held[every_n], saved[every_n] = stats["held_bytes"], stats["predicted_held_bytes"]
        assert stats["stored_bytes"]["keep"] == [stats["stored_bytes"]["keep"][0]] * 4
        engine.disable()
    assert held[0] > held[3] > held[1]
    for every_n in (1, 2, 3):
        assert held[0] - held[every_n] == saved[0] - saved[every_n]


def _operations_of_a_step(trainer: Trainer) -> list[str]:
    with operations() as names:
        trainer.step()
    return names


def test_steps_that_are_not_sampled_run_the_same_operations_as_without_us() -> None:
    plain = Trainer(build())
    expected = _operations_of_a_step(plain)
    trainer = Trainer(build())
    engine = gradckpt_dist.enable(trainer.model, AUTO | {"policy": "static", "every_n": 0, "interval": 20})
    other = [step for step in range(30) if _operations_of_a_step(trainer) != expected]
    # The boundary after a sampled step folds it in; a decision of one process needs no tensor.
    sampled = [2, 3, 4, 5, 10, 15, 20, 25]
    assert other == sorted({*sampled, *(step + 1 for step in sampled)})
    engine.disable()


def _advance_to(engine: Engine, trainer: Trainer, turn: Turn) -> None:
    for _ in range(20):
        trainer.step()
        if engine._turn is turn:
            return
    pytest.fail(f"no decision was ever {turn.name}")


@pytest.mark.parametrize("turn", Turn)
def test_set_mask_holds_whatever_is_in_flight(turn: Turn) -> None:
    trainer = Trainer(build())
    engine = gradckpt_dist.enable(trainer.model, AUTO)
    _advance_to(engine, trainer, turn)
    pinned = ["keep", "recompute", "recompute", "recompute"]
    epoch = engine.mask.epoch
    engine.set_mask(pinned)
    assert (engine.mask.storages, engine.mask.epoch) == (tuple(pinned), epoch + 1)
    for _ in range(15):
        trainer.step()
        assert trainer.recomputed == pinned
    assert engine.mask.epoch == epoch + 1
    engine.set_mask(None)
    trainer.train(15)
    assert engine.mask.epoch > epoch + 1
    assert trainer.recomputed == list(engine.mask.storages)
    engine.disable()


@pytest.mark.parametrize(
    ("storages", "message"),
    [
        ([], "0 storages for 4 blocks"),
        (["keep"] * 5, "5 storages for 4 blocks"),
        (["keep", "zip", "keep", "keep"], r"unknown storage 'zip' for block 'blocks\.1'"),
        (["keep", "compress4", "keep", "keep"], "compress4 are not allowed by this configuration"),
    ],
)
def test_a_mask_that_is_refused_changes_nothing(storages: list[str], message: str) -> None:
    trainer = Trainer(build())
    engine = gradckpt_dist.enable(trainer.model, AUTO)
    trainer.train(7)
    before = engine.mask
    with pytest.raises(MaskError, match=message):
        engine.set_mask(storages)
    assert engine.mask is before
    trainer.step()
    assert trainer.recomputed == list(engine.mask.storages)
    trainer.train(10)
    assert engine.mask.epoch > before.epoch
    engine.disable()


def test_a_storage_that_cannot_serve_the_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(build())
    engine = gradckpt_dist.enable(trainer.model, AUTO | {"storages": ["keep", "recompute", "offload"]})
    trainer.step()
    before = engine.mask
    monkeypatch.delitem(STORAGES, "offload")
    with pytest.raises(StorageError, match="storage 'offload' is not available"):
        engine.set_mask(["keep", "keep", "offload", "keep"])
    assert engine.mask is before
    trainer.step()
    assert trainer.recomputed == list(before.storages)
    trainer.train(10)
    assert engine.mask.epoch > before.epoch
    engine.disable()


def test_another_engine_goes_on_from_any_step_as_if_nothing_had_happened() -> None:
    whole = Trainer(build())
    engine = gradckpt_dist.enable(whole.model, AUTO)
    torch.manual_seed(1)
    saved = []
    for _ in range(16):
        whole.step()
        weights = {name: weight.clone() for name, weight in whole.model.state_dict().items()}
        saved.append((json.loads(json.dumps(engine.state_dict())), weights, torch.get_rng_state(), whole.steps))
    assert {state["in_flight"] for state, *_ in saved} == {turn.name for turn in Turn}
    losses, masks, impacts = _followed(whole, engine)
    engine.disable()
    for state, weights, rng, steps in saved[3:]:
        resumed = Trainer(build())
        resumed.model.load_state_dict(weights)
        resumed.steps = steps
        engine = gradckpt_dist.enable(resumed.model, AUTO)
        engine.load_state_dict(state)
        assert engine.state_dict() == state
        assert (list(engine.mask.storages), engine.mask.epoch) == (state["storages"], state["epoch"])
        torch.set_rng_state(rng)
        resumed.train(whole.steps - 12 - steps)
        assert _followed(resumed, engine) == (losses, masks, pytest.approx(impacts, rel=1e-12)), state["in_flight"]
        engine.disable()


def _followed(trainer: Trainer, engine: Engine) -> tuple[list[float], list[Any], list[float]]:
    """Twelve steps: losses, masks, and the impacts at the end."""
    losses, masks = [], []
    for _ in range(12):
        losses.append(trainer.step().item())
        masks.append(engine.mask)
    return losses, masks, engine.stats()["impacts"]


def test_a_pinned_state_stays_pinned_and_a_foreign_one_is_refused() -> None:
    trainer = Trainer(build())
    engine = gradckpt_dist.enable(trainer.model, AUTO)
    engine.set_mask(["keep"] * 4)
    state = engine.state_dict()
    engine.disable()
    other = Trainer(build())
    engine = gradckpt_dist.enable(other.model, AUTO)
    engine.load_state_dict(state)
    other.train(12)
    assert other.recomputed == ["keep"] * 4
    before = engine.mask
    others = ({"blocks": ["x"] * 4}, {"storages": ["keep"] * 3}, {"storages": ["offload"] * 4})
    for wrong in (*others, {"knowledge": "{"}, {"window": None}, {"in_flight": "LATE"}):
        with pytest.raises(MaskError):
            engine.load_state_dict(state | wrong)
    del state["epoch"]
    with pytest.raises(MaskError, match="the state has no epoch"):
        engine.load_state_dict(state)
    assert engine.mask is before
    engine.disable()


def test_disable_leaves_every_module_as_it_was_and_enabling_again_works() -> None:
    model = build()
    before = instance_state(model)
    for _ in range(2):
        engine = gradckpt_dist.enable(model, AUTO)
        assert instance_state(model) != before
        backward(model, batch(0))
        engine.disable()
        assert not engine.enabled
        assert instance_state(model) == before
    plain = build()
    for each in (model, plain):
        each.zero_grad()
        torch.manual_seed(1)
        backward(each, batch(0))
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("turn", Turn)
def test_disable_with_a_decision_in_flight(turn: Turn) -> None:
    trainer = Trainer(build())
    before = instance_state(trainer.model)
    engine = gradckpt_dist.enable(trainer.model, AUTO)
    _advance_to(engine, trainer, turn)
    engine.disable()
    assert instance_state(trainer.model) == before
    trainer.step()
    assert trainer.recomputed == ["keep"] * 4


def test_enabling_twice_is_refused_and_the_first_engine_stays() -> None:
    trainer = Trainer(build())
    engine = gradckpt_dist.enable(trainer.model, AUTO | {"policy": "static", "every_n": 2})
    before = instance_state(trainer.model)
    with pytest.raises(ConflictError, match=r"block 'blocks\.0' is already switched; call disable\(\)"):
        gradckpt_dist.enable(trainer.model, AUTO)
    assert instance_state(trainer.model) == before
    trainer.step()
    assert trainer.recomputed == ["recompute", "keep", "recompute", "keep"]
    assert engine.stats()["step"] == 0
    engine.disable()


def test_disabled_by_the_configuration_nothing_is_touched() -> None:
    trainer = Trainer(build())
    before = instance_state(trainer.model)
    engine = gradckpt_dist.enable(trainer.model, {"enabled": False})
    assert instance_state(trainer.model) == before
    assert not engine.enabled
    assert engine.mask.storages == ()
    trainer.step()
    assert trainer.recomputed == ["keep"] * 4
    assert engine.stats()["step"] == -1
    engine.disable()


def test_forwards_outside_of_training_never_run_again() -> None:
    trainer = Trainer(build())
    engine = gradckpt_dist.enable(trainer.model, {"policy": "static", "every_n": 1})
    trainer.model.eval()
    trainer.model(batch(0)).sum().backward()
    trainer.model.train()
    with torch.no_grad():
        trainer.model(batch(0))
    # A block called on its own, outside of the root's forward.
    trainer.model.blocks[0](torch.randn(1, 2, 16)).sum().backward()
    assert engine.stats()["recomputes"] == [0] * 4
    engine.disable()


def test_a_loss_that_overflows_does_not_reach_the_impacts() -> None:
    trainer = Trainer(build())
    engine = gradckpt_dist.enable(trainer.model, AUTO)
    trainer.train(9)
    impacts = engine.stats()["impacts"]
    for _ in range(12):
        trainer.model.zero_grad()
        backward(trainer.model, batch(0), float("inf"))
        trainer.model.zero_grad()
        trainer.optimizer.step()
    stats = engine.stats()
    assert stats["dropped_samples"] >= 4
    assert len(stats["impacts"]) == 4
    assert all(0 < impact < 4 for impact in stats["impacts"])
    assert len(impacts) == 4
    engine.disable()


def test_a_float64_model_can_be_sampled() -> None:
    trainer = Trainer(build().double())
    engine = gradckpt_dist.enable(trainer.model, AUTO)
    trainer.train(10)
    assert engine.mask.epoch == 1
    engine.disable()


def test_an_engine_is_freed_with_its_model() -> None:
    trainer = Trainer(build())
    engine = gradckpt_dist.enable(trainer.model, AUTO)
    trainer.train(4)
    alive = [weakref.ref(engine), weakref.ref(trainer.model)]
    engine.disable()
    del engine, trainer
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
