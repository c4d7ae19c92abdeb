"""What sums and maxima over ranks do to the mask, whatever the ranks send."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore

from gradckpt_dist import AgreementError, Mask
from gradckpt_dist.agreement.collectives import GroupAgreement
from gradckpt_dist.agreement.roll_call import RollCall
from gradckpt_dist.agreement.wire import Decision, encode, message_bytes
from gradckpt_dist.config import Config
from gradckpt_dist.cost.budget import Budget
from gradckpt_dist.knowledge import Knowledge, Scope
from gradckpt_dist.mask import STORAGE_NAMES
from gradckpt_dist.policy import Policy, create_policy

BLOCKS = tuple(f"layers.{index}" for index in range(4))
POLICIES: dict[str, dict[str, Any]] = {
    "threshold": {"policy": "threshold", "memory_budget": 0.5},
    "quantile": {"policy": "threshold", "threshold": {"quantile": 0.4}},
    "budget": {"policy": "budget", "memory_budget": 0.4, "gradient_tolerance": 0.1},
}
WRONG = st.sampled_from((math.nan, math.inf, -math.inf, 1e308, -1e308, 1e18, -1.0, 0.0))
SCOPE = Scope(
    kinds=(0, 0, 1, 1), storages=Config(gradient_tolerance=0.1).storages, lossy=(), metric="norm", probed=True
)


@cache
def _policy(name: str) -> Policy:
    return create_policy(Config(**POLICIES[name]))


def _sums(squares: Sequence[float], samples: int) -> list[float]:
    """A rank's window of ``NormImpact``, without probes."""
    return [*(square * samples for square in squares), float(samples), 0.0, *[0.0] * (3 * len(BLOCKS) + 1)]


def _maxima(scale: float) -> list[float]:
    """Bytes that one rank measured, and costs by kind and storage."""
    keep, recompute = [100.0 * scale] * 4, [10.0 * scale] * 4
    costs = [
        value
        for _ in range(2)
        for number, _ in enumerate(SCOPE.storages)
        for value in (1.0 + number, 0.1 * number, 10.0 / (1 + number), 1.0, 0.0)
    ]
    totals = [40.0 * scale, 140.0 * scale, 1000.0, 1050.0, 1.0]
    return [*keep, *recompute, *recompute, *totals, -5000.0, 0.1, *[8.0] * 12, *costs]


def _added(ranks: Sequence[tuple[list[float], list[float]]]) -> tuple[list[float], list[float]]:
    """As the all-reduces do it; MAX keeps the first of two that do not compare."""
    sums = torch.zeros(len(ranks[0][0]), dtype=torch.float64)
    most = torch.full((len(ranks[0][1]),), -math.inf, dtype=torch.float64)
    for theirs, maxima in ranks:
        sums += torch.tensor(theirs, dtype=torch.float64)
        most = torch.maximum(most, torch.tensor(maxima, dtype=torch.float64))
    return sums.tolist(), most.tolist()


def _mask(policy: str, *windows: tuple[list[float], list[float]]) -> Mask:
    """The mask after these windows, each already added up over ranks."""
    config = Config(**POLICIES[policy])
    scope = SCOPE if policy == "budget" else Scope(**{**vars(SCOPE), "probed": False})
    knowledge = Knowledge(scope, Budget.of(config))
    mask = Mask(blocks=BLOCKS, storages=("recompute",) * 4)
    for sums, maxima in windows:
        knowledge.update(sums if scope.probed else sums[:6], maxima, mask)
        plan = _policy(policy).plan(knowledge.evidence(mask))
        mask = mask.replaced(plan.storages)
        assert plan.theta is None or math.isfinite(plan.theta)
        assert all(math.isfinite(impact) for impact in knowledge.running.impacts())
    return mask


# Powers of two: their sums are exact in any order, as ties are not to be told apart from rounding.
IMPACTS = st.lists(st.integers(-8, 8).map(lambda power: 2.0**power), min_size=4, max_size=4)


@pytest.mark.parametrize("policy", POLICIES)
@given(st.lists(st.tuples(IMPACTS, st.integers(0, 4)), min_size=2, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_the_order_of_ranks_does_not_change_the_mask(
    policy: str, ranks: list[tuple[list[float], int]], random: Any
) -> None:
    sent = [(_sums(*rank), _maxima(1.0 + number)) for number, rank in enumerate(ranks)]
    shuffled = random.sample(sent, len(sent))
    assert _mask(policy, _added(sent)).storages == _mask(policy, _added(shuffled)).storages


@pytest.mark.parametrize("policy", POLICIES)
@given(IMPACTS, st.sampled_from((1, 2, 4, 16, 1024)))
@settings(max_examples=40)
def test_the_number_of_ranks_does_not_change_the_mask(policy: str, squares: list[float], ranks: int) -> None:
    one = (_sums(squares, 4), _maxima(1.0))
    assert _mask(policy, _added([one] * ranks)).storages == _mask(policy, one).storages


@pytest.mark.parametrize("policy", POLICIES)
@given(st.data())
@settings(max_examples=120)
def test_one_faulty_rank_makes_no_mask_that_is_none(policy: str, data: st.DataObject) -> None:
    good = (_sums([1.0, 2.0, 0.5, 0.25], 4), _maxima(1.0))
    windows = []
    for _ in range(2):
        faulty = [list(vector) for vector in good]
        for vector in faulty:
            for position in data.draw(st.lists(st.integers(0, len(vector) - 1), max_size=6)):
                vector[position] = data.draw(WRONG)
        windows.append(_added([good, (faulty[0], faulty[1])]))
    mask = _mask(policy, *windows, _added([good, good]))
    assert set(mask.storages) <= set(STORAGE_NAMES)
    assert len(mask) == 4


@given(st.data())
def test_a_flipped_byte_is_found_by_each_rank_that_receives_it(data: st.DataObject) -> None:
    storages = data.draw(st.lists(st.sampled_from(STORAGE_NAMES), min_size=4, max_size=4))
    mask = Mask(blocks=BLOCKS, storages=tuple(storages), epoch=data.draw(st.integers(1, 10**6)))
    message = encode(Decision(mask=mask, step=7, theta=0.5))
    message[data.draw(st.integers(0, message_bytes(4) - 1))] ^= data.draw(st.integers(1, 255))
    store = HashStore()
    for rank in range(3):
        agreement = GroupAgreement.__new__(GroupAgreement)
        agreement.rank, agreement.global_rank, agreement._step = rank, rank, 7
        agreement._roll_call = RollCall(store, rank, [0, 1, 2], 1.0)
        agreement._stream, agreement._message, agreement._message_work = None, message, _Done()
        with pytest.raises(AgreementError, match="does not match its digest") as caught:
            agreement.receive(BLOCKS, mask.epoch - 1)
        assert (caught.value.rank, caught.value.step) == (rank, 7)


class _Done:
    def wait(self) -> None: ...
