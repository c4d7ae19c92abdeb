"""``threshold``: C_i = 1 if I_i > theta, theta given or moved."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gradckpt_dist import Mask, ThresholdConfig
from gradckpt_dist.policy import Evidence, Plan, ThresholdPolicy

IMPACTS = st.lists(st.floats(0, 1e6), min_size=1, max_size=40)
SHARES = st.floats(0, 1)
SIZES = st.integers(0, 2**40)


def _plan(
    impacts: list[float],
    *,
    config: ThresholdConfig | None = None,
    budget: float = 0.5,
    hysteresis: float = 0.0,
    current: list[str] | None = None,
    stored_bytes: dict[str, tuple[int, ...]] | None = None,
) -> Plan:
    count = len(impacts)
    mask = Mask(blocks=tuple(f"b{i}" for i in range(count)), storages=tuple(current or ["recompute"] * count))
    evenly = {"keep": (100,) * count, "recompute": (10,) * count}
    evidence = Evidence(
        current=mask, impacts=tuple(impacts), stored_bytes=evenly if stored_bytes is None else stored_bytes
    )
    return ThresholdPolicy(config or ThresholdConfig(), budget, hysteresis).plan(evidence)


def _recomputed(plan: Plan) -> list[bool]:
    return [storage == "recompute" for storage in plan.storages]


@given(IMPACTS, st.data())
def test_value_recomputes_exactly_the_blocks_above_it(impacts: list[float], data: st.DataObject) -> None:
    value = data.draw(st.one_of(st.floats(-1e6, 1e6), st.sampled_from(impacts)))
    for low in ("keep", "offload"):
        plan = _plan(impacts, config=ThresholdConfig(value=value, low_impact_storage=low))
        assert plan.storages == tuple("recompute" if impact > value else low for impact in impacts)
        assert plan.theta == value


@given(IMPACTS, SHARES)
def test_quantile_is_that_of_the_impacts(impacts: list[float], share: float) -> None:
    plan = _plan(impacts, config=ThresholdConfig(quantile=share))
    assert plan.theta is not None
    assert plan.theta == pytest.approx(float(np.quantile(impacts, share)), rel=1e-9, abs=1e-9)
    assert _recomputed(plan) == [impact > plan.theta for impact in impacts]


def test_ends_of_the_quantile() -> None:
    assert _recomputed(_plan([3.0, 1.0, 2.0], config=ThresholdConfig(quantile=1.0))) == [False] * 3
    assert _recomputed(_plan([3.0, 1.0, 2.0], config=ThresholdConfig(quantile=0.0))) == [True, False, True]


def _order(impacts: list[float], current: list[str], hysteresis: float) -> list[int]:
    """Positions by impact, those recomputed now ahead by the hysteresis, ties by position."""
    ranked = [
        impact * (1 + hysteresis) if storage == "recompute" else impact
        for impact, storage in zip(impacts, current, strict=True)
    ]
    return sorted(range(len(impacts)), key=lambda i: (-ranked[i], i))


BLOCKS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0, 1.02, 2.0]) | st.floats(0, 10), SIZES, SIZES, st.booleans()),
    min_size=1,
    max_size=24,
)


@given(BLOCKS, SHARES, st.sampled_from([0.0, 0.05, 1.0]))
@example([(1.0, 100, 10, True)] * 4, 0.5, 0.0)
def test_auto_keeps_the_limit_with_as_few_recomputed_as_the_order_allows(
    blocks: list[tuple[float, int, int, bool]], budget: float, hysteresis: float
) -> None:
    impacts = [block[0] for block in blocks]
    keep, recompute = tuple(block[1] for block in blocks), tuple(min(block[1:3]) for block in blocks)
    current = ["recompute" if block[3] else "keep" for block in blocks]
    plan = _plan(
        impacts,
        budget=budget,
        hysteresis=hysteresis,
        current=current,
        stored_bytes={"keep": keep, "recompute": recompute},
    )

    def held(recomputed: set[int]) -> int:
        return sum(recompute[i] if i in recomputed else keep[i] for i in range(len(blocks)))

    chosen = {i for i, high in enumerate(_recomputed(plan)) if high}
    order = _order(impacts, current, hysteresis)
    assert chosen == set(order[: len(chosen)])
    limit = sum(recompute) + budget * (sum(keep) - sum(recompute))
    assert held(chosen) <= limit or len(chosen) == len(blocks)
    if chosen:
        assert held(set(order[: len(chosen) - 1])) > limit
    assert plan.theta is not None
    assert math.isfinite(plan.theta)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=24, unique=True), SHARES)
def test_auto_theta_separates_the_recomputed(impacts: list[float], budget: float) -> None:
    plan = _plan(impacts, budget=budget)
    assert plan.theta is not None
    chosen = [impact for impact, high in zip(impacts, _recomputed(plan), strict=True) if high]
    others = [impact for impact, high in zip(impacts, _recomputed(plan), strict=True) if not high]
    assert max(others, default=-math.inf) <= plan.theta <= min(chosen, default=math.inf)


def test_auto_at_the_ends_of_the_budget() -> None:
    impacts = [1.0, 3.0, 2.0, 4.0]
    assert _recomputed(_plan(impacts, budget=0.0)) == [True] * 4
    assert _recomputed(_plan(impacts, budget=1.0)) == [False] * 4
    assert _recomputed(_plan(impacts, budget=0.5)) == [False, True, False, True]
    assert _recomputed(_plan(impacts, budget=0.49)) == [False, True, True, True]


def test_auto_breaks_ties_by_position() -> None:
    plan = _plan([1.0] * 6, budget=0.5)
    assert _recomputed(plan) == [True, True, True, False, False, False]
    assert plan.theta == 1.0


@given(
    st.lists(st.floats(0.5, 2), min_size=2, max_size=24),
    SHARES,
    st.data(),
)
def test_hysteresis_holds_the_mask_under_noise_below_it(
    impacts: list[float], budget: float, data: st.DataObject
) -> None:
    """Blocks of equal size: with unequal ones another order among the recomputed may need fewer of them."""
    hysteresis, noise = 0.05, 0.02
    first = _plan(impacts, budget=budget, hysteresis=hysteresis)
    for _ in range(3):
        factors = data.draw(st.lists(st.floats(1 - noise, 1 + noise), min_size=len(impacts), max_size=len(impacts)))
        disturbed = [impact * factor for impact, factor in zip(impacts, factors, strict=True)]
        again = _plan(disturbed, budget=budget, hysteresis=hysteresis, current=list(first.storages))
        assert again.storages == first.storages


def test_hysteresis_yields_to_a_clear_change() -> None:
    current = ["recompute", "keep"]
    for impacts, high in (([1.0, 1.04], [True, False]), ([1.0, 1.06], [False, True])):
        plan = _plan(impacts, hysteresis=0.05, current=current)
        assert _recomputed(plan) == high


@given(IMPACTS, SHARES)
def test_unchanged_without_samples_or_bytes(impacts: list[float], budget: float) -> None:
    assume(len(impacts) > 1)
    current = ["keep", *["recompute"] * (len(impacts) - 1)]
    no_bytes = _plan(impacts, budget=budget, current=current, stored_bytes={})
    assert (list(no_bytes.storages), no_bytes.theta) == (current, None)
    mask = Mask(blocks=("a", "b"), storages=("keep", "recompute"))
    for config in (ThresholdConfig(), ThresholdConfig(value=0.5), ThresholdConfig(quantile=0.5)):
        evidence = Evidence(current=mask, impacts=(), stored_bytes={"keep": (2, 2), "recompute": (1, 1)})
        plan = ThresholdPolicy(config, budget, 0.05).plan(evidence)
        assert (plan.storages, plan.theta) == (mask.storages, None)
