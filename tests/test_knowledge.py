"""What is folded in at a decision, and what of it another run goes on with."""

from __future__ import annotations

import json
import math

import pytest

from gradckpt_dist import Mask
from gradckpt_dist.cost import CostTable
from gradckpt_dist.cost.budget import Budget
from gradckpt_dist.knowledge import Knowledge, Scope

BLOCKS = ("a", "b")
SUMS = [1.0, 3.0, 2.0, 1.0]
EXACT = ("keep", "recompute", "selective")
HALF = Budget(memory_budget=0.5, reserve=0.05, gradient_tolerance=0.0)
MEASURED = [100.0, 200.0, 10.0, 20.0, 100.0, 20.0, 150.0, 350.0, 1000.0, 0.0, 1.0]
"""By block: keep, recompute, stored; then held, peak, the process's in blocks and in the loss, forwards in flight."""


def _mask(*storages: str) -> Mask:
    return Mask(blocks=BLOCKS, storages=storages)


def _knowledge(budget: Budget = HALF, *, probed: bool = False) -> Knowledge:
    return Knowledge(Scope(kinds=(0, 0), storages=EXACT, lossy=(), metric="norm", probed=probed), budget)


def _maxima(measured: list[float], plugin_seconds: float = 0.25, available: float = 5000.0) -> list[float]:
    return [*measured, -available, plugin_seconds]


def test_a_measurement_travels_and_is_folded_in() -> None:
    knowledge, mask = _knowledge(), _mask("keep", "recompute")
    knowledge.update(SUMS, _maxima(MEASURED), mask)
    assert knowledge.stored_bytes == {"keep": (100, 200), "recompute": (10, 20)}
    assert (knowledge.held_bytes, knowledge.peak_bytes, knowledge.plugin_seconds) == (150, 350, 0.25)
    assert (knowledge.process_peak_bytes, knowledge.available_bytes) == (1000, 5000)
    evidence = knowledge.evidence(mask)
    assert evidence.current is mask
    assert evidence.impacts == (math.sqrt(0.5), math.sqrt(1.5))
    assert evidence.bytes_of(mask.storages) == 120
    assert (evidence.costs, evidence.headroom_bytes, evidence.peak_limit_bytes) == (None, None, None)


def test_a_window_without_measurement_leaves_the_bytes() -> None:
    knowledge, mask = _knowledge(), _mask("recompute", "recompute")
    nothing = _maxima([0.0] * 11, 0.5)
    knowledge.update(SUMS, nothing, mask)
    assert knowledge.evidence(mask).bytes_of(mask.storages) is None
    knowledge.update(SUMS, _maxima(MEASURED), mask)
    knowledge.update(SUMS, nothing, mask)
    assert knowledge.stored_bytes == {"keep": (100, 200), "recompute": (10, 20)}
    assert (knowledge.held_bytes, knowledge.plugin_seconds) == (150, 0.5)


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 8, 9, 10, 11])
def test_bytes_that_a_faulty_rank_made_non_finite_teach_nothing(fault: float, position: int) -> None:
    knowledge, mask = _knowledge(), _mask("keep", "recompute")
    knowledge.update(SUMS, _maxima(MEASURED), mask)
    before = knowledge.evidence(mask)
    faulty = _maxima(MEASURED)
    faulty[position] = fault
    knowledge.update(SUMS, faulty, mask)
    assert knowledge.evidence(mask) == before


def test_other_storages_are_known_where_they_were_used() -> None:
    knowledge, mask = _knowledge(), _mask("offload", "recompute")
    knowledge.update(SUMS, _maxima([100.0, 200.0, 10.0, 20.0, 30.0, 20.0, 50.0, 250.0, 1000.0, 0.0, 1.0]), mask)
    assert knowledge.stored_bytes["offload"] == (30, 200)
    assert knowledge.evidence(mask).bytes_of(("offload", "offload")) == 230


@pytest.mark.parametrize(("memory_budget", "limit"), [("auto", 5000), ("1KiB", 1024)])
def test_a_budget_in_bytes_leaves_to_blocks_what_the_process_does_not_use(memory_budget: str, limit: int) -> None:
    budget = Budget(memory_budget=memory_budget, reserve=0.1, gradient_tolerance=0.0)
    knowledge, mask = _knowledge(budget), _mask("keep", "recompute")
    assert knowledge.evidence(mask).peak_limit_bytes is None
    knowledge.update(SUMS, _maxima(MEASURED), mask)
    evidence = knowledge.evidence(mask)
    assert evidence.headroom_bytes == limit - 1000
    assert evidence.peak_limit_bytes == limit - int(0.1 * limit) - (1000 - 350)


