"""The loop in one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from frameworks import WIDTH, Model, assert_bitwise, train
from torch import nn

import gradckpt_dist
from gradckpt_dist import BlocksNotFoundError, ConflictError, MaskError
from gradckpt_dist.sampling import Sampler

CONFIG = {"policy": "threshold", "interval": 4, "warmup_steps": 0, "memory_budget": 0.5}


def _model() -> Model:
    torch.manual_seed(5)
    return Model()


def _attributes(model: nn.Module) -> list[set[str]]:
    return [set(module.__dict__) for module in model.modules()]


def test_first_mask_is_full_recompute_and_then_it_moves() -> None:
    engine = gradckpt_dist.enable(_model(), CONFIG)
    assert engine.mask.storages == ("recompute",) * 6
    assert engine.mask.epoch == 0


def test_losses_are_bitwise_those_without_it_while_the_mask_moves() -> None:
    plain = train(_model(), steps=30)
    model = _model()
    engine = gradckpt_dist.enable(model, CONFIG)
    assert_bitwise(train(model, steps=30), plain)
    assert engine.mask.epoch >= 6
    engine.disable()


@pytest.mark.parametrize("rank", [1, 4])
def test_recomputed_blocks_are_exactly_those_above_theta(rank: int) -> None:
    theta = sorted(_impacts_after(16))[rank]
    model = _model()
    engine = gradckpt_dist.enable(model, CONFIG | {"threshold": {"value": theta}})
    train(model, steps=16)
    stats = engine.stats()
    above = [impact > theta for impact in stats["impacts"]]
    assert sum(above) == 5 - rank
    assert [storage == "recompute" for storage in engine.mask.storages] == above
    before = stats["recomputes"]
    train(model, steps=1)
    calls = [2 if block == 2 else 1 for block in range(6)]
    added = [new - old for new, old in zip(engine.stats()["recomputes"], before, strict=True)]
    assert added == [call * high for call, high in zip(calls, above, strict=True)]
    engine.disable()


def _impacts_after(steps: int) -> list[float]:
    model = _model()
    engine = gradckpt_dist.enable(model, CONFIG)
    train(model, steps=steps)
    engine.disable()
    impacts: list[float] = engine.stats()["impacts"]
    return impacts


def test_held_bytes_fall_as_the_mask_says() -> None:
    held = []
    for every_n in (0, 2, 1):
        model = _model()
        engine = gradckpt_dist.enable(model, CONFIG | {"policy": "static", "every_n": every_n})
        train(model, steps=8)
        stats = engine.stats()
        outside = stats["held_bytes"] - stats["predicted_held_bytes"]
        held.append((stats["held_bytes"], outside))
        engine.disable()
    assert held[0][0] > held[1][0] > held[2][0]
    # What is held outside of the blocks is the same whatever the mask.
    assert len({outside for _, outside in held}) == 1


def test_an_epoch_ends_only_with_an_optimizer_step() -> None:
    model = _model()
    engine = gradckpt_dist.enable(model, CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(40):
        model(torch.randn(2, WIDTH)).sum().backward()
    assert engine.stats()["step"] == 0
    optimizer.step()
    with torch.no_grad():
        model(torch.randn(2, WIDTH))
    model.eval()
    model(torch.randn(2, WIDTH)).sum().backward()
    assert engine.stats()["step"] == 0
    model.train()
    model(torch.randn(2, WIDTH)).sum().backward()
    assert engine.stats()["step"] == 1
    engine.disable()


def test_nothing_is_watched_on_steps_that_are_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[int] = []
    watch = Sampler.__call__

    def counted(self: Sampler, index: int, *args: Any) -> Any:
        watched.append(engine.stats()["step"])
        return watch(self, index, *args)

    monkeypatch.setattr(Sampler, "__call__", counted)
    model = _model()
    engine = gradckpt_dist.enable(model, CONFIG | {"interval": 20, "warmup_steps": 3})
    train(model, steps=40)
    assert sorted(set(watched)) == [3, 4, 5, 6, 11, 16, 21, 26, 31, 36]
    engine.disable()


def test_pinned_masks() -> None:
    model = _model()
    engine = gradckpt_dist.enable(model, CONFIG)
    train(model, steps=5)  # a decision is in flight now
    engine.set_mask(["keep"] * 6)
    epoch = engine.mask.epoch
    train(model, steps=20)
    assert (engine.mask.epoch, engine.mask.storages) == (epoch, ("keep",) * 6)
    for wrong, message in (
        (["keep"] * 5, "5 storages for 6 blocks"),
        (["kep"] * 6, "unknown storage 'kep'"),
        (["offload"] * 6, "not allowed by this configuration"),
    ):
        with pytest.raises(MaskError, match=message):
            engine.set_mask(wrong)
    engine.set_mask(None)
    train(model, steps=12)
    assert engine.mask.epoch > epoch
    engine.disable()


def test_disable_leaves_the_model_as_it_was_and_it_can_be_enabled_again() -> None:
    model = _model()
    before = _attributes(model)
    hooks = len(model._forward_pre_hooks), len(model._forward_hooks)
    engine = gradckpt_dist.enable(model, CONFIG)
    with pytest.raises(ConflictError, match="already switched"):
        gradckpt_dist.enable(model, CONFIG)
    train(model, steps=6)
    engine.disable()
    engine.disable()
    assert not engine.enabled
    assert _attributes(model) == before
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == hooks
    gradckpt_dist.enable(model, CONFIG).disable()


def test_disabled_by_configuration() -> None:
    model = _model()
    before = _attributes(model)
    engine = gradckpt_dist.enable(model, {"enabled": False})
    assert not engine.enabled
    assert _attributes(model) == before


def test_copies_do_not_call_the_original(tmp_path: Path) -> None:
    model = _model()
    engine = gradckpt_dist.enable(model, CONFIG)
    train(model, steps=3)
    average = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    recomputes = engine.stats()["recomputes"]
    for other in (average, loaded):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.fill_(float("nan"))
        train(other, steps=1)
    assert engine.stats()["recomputes"] == recomputes
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    engine.disable()


def test_state_goes_on_in_another_engine() -> None:
    model = _model()
    engine = gradckpt_dist.enable(model, CONFIG)
    train(model, steps=14)
    state = engine.state_dict()
    engine.disable()
    resumed = gradckpt_dist.enable(model, CONFIG)
    resumed.load_state_dict(state)
    assert (resumed.mask, resumed.stats()["step"]) == (engine.mask, engine.stats()["step"])
    assert resumed.stats()["impacts"] == engine.stats()["impacts"]
    train(model, steps=8)
    assert resumed.mask.epoch > engine.mask.epoch
    with pytest.raises(MaskError, match="load the state of the same model"):
        resumed.load_state_dict(state | {"blocks": ["other"]})
    resumed.disable()


def test_blocks_given_by_name() -> None:
    engine = gradckpt_dist.enable(_model(), CONFIG, blocks=["blocks.[0-2]"])
    assert engine.mask.blocks == ("blocks.0", "blocks.1", "blocks.2")
    engine.disable()
    with pytest.raises(BlocksNotFoundError, match=r"'layers\.\*' matches no module"):
        gradckpt_dist.enable(_model(), CONFIG | {"blocks": ["layers.*"]})
    with pytest.raises(BlocksNotFoundError, match="names no block"):
        gradckpt_dist.enable(_model(), CONFIG, blocks=[])
