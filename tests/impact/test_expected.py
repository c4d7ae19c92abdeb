"""From what was gathered to the expected error of the whole gradient."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from models import backward, batch, build
from probing_support import CPU, Probed, coarse_storage

from gradckpt_dist.impact.expected import ExpectedErrors
from gradckpt_dist.impact.margin import FIRST_SHARE
from gradckpt_dist.impact.weights import GradientWeights

ROW = 8
NO_PROBE = [0.0] * ROW


def _probe(own: float, passed: float, gradient: float = 1.0, signal: float = 1.0, *, count: int = 1) -> list[float]:
    """One block's row of a window with one lossy storage, c = 2 and b = 1/2."""
    return [count * value for value in (1, gradient, gradient / signal, 1, own, passed, 2 * own, 2 * passed)]


def _window(*rows: Sequence[float], dropped: float = 0.0) -> list[float]:
    return [value for row in rows for value in row] + [dropped]


def _settle(expected: ExpectedErrors, window: list[float], weights: Sequence[float] = ()) -> None:
    """So many probes that what they found is believed."""
    for _ in range(100):
        expected.update(window, weights)


def _errors(expected: ExpectedErrors, metric: str, values: Sequence[float]) -> list[float]:
    return list(expected.squared(metric, values)[:, 0])


THREE = (0, 0, 0)
VALUES = [1.0, 2.0, 3.0, 2.0, 4.0, 6.0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0]
"""Of three blocks: squares, signal (c = 2), branch and passing norms (b = 1/2)."""
TWO = [1.0, 2.0, 2.0, 4.0, 0.5, 0.5, 1.0, 1.0]
"""The same of two."""
WEIGHTS = [2.0, 6.0, 4.0, 6.0, 2.0, 2.0]
"""0.1, 0.3, 0.2, 0.3, 0.1 in each of two steps."""


def test_own_error_counts_by_the_blocks_share_and_what_is_passed_by_all_earlier_ones() -> None:
    expected = ExpectedErrors(THREE, ["compress4"])
    _settle(expected, _window(_probe(0.1, 0.01), _probe(0.2, 0.02, count=3), _probe(0.4, 0.04)), WEIGHTS)
    assert _errors(expected, "probe", VALUES) == pytest.approx(
        [0.1 * 0.3 + 0.01 * 0.1, 0.2 * 0.2 + 0.02 * 0.4, 0.4 * 0.3 + 0.04 * 0.6], rel=0.01
    )


