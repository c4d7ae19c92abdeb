"""Whose turn it is, and what a prober does with it."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from typing import Any

import pytest
import torch
from models import backward, batch, build
from probing_support import Coarse, Probed, coarse_storage
from torch import Tensor, nn

from gradckpt_dist.errors import StorageError
from gradckpt_dist.probing import EARLY_SAMPLES, EARLY_SWEEPS, SHARE, ProbeSchedule
from gradckpt_dist.storage import STORAGES

NAMES = ("keep", "recompute", "compress4")


def _schedule(kinds: tuple[int, ...], interval: int = 50, storages: tuple[str, ...] = NAMES) -> ProbeSchedule:
    return ProbeSchedule(
        kinds=kinds,
        storages=storages,
        lossy=frozenset(name for name in storages if name.startswith("compress")),
        interval=interval,
        samples=4,
    )


def test_each_kind_comes_first_twice_under_all_storages() -> None:
    turns = [turn for number in range(6) for turn in _schedule((0, 1, 0, 2)).turns(number)]
    assert [turn.block for turn in turns] == [0, 1, 3, 0, 1, 3]
    assert all(turn.storages == NAMES for turn in turns)


@pytest.mark.parametrize(("blocks", "interval"), [(1, 4), (8, 50), (64, 50), (1000, 50), (1000, 2)])
def test_then_probes_take_their_share_of_all_steps_and_come_to_every_block(blocks: int, interval: int) -> None:
    schedule, samples = _schedule((0,) * blocks, interval), 20_000 if blocks < 100 else 2_000
    turns = [turn for number in range(2, samples + 2) for turn in schedule.turns(number)]
    runs = sum(1 + len(turn.storages) for turn in turns)
    steps = samples * interval / 4
    early = 2 * blocks * EARLY_SWEEPS * samples / (samples + EARLY_SAMPLES)
    assert runs == pytest.approx(SHARE * steps * blocks + early, rel=0.05)
    visited = Counter(turn.block for turn in turns)
    assert len(visited) == blocks
    assert max(visited.values()) - min(visited.values()) <= 1


def test_half_of_the_early_sweeps_come_in_the_first_samples() -> None:
    schedule = _schedule((0,) * 100, 1)
    turns = [turn for number in range(2, EARLY_SAMPLES + 2) for turn in schedule.turns(number)]
    assert len(turns) == pytest.approx(100 * EARLY_SWEEPS / 2, rel=0.05)


def test_each_block_meets_each_storage() -> None:
    storages = ("keep", "recompute", "compress8", "compress4")
    schedule = _schedule((0,) * 6, 50, storages)
    turns = [turn for number in range(2, 4_000) for turn in schedule.turns(number)]
    assert {(turn.block, *turn.storages) for turn in turns} == {(i, name) for i in range(6) for name in storages[1:]}


def test_lossy_storages_come_more_often_than_exact_ones() -> None:
    storages = ("keep", "recompute", "offload", "compress8", "compress4")
    schedule = _schedule((0,), 50, storages)
    seen = Counter(name for number in range(2, 40_000) for turn in schedule.turns(number) for name in turn.storages)
    assert set(seen) == set(storages) - {"keep"}
    assert seen["compress8"] == pytest.approx(2 * seen["offload"], rel=0.1)


def test_only_the_first_call_of_a_step_is_probed() -> None:
    probed = Probed(build(), NAMES[:2])
    probed.begin(1)
    for step in range(3):
        backward(probed.model, batch(step))
    probed.end()
    assert probed.prober.probes == 1
    probed.agree()
    assert probed.costs.call_tokens == (32.0,) * 4
    assert probed.costs.step_tokens == (96.0,) * 4
    probed.undo()


def test_a_forward_without_backward_leaves_nothing_behind() -> None:
    probed = Probed(build(), NAMES[:2])
    probed.begin(1)
    probed.model(batch(0))
    probed.end()
    backward(probed.model, batch(0))
    assert probed.prober.probes == 0
    assert not probed.prober._traps
    probed.undo()


class _Refusing(Coarse):
    def run(self, forward: Any, /, *args: Any, **kwargs: Any) -> Any:
        raise StorageError("'compress4' is refused for this block")


class _Starving(Coarse):
    def run(self, forward: Any, /, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no more")


def test_a_storage_that_refuses_a_block_is_infinitely_dear(caplog: pytest.LogCaptureFixture) -> None:
    with coarse_storage():
        STORAGES["compress4"] = _Refusing
        probed = Probed(build(), NAMES, ["compress4"])
        with caplog.at_level(logging.WARNING):
            for block in (0, 1):
                probed.begin(block)
                backward(probed.model, batch(0))
                probed.end()
    probed.agree()
    assert probed.costs.of(0, "compress4").refused
    assert probed.costs.extra_seconds(3, "compress4") == float("inf")
    assert probed.costs.extra_seconds(3, "recompute") < float("inf")
    assert [record.message for record in caplog.records] == ["gradckpt: 'compress4' is refused for this block"]
    probed.undo()


def test_where_memory_does_not_suffice_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    plain, model = build(), build()
    with coarse_storage():
        STORAGES["compress4"] = _Starving
        probed = Probed(model, NAMES, ["compress4"])
        with caplog.at_level(logging.WARNING):
            for step in range(3):
                probed.begin(step)
                torch.manual_seed(step)
                backward(model, batch(step))
                probed.end()
                torch.manual_seed(step)
                backward(plain, batch(step))
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    (record,) = caplog.records
    assert "not enough memory" in record.message
    assert not probed.prober.reruns(1)
    probed.undo()


class _Stateful(nn.Module):
    """Takes a cache, or changes what it was given afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.ModuleList(_Cached() for _ in range(2))
        self.blocks = nn.ModuleList([self.first, self.second])

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        y = x * 1
        z = self.first(y, cache)
        y.add_(1)
        return self.second(z, None)


class _Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        return self.linear(x * 2)


class _Cache:
    pass


@pytest.mark.parametrize(("cache", "reason"), [(_Cache(), "an object that a second run"), (None, "changed in place")])
def test_what_cannot_be_run_again_is_left_alone(cache: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model = _Stateful()
    probed = Probed(model, NAMES[:2], blocks=["blocks.*"])
    with caplog.at_level(logging.WARNING):
        probed.begin(0)
        model(torch.randn(2, 4), cache).sum().backward()
        probed.end()
    assert probed.prober.probes == 0
    assert reason in caplog.text
    probed.undo()


def test_no_tensor_is_left_alive() -> None:
    probed = Probed(build(), NAMES[:2])

    def tensors_after(step: int, block: int | None) -> int:
        if block is not None:
            probed.begin(block)
        backward(probed.model, batch(step))
        if block is not None:
            probed.end()
        probed.model.zero_grad()
        gc.collect()
        return sum(issubclass(type(value), Tensor) for value in gc.get_objects())

    tensors_after(0, 1)
    assert tensors_after(1, 2) == tensors_after(2, None) == tensors_after(3, 2)
    probed.undo()
