"""The figures' arithmetic, on rows made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from gradckpt_dist.bench.frontier.bars import Comparison, compare, headline

MIB = 2**20


def row(system: str, peak: float, ratio: float, **changes: Any) -> dict[str, Any]:
    return {
        "system": system,
        "model": "demo",
        "compiled": False,
        "budget": None,
        "tolerance": 0.0,
        "peak_bytes": int(peak * MIB),
        "step_ratio": ratio,
    } | changes


KEEP, FULL = row("keep", 100, 1.0), row("recompute", 30, 1.4)


def only(rows: list[dict[str, Any]]) -> Comparison:
    (comparison,) = compare(rows)
    return comparison


def test_share_is_of_the_fastest_lossy_row_at_full_recomputes_peak() -> None:
    lossy = [row("gradckpt", peak, ratio, tolerance=0.05) for peak, ratio in ((31, 1.02), (30.5, 1.1), (29, 1.2))]
    exact = [row("gradckpt", 20, 1.01), row("gradckpt", 20, 1.01, tolerance=0.01)]
    assert only([KEEP, FULL, *lossy, *exact]).share_of_full_recompute_cost == pytest.approx(0.1 / 0.4)


def test_share_is_missing_without_its_rows() -> None:
    lossy = row("gradckpt", 30, 1.1, tolerance=0.05)
    for rows in ([FULL, lossy], [KEEP, lossy], [KEEP, FULL], [KEEP, FULL, row("gradckpt", 40, 1.1, tolerance=0.05)]):
        assert only(rows).share_of_full_recompute_cost is None
    assert only([KEEP, row("recompute", 30, 0.99), lossy]).share_of_full_recompute_cost is None


def test_compiled_blocks_have_their_own_scale_and_the_eager_one() -> None:
    compiled = [
        row("keep", 100, 0.9, compiled=True),
        row("recompute", 32, 1.3, compiled=True),
        row("compile_budget", 32, 1.1, compiled=True, budget=0.1),
        row("torchtitan_budget", 60, 0.95, compiled=True, budget=0.7),
        row("gradckpt", 32, 1.0, compiled=True, tolerance=0.05),
    ]
    eager, found = compare([KEEP, FULL, *compiled])
    assert (eager.compiled, found.compiled) == (False, True)
    assert found.share_of_full_recompute_cost == pytest.approx(0.1 / 0.4)
    assert found.budget_peer_share == pytest.approx(0.2 / 0.4)
    assert found.share_of_eager_cost == pytest.approx(0.0)
    assert found.budget_peer_share_of_eager_cost == pytest.approx(0.1 / 0.4)
    assert eager.budget_peer_share is None


def test_ours_is_compared_with_the_fastest_peer_that_fits() -> None:
    peers = [KEEP, FULL, row("every_2", 60, 1.2), row("pytorch_sac", 80, 1.1), row("keep", 60, 0.5, compiled=True)]
    ours = [
        row("gradckpt", 100, 1.03),  # keep fits: 3 % slower
        row("gradckpt", 79, 1.05),  # pytorch_sac, 1.3 % above, fits: 4.5 % faster
        row("gradckpt", 70, 1.1),  # every_2: 8.3 % faster
        row("gradckpt", 31, 1.32),  # full recompute: 5.7 % faster
        row("gradckpt", 20, 1.4),  # none fits
        row("gradckpt", 20, 0.1, tolerance=0.05),  # not exact
    ]
    found = compare([*peers, *ours])[0]
    assert found.worst_against_best_peer == pytest.approx(0.03)
    assert (found.budgets_ahead, found.budgets_compared, found.budgets) == (2, 4, 5)


def test_models_are_not_compared_with_each_other() -> None:
    other = [row("keep", 10, 1.0, model="uneven"), row("gradckpt", 100, 1.2)]
    demo, uneven = compare([KEEP, *other])
    assert (demo.model, uneven.model) == ("demo", "uneven")
    assert demo.worst_against_best_peer == pytest.approx(0.2)
    assert (uneven.worst_against_best_peer, uneven.budgets) == (None, 0)


def test_headline_is_the_worst() -> None:
    rows = [KEEP, FULL, row("gradckpt", 100, 1.03), row("gradckpt", 30, 1.1, tolerance=0.05)]
    rows += [one | {"model": "uneven"} for one in (KEEP, FULL, row("gradckpt", 31, 1.2), row("gradckpt", 90, 1.6))]
    rows += [row("gradckpt", 30, 1.2, tolerance=0.05, model="uneven")]
    figures = headline(compare(rows))
    assert figures["share_of_full_recompute_cost"] == pytest.approx(0.2 / 0.4)
    assert figures["worst_against_best_peer"] == pytest.approx(1.6 / 1.4 - 1)
    assert figures["budgets_ahead"] == 0.5
    assert [one["model"] for one in figures["comparisons"]] == ["demo", "uneven"]


def test_headline_without_rows() -> None:
    assert headline(compare([])) == {
        "share_of_full_recompute_cost": None,
        "worst_against_best_peer": None,
        "budgets_ahead": None,
        "comparisons": [],
    }