def test_influence_takes_first_order_theory_and_the_kinds_mean() -> None:
    expected = ExpectedErrors(THREE, ["compress4"])
    _settle(expected, _window(_probe(0.1, 0.01), NO_PROBE, _probe(0.3, 0.03)), WEIGHTS)
    values = [1.0, 2.0, 3.0, 4.0, 4.0, 6.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
    e, f = 0.4, 0.04
    assert _errors(expected, "influence", values) == pytest.approx(
        [e / 4 * 0.3 + f / 2 * 0.1, e / 2 * 0.2 + f / 2 * 0.4, e / 2 * 0.3 + f * 0.6], rel=0.01
    )


def test_norm_is_a_share_of_the_squared_norm() -> None:
    expected = ExpectedErrors(THREE, ["compress4"])
    _settle(expected, _window(_probe(0.1, 0.01), _probe(0.3, 0.01), NO_PROBE))
    assert _errors(expected, "norm", [1.0, 2.0, 3.0]) == pytest.approx([0.2 / 6, 0.4 / 6, 0.6 / 6], rel=0.01)


def test_a_block_not_probed_yet_takes_the_largest_of_its_kind_and_an_unknown_kind_infinity() -> None:
    expected = ExpectedErrors((0, 0, 1), ["compress8", "compress4"])
    row = [*_probe(0.1, 0.0), *[0.0] * 5]
    expected.update(_window(row, [0.0] * 13, [0.0] * 13), WEIGHTS)
    errors = expected.squared("probe", VALUES)
    assert errors[:2, 0] == pytest.approx([0.03, 0.02])
    assert np.isinf(errors[2, 0])
    assert np.isinf(errors[:, 1]).all()
    assert expected.probes().tolist() == [[1, 0], [0, 0], [0, 0]]
    assert np.isinf(ExpectedErrors(THREE, ["compress4"]).squared("influence", [])).all()


def test_without_gradients_of_parameters_shares_come_from_probes() -> None:
    expected = ExpectedErrors(THREE, ["compress4"])
    expected.update(_window(*(_probe(0.1, 0.0, gradient=g, signal=s) for g, s in ((4, 2), (4, 4), (12, 6)))))
    assert _errors(expected, "probe", VALUES) == pytest.approx([0.1 * 4 / 20, 0.1 * 4 / 20, 0.1 * 12 / 20])


def test_a_block_that_was_not_probed_again_follows_its_kind_under_any_storage() -> None:
    expected = ExpectedErrors((0, 0, 1), ["compress8", "compress4"])
    row = [*_probe(0.01, 0.001), *_probe(0.1, 0.01)[3:]]
    nothing = [0.0] * len(row)
    expected.update(_window(row, row, row), WEIGHTS)
    before = expected.squared("probe", VALUES)
    expected.update(_window(nothing, [*_probe(0.04, 0.004), *[0.0] * 5], nothing), WEIGHTS)
    rise = expected.squared("probe", VALUES) / before
    assert 2 < rise[1, 0] < 4
    assert 1.2 < rise[0, 0] < rise[1, 0]
    assert 1.2 < rise[0, 1] < rise[1, 1] < rise[1, 0]
    assert rise[2] == pytest.approx(1)


def test_the_planned_share_tells_probes_that_were_foreseen_from_those_that_were_not() -> None:
    foreseen, surprised = (ExpectedErrors(THREE, ["compress4"]) for _ in range(2))
    assert foreseen.planned_share() == FIRST_SHARE
    first = _window(*[_probe(0.1, 0.01)] * 3)
    for expected in (foreseen, surprised):
        expected.update(first, WEIGHTS, VALUES)
    at_first = foreseen.planned_share()
    for number in range(6):
        foreseen.update(first, WEIGHTS, VALUES)
        surprised.update(_window(*[_probe(0.1 * 5**number, 0.01 * 5**number)] * 3), WEIGHTS, VALUES)
    assert surprised.planned_share() < at_first < foreseen.planned_share()
    assert foreseen.planned_share() > 0.8


def test_the_share_shrinks_while_nothing_is_probed() -> None:
    expected = ExpectedErrors(THREE, ["compress4"])
    for _ in range(4):
        expected.update(_window(*[_probe(0.1, 0.01)] * 3), WEIGHTS, VALUES)
    shares = [expected.planned_share()]
    for _ in range(3):
        expected.update(_window(NO_PROBE, NO_PROBE, NO_PROBE), WEIGHTS, VALUES)
        shares.append(expected.planned_share())
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[0]


def test_goes_on_from_its_state() -> None:
    storages = ["compress8", "compress4"]
    expected, resumed, other = (ExpectedErrors(THREE, names) for names in (storages, storages, ["compress4"]))
    row = [*_probe(0.01, 0.001), *_probe(0.1, 0.01)[3:]]
    nothing = [0.0] * len(row)
    expected.update(_window(row, row, nothing), WEIGHTS, VALUES)
    expected.update(_window(nothing, [value * 2 for value in row], nothing), WEIGHTS, VALUES)
    state = json.loads(json.dumps(expected.state_dict()))
    for loaded in (resumed, other):
        loaded.load_state_dict(state)
    assert (resumed.squared("probe", VALUES) == expected.squared("probe", VALUES)).all()
    assert resumed.planned_share() == expected.planned_share()
    assert (resumed.probes() == expected.probes()).all()
    assert (other.squared("probe", VALUES)[:, 0] == expected.squared("probe", VALUES)[:, 1]).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_faulty_rank_teaches_nothing(value: float) -> None:
    expected = ExpectedErrors((0, 0), ["compress4"])
    weights = [0.0, 1.0, 1.0, 0.0, 1.0]
    expected.update(_window(_probe(0.1, 0.0), _probe(0.2, 0.0), dropped=2), weights)
    before = _errors(expected, "probe", TWO)
    expected.update(_window(_probe(value, 0.0), _probe(0.2, value), dropped=value), [value] * 5, TWO)
    assert _errors(expected, "probe", TWO) == before
    assert expected.dropped_probes == 2


@pytest.mark.parametrize("metric", ["probe", "influence"])
def test_predicts_the_true_error(metric: str) -> None:
    with coarse_storage():
        model = build()
        model.eval().requires_grad_(True)
        for module in model.modules():
            module.training = True
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        probed = Probed(model, ["keep", "compress4"], ["compress4"], metric)
        weights = GradientWeights(model, list(model.blocks), CPU)
        for block in range(4):
            probed.begin(block)
            backward(model, batch(0))
            weights.gather(probed.impact.step_scale())
            probed.end()
            model.zero_grad()
        values, sums = probed.take()
        probed.expected.update(sums, weights.take_window().tolist())
        predicted = probed.expected.squared(metric, values)[:, 0]
        exact = _gradients(probed, ["keep"] * 4)
        for block in range(4):
            storages = ["keep"] * 4
            storages[block] = "compress4"
            error = (_gradients(probed, storages) - exact).square().sum() / exact.square().sum()
            assert 0.5 < math.sqrt(predicted[block] / error) < 2, (block, predicted[block], error)
        probed.undo()


def _gradients(probed: Probed, storages: Sequence[str]) -> torch.Tensor:
    for runtime, storage in zip(probed.runtimes, storages, strict=True):
        runtime.use(storage)
    probed.model.zero_grad()
    backward(probed.model, batch(0))
    return torch.cat([p.grad.flatten() for p in probed.model.parameters() if p.grad is not None]).double()


def test_theory_carries_a_probe_on_to_the_steps_after_it() -> None:
    expected = ExpectedErrors((0, 0), ["compress4"])
    _settle(expected, _window(_probe(0.1, 0.01), _probe(0.2, 0.02)), [1.0, 1.0, 1.0, 0.0, 1.0])
    more_coherent_and_more_added = [1.0, 2.0, 4.0, 8.0, 1.0, 1.0, 1.0, 1.0]
    assert _errors(expected, "probe", TWO)[1] == pytest.approx(0.2 / 3 + 0.02 * 2 / 3, rel=0.01)
    assert _errors(expected, "probe", more_coherent_and_more_added)[1] == pytest.approx(
        0.1 / 3 + 0.04 * 2 / 3, rel=0.01
    )
