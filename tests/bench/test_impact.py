"""``gradckpt bench impact``: the object that tools read, and what it is made of."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cost_tables import table
from support import run_command
from text_model import GPT
from torch import Tensor, nn
from torch.nn import functional

import gradckpt_dist
from gradckpt_dist.bench.gradient_errors import GradientErrors, Sample
from gradckpt_dist.bench.impact import METRICS, TOLERANCES, spearman
from gradckpt_dist.bench.impact_plans import Planner
from gradckpt_dist.bench.impact_training import StatedSeconds
from gradckpt_dist.config import LOSSY_STORAGES

ROW = {
    "step", "metric", "storage", "bits", "spearman", "median_ratio", "least_ratio", "largest_ratio", "true_error",
    "predicted_error", "regret_seconds",
}  # fmt: skip
PLAN = {
    "step", "metric", "tolerance", "extra_seconds", "regret_seconds", "true_error", "exceeds_tolerance", "storages",
}  # fmt: skip
BASELINES = ("true", "first", "random", "static")


@pytest.mark.bench
def test_quick_run_prints_one_object(tmp_path: Path) -> None:
    output = tmp_path / "impact.json"
    command = [sys.executable, "-m", "gradckpt_dist", "bench", "impact", "--quick", "--json", "--output", str(output)]
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads(output.read_text())
    assert {"name", "versions", "machine", "command", "rows", "stated_extra_seconds", "summary"} <= set(result)
    _check_rows(result["rows"], result["extent"])
    _check_plans(result["plans"])
    for row in result["additivity"]:
        assert row["measured"] == pytest.approx(row["from_blocks_alone"], rel=0.2)
    assert len(result["additivity"]) == result["extent"]["points"]
    assert [row["tolerance"] for row in result["realised"]] == [TOLERANCES[0]] * 2 + [TOLERANCES[1]] * 2
    for row in result["realised"]:
        assert 0 <= row["root_mean_square"] <= row["realised"]
        assert (row["realised"] > 0) == bool(set(row["mask"]) & set(LOSSY_STORAGES))
        assert row["predicted"] <= row["tolerance"]
    assert max(row["realised"] for row in result["realised"]) > 0
    shares = [row["realised"] / row["tolerance"] for row in result["realised"]]
    assert result["largest_share_of_tolerance"] == pytest.approx(max(shares))


def _check_rows(rows: list[dict[str, Any]], extent: dict[str, Any]) -> None:
    steps = {row["step"] for row in rows}
    assert len(steps) == extent["points"]
    assert max(steps) == extent["steps"]
    assert len(rows) == len(steps) * len(METRICS) * len(LOSSY_STORAGES)
    for row in rows:
        assert set(row) == ROW
        assert row["bits"] == int(row["storage"][-1])
        assert row["spearman"] is None or -1 <= row["spearman"] <= 1
        assert 0 < row["least_ratio"] <= row["median_ratio"] <= row["largest_ratio"]
        assert row["regret_seconds"] > 0
        assert len(row["true_error"]) == len(row["predicted_error"]) == extent["layers"]
    medians = {bits: np.median([row["true_error"] for row in rows if row["bits"] == bits]) for bits in (4, 8)}
    assert medians[4] > 4 * medians[8]


def _check_plans(plans: list[dict[str, Any]]) -> None:
    for plan in plans:
        assert set(plan) == PLAN
        assert 0 <= plan["exceeds_tolerance"] <= 1
        if plan["metric"] in {"true", "static"}:
            assert plan["true_error"] <= plan["tolerance"]
            assert plan["regret_seconds"] >= 1
    assert {plan["metric"] for plan in plans} == {*METRICS, *BASELINES}
    assert {plan["regret_seconds"] for plan in plans if plan["metric"] == "true"} == {1.0}


def _build() -> GPT:
    """Four blocks whose activations are large enough to be quantised."""
    torch.manual_seed(0)
    return GPT(vocabulary=11, context=32, width=32, layers=4, heads=2, dropout=0.1)


def _batch() -> Tensor:
    return torch.randint(11, (8, 33), generator=torch.Generator().manual_seed(0))


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    return functional.cross_entropy(model(windows[:, :-1]), windows[:, 1:].flatten())


def test_errors_are_0_for_exact_storages_and_leave_the_random_state_alone() -> None:
    errors = GradientErrors(_build(), _loss)
    sample = Sample(batch=_batch(), seed=3)
    state = torch.get_rng_state()
    exact = errors.exact(sample)
    assert errors.squared_error(("recompute", "selective", "keep", "recompute"), sample, exact) == 0
    assert 1e-4 < math.sqrt(errors.squared_error(errors.alone(1, "compress8"), sample, exact)) < 1e-2
    assert torch.equal(torch.get_rng_state(), state)
    other_dropout = errors.exact(Sample(batch=_batch(), seed=4))
    assert any(not torch.equal(one, other) for one, other in zip(exact, other_dropout, strict=True))


def test_errors_follow_the_weights_that_are_loaded() -> None:
    model, errors = _build(), GradientErrors(_build(), _loss)
    sample = Sample(batch=_batch(), seed=3)
    before = errors.exact(sample)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    errors.load(model.state_dict())
    torch.manual_seed(3)
    _loss(model, sample.batch).backward()
    for now, old, parameter in zip(errors.exact(sample), before, model.parameters(), strict=True):
        assert torch.equal(now, parameter.grad)
        assert not torch.equal(now, old)


@pytest.mark.parametrize(
    ("ones", "others", "correlation"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3], [1, 3, 2], 0.5),
        ([1, 1, 2], [1, 2, 3], math.sqrt(3) / 2),
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_spearman(ones: list[float], others: list[float], correlation: float | None) -> None:
    expected = None if correlation is None else pytest.approx(correlation)
    assert spearman(np.array(ones, dtype=float), np.array(others, dtype=float)) == expected


def _planner(tolerance: float) -> Planner:
    """Two blocks, the first one ten times as sensitive; nothing lossy is 10 times as slow."""
    row = {"keep": (0.0, 100, 0, 0.0), "recompute": (1.0, 10, 0, 0.0), "compress8": (0.1, 10, 0, 0.0)}
    costs = table(row, row, storages=("keep", "recompute", "compress8"))
    return Planner(costs=costs, true=np.array([[1e-2], [1e-4]]), peak_bytes=20, tolerance=tolerance)


def test_regret_is_against_the_plan_with_true_errors() -> None:
    planner = _planner(tolerance=0.05)
    assert planner.by(planner.true) | {"regret_seconds": 1.0} == planner.by(planner.true)
    assert planner.by(planner.true)["storages"] == ["recompute", "compress8"]
    too_high = planner.by(np.full((2, 1), 1.0))
    assert too_high["regret_seconds"] == pytest.approx(2 / 1.1)
    assert too_high["exceeds_tolerance"] == 0
    unknown = planner.by(np.full((2, 1), np.inf))
    assert unknown["storages"] == ["recompute", "recompute"]


def test_a_plan_that_is_fast_because_it_is_wrong_says_so() -> None:
    planner = _planner(tolerance=0.05)
    plan = planner.by(planner.true[::-1])
    assert plan["storages"] == ["compress8", "recompute"]
    assert plan["exceeds_tolerance"] == 1
    assert plan["true_error"] == pytest.approx(0.1)
    at_random = planner.by_random(0)
    assert 0 < at_random["exceeds_tolerance"] < 1
    static = planner.by_static()
    assert static["storages"] == ["recompute", "recompute"]
    assert static["regret_seconds"] == pytest.approx(2 / 1.1)


def _looked_at(tolerance: float) -> Iterator[tuple[tuple[str, ...], float]]:
    """Masks in force at the end of intervals, and the relative error of the gradient of the step under them.

    Weights, batch and dropout stay, so that what was probed is what happens.
    """
    model, errors = _build(), GradientErrors(_build(), _loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sample = Sample(batch=_batch(), seed=3)
    exact = errors.exact(sample)
    config = {"memory_budget": 0.0, "gradient_tolerance": tolerance, "interval": 4, "warmup_steps": 0}
    engine = gradckpt_dist.enable(model, config, optimizer=optimizer)
    engine._policy = StatedSeconds(engine._policy)
    for step in range(1, 33):
        optimizer.zero_grad()
        torch.manual_seed(sample.seed)
        _loss(model, sample.batch).backward()
        optimizer.step()
        if step % 4 == 0 and step > 8:
            mask = engine.mask.storages
            yield mask, math.sqrt(errors.squared_error(mask, sample, exact))
    engine.disable()


@pytest.mark.parametrize("tolerance", [0.01, pytest.param(0.007, marks=pytest.mark.slow)])
def test_the_realised_error_of_the_gradient_is_within_the_tolerance(tolerance: float) -> None:
    looked_at = list(_looked_at(tolerance))
    assert len(looked_at) == 6
    for mask, error in looked_at:
        assert error <= tolerance
        assert (error > 0) == bool(set(mask) & set(LOSSY_STORAGES))
    assert looked_at[-1][1] > 0.3 * tolerance
