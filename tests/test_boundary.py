"""Where a step begins, whatever the training loop does in between; and models that are copied meanwhile."""

from __future__ import annotations

import copy
import gc
import io
import logging
import weakref
import zipfile
from types import SimpleNamespace

import pytest
import torch
from models import batch, build, instance_state
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import gradckpt_dist
from gradckpt_dist import ConfigError
from gradckpt_dist.boundary import StepBoundary


class Events:
    """A listener that writes down what it is told."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.steps_ended = 0

    def begin_step(self) -> None:
        self.seen.append("step")

    def end_step(self) -> None:
        self.steps_ended += 1

    def begin_forward(self) -> None:
        self.seen.append("forward")

    def end_forward(self) -> None:
        self.seen.append("end")

    def pause(self) -> None:
        self.seen.append("pause")

    def take(self) -> list[str]:
        seen, self.seen = self.seen, []
        return seen


FIRST, NEXT, PAUSED = ["step", "forward", "end"], ["forward", "end"], ["pause", "end"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1), nn.Linear(3, 1))


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def _micro_batch(model: nn.Module) -> None:
    model(torch.ones(2, 3)).sum().backward()


def test_micro_batches_are_one_step(model: nn.Module) -> None:
    events, optimizer = Events(), _optimizer(model)
    boundary = StepBoundary(model, None, events)
    for _ in range(2):
        for _ in range(3):
            _micro_batch(model)
        optimizer.step()
        assert events.take() == [*FIRST, *NEXT, *NEXT]
    boundary.remove()


def test_forwards_in_evaluation_or_without_gradients_begin_nothing(model: nn.Module) -> None:
    events, optimizer = Events(), _optimizer(model)
    boundary = StepBoundary(model, None, events)
    _micro_batch(model)
    assert events.take() == FIRST
    model.eval()
    model(torch.ones(2, 3))
    model.train()
    with torch.no_grad():
        model(torch.ones(2, 3))
    with torch.inference_mode():
        model(torch.ones(2, 3))
    assert events.take() == [*PAUSED, *PAUSED, *PAUSED]
    _micro_batch(model)
    assert events.take() == NEXT
    optimizer.step()
    model.eval()
    model(torch.ones(2, 3))
    model.train()
    _micro_batch(model)
    assert events.take() == [*PAUSED, *FIRST]
    boundary.remove()


def test_several_optimizers_and_groups_count_once(model: nn.Module) -> None:
    events = Events()
    halves = [
        torch.optim.SGD([{"params": [weight]} for weight in model[i].parameters()], lr=0.1)  # type: ignore[index]
        for i in (0, 2)
    ]
    boundary = StepBoundary(model, None, events)
    for _ in range(3):
        _micro_batch(model)
        for half in halves:
            half.step()
        assert events.take() == FIRST
    assert events.steps_ended == 3
    boundary.remove()


def test_only_a_given_optimizer_counts(model: nn.Module) -> None:
    events = Events()
    ours, other = _optimizer(model), torch.optim.Adam(model.parameters())
    boundary = StepBoundary(model, ours, events)
    _micro_batch(model)
    other.step()
    _micro_batch(model)
    assert events.take() == [*FIRST, *NEXT]
    ours.step()
    _micro_batch(model)
    assert events.take() == FIRST
    boundary.remove()


def test_what_is_no_optimizer_is_an_error_and_changes_nothing() -> None:
    model = build()
    before = instance_state(model)
    for wrong in (model, SimpleNamespace(optimizer=None)):
        with pytest.raises(ConfigError, match=r"optimizer: a \w+ is not allowed; give a torch.optim.Optimizer"):
            gradckpt_dist.enable(model, optimizer=wrong)
    assert instance_state(model) == before


@pytest.mark.parametrize(
    "synchronised", [[True] * 4, [False, True] * 2, [False] * 4], ids=["in each forward", "in the last one", "never"]
)
def test_forwards_of_other_ranks_are_counted_into_steps_of_the_usual_length(
    model: nn.Module, synchronised: list[bool]
) -> None:
    boundary = StepBoundary(model, None, events := Events())
    optimizer = _optimizer(model)
    for _ in range(2):
        _micro_batch(model)
        _micro_batch(model)
        optimizer.step()
    _micro_batch(model)
    events.take()
    # The step under way has one forward so far.
    begun = []
    for flag in (True, *synchronised):
        boundary.miss_forward(synchronised=flag)
        begun.append(events.take())
    assert begun == [[], ["step"], [], ["step"] if any(synchronised) else [], []]
    _micro_batch(model)
    assert events.take() == (FIRST if any(synchronised) else NEXT)
    boundary.remove()


def test_an_exception_in_forward_ends_it(model: nn.Module) -> None:
    events = Events()
    boundary = StepBoundary(model, None, events)
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 4))
    assert events.take() == FIRST
    _micro_batch(model)
    assert events.take() == NEXT
    boundary.remove()


def test_remove_leaves_nothing(model: nn.Module) -> None:
    before, hooks = instance_state(model), len(_global_optimizer_post_hooks)
    optimizer = _optimizer(model)
    for given in (None, optimizer):
        events = Events()
        boundary = StepBoundary(model, given, events)
        boundary.remove()
        boundary.remove()
        _micro_batch(model)
        optimizer.step()
        assert events.seen == []
    assert instance_state(model) == before
    assert len(_global_optimizer_post_hooks) == hooks
    assert not optimizer._optimizer_step_post_hooks


def test_warns_once_after_256_forwards_without_a_step(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    boundary = StepBoundary(model, None, Events())
    with caplog.at_level(logging.WARNING, logger="gradckpt_dist"):
        for _ in range(255):
            model(torch.ones(1, 3))
        assert caplog.records == []
        for _ in range(300):
            model(torch.ones(1, 3))
    (record,) = caplog.records
    assert "256 training forwards without an optimizer step seen" in record.getMessage()
    assert "enable(..., optimizer=...)" in record.getMessage()
    boundary.remove()


def test_copies_and_files_carry_nothing_of_ours() -> None:
    model = build(2)
    plain = model(batch(0)).shape
    engine = gradckpt_dist.enable(model, {"policy": "static", "every_n": 1})
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert b"gradckpt" not in b"".join(zipfile.ZipFile(file).read(name) for name in zipfile.ZipFile(file).namelist())
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for copied in (twin, loaded):
        assert copied(batch(0)).shape == plain
        copied(batch(0)).sum().backward()
        assert all(parameter.grad is not None for parameter in copied.parameters())
    stats = engine.stats()
    assert (stats["step"], stats["recomputes"]) == (-1, [0, 0])
    model(batch(0)).sum().backward()
    assert engine.stats()["recomputes"] == [1, 1]
    engine.disable()
    second = gradckpt_dist.enable(twin, {"policy": "static", "every_n": 2})
    twin(batch(0)).sum().backward()
    assert second.stats()["recomputes"] == [1, 0]
    second.disable()


def test_a_model_that_is_dropped_without_disable_is_freed() -> None:
    model = build(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = gradckpt_dist.enable(model)
    model(batch(0)).sum().backward()
    optimizer.step()
    alive = weakref.ref(model)
    del model, engine
    gc.collect()
    assert alive() is None
    optimizer.step()