def _costs(seconds: float, *, known: bool = True) -> list[float]:
    """Tokens by block (step, forward, call), then per token of each storage: seconds, extra, held, working, refused."""
    unknown = [-1e300] * 4 + [0.0]
    keep = [1.0, 0.0, 10.0, 1.0, 0.0]
    recompute = [1.0 + seconds, seconds, 1.0, 9.0, 0.0]
    return [10.0] * 6 + (keep + recompute if known else unknown + unknown) + [-1e300] * 4 + [1.0]


def test_costs_make_a_table_with_the_process_beside_the_blocks_as_its_fixed_part() -> None:
    knowledge, mask = _knowledge(probed=True), _mask("keep", "recompute")
    knowledge.update([*SUMS, *[0.0] * 7], [*_maxima(MEASURED), *_costs(0.5)], mask)
    evidence = knowledge.evidence(mask)
    costs = evidence.costs
    assert costs is not None
    assert costs.storages == EXACT
    assert costs.extra_seconds.tolist() == [[0.0, 5.0, math.inf]] * 2
    assert costs.held_bytes.tolist() == [[100, 10, 0]] * 2
    # 100 + 10 held and 90 on top, in the backward of the second block.
    assert costs.working_set_bytes.tolist() == [[10, 90, 0]] * 2
    assert costs.peak_bytes_of(costs.choice(mask.storages)) == 1000
    assert costs.fixed_bytes == 800
    assert evidence.limits is not None
    least, most = 800 + 20 + 90, 800 + 200 + 10
    assert evidence.limits.peak_bytes == least + (most - least) // 2


def _known_costs(measured: list[float], knowledge: Knowledge, mask: Mask) -> CostTable:
    knowledge.update([*SUMS, *[0.0] * 7], [*_maxima(measured), *_costs(0.5)], mask)
    costs = knowledge.evidence(mask).costs
    assert costs is not None
    return costs


def test_the_loss_is_known_once_it_had_the_peak_of_the_step() -> None:
    knowledge, kept, recomputed = _knowledge(probed=True), _mask("keep", "keep"), _mask("recompute", "recompute")
    # Blocks: 200 held, 10 on top. The loss: 200 held, 60 on top.
    costs = _known_costs([*MEASURED[:8], 1010.0, 1060.0, 1.0], knowledge, kept)
    assert knowledge.process_peak_bytes == costs.peak_bytes_of(costs.choice(kept.storages)) == 1060
    assert (costs.fixed_bytes, costs.working_set_bytes.tolist()) == (800, [[10, 90, 0], [60, 90, 60]])
    # Where recomputed blocks have the peak, it is not seen and stays.
    costs = _known_costs([*MEASURED[:8], 910.0, 0.0, 1.0], knowledge, recomputed)
    assert costs.peak_bytes_of(costs.choice(kept.storages)) == 1060
    restored = _knowledge(probed=True)
    restored.load_state_dict(json.loads(json.dumps(knowledge.state_dict())))
    assert restored.evidence(kept).process_peak_of(kept.storages) == 1060
    # Where kept ones have, it cannot be larger than what they need.
    costs = _known_costs([*MEASURED[:8], 1010.0, 0.0, 1.0], knowledge, kept)
    assert costs.peak_bytes_of(costs.choice(kept.storages)) == 1010


def test_a_block_that_was_never_probed_has_the_bytes_that_the_ledger_counted() -> None:
    knowledge, mask = _knowledge(probed=True), _mask("keep", "recompute")
    knowledge.update([*SUMS, *[0.0] * 7], [*_maxima(MEASURED), *_costs(0.5, known=False)], mask)
    costs = knowledge.evidence(mask).costs
    assert costs is not None
    assert costs.held_bytes.tolist() == [[100, 10, 0], [200, 20, 0]]
    assert costs.extra_seconds[0, 1] < costs.extra_seconds[1, 1] < math.inf
    assert costs.extra_seconds[:, 2].tolist() == [math.inf] * 2


@pytest.mark.parametrize("probed", [False, True])
def test_state_is_plain_and_restores_what_policies_read(probed: bool) -> None:
    knowledge, mask = _knowledge(probed=probed), _mask("keep", "recompute")
    sums, maxima = ([*SUMS, *[0.0] * 7], [*_maxima(MEASURED), *_costs(0.5)]) if probed else (SUMS, _maxima(MEASURED))
    knowledge.update(sums, maxima, mask)
    restored = _knowledge(probed=probed)
    restored.load_state_dict(json.loads(json.dumps(knowledge.state_dict())))
    assert restored.state_dict() == knowledge.state_dict()
    assert restored.evidence(mask).impacts == knowledge.evidence(mask).impacts
    for each in (knowledge, restored):
        each.update(sums, maxima, mask)
    assert restored.running == knowledge.running
