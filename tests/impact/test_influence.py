"""What first-order theory says of a block's errors."""

from __future__ import annotations

import pytest
import torch
from probing_support import CPU
from torch import Tensor

from gradckpt_dist.impact.influence import InfluenceImpact, first_order

TOKENS, WIDTH = 64, 256


def _factors(x: Tensor, gradient: Tensor, branch: float = 0.0) -> tuple[float, float, float]:
    """Signal, coherence and branch of a block y = x + branch x, from this gradient at its output."""
    impact = InfluenceImpact(2, CPU)
    x = x.clone().requires_grad_()
    y = x + branch * x
    impact.watch(0, y, ((x,), {}))
    unit = torch.ones(2, 2, requires_grad=True) * 1
    impact.watch(1, unit, ())
    torch.autograd.backward([y, unit], [gradient, torch.ones(2, 2)])
    signal, coherence, passed = first_order(impact.step_values())
    return float(signal[0]), float(coherence[0]), float(passed[0])


def test_coherence_is_how_far_tokens_agree() -> None:
    torch.manual_seed(0)
    same = torch.randn(1, WIDTH).expand(TOKENS, WIDTH)
    gradient = torch.randn(1, WIDTH).expand(TOKENS, WIDTH)
    signs = torch.tensor([1.0, -1.0]).repeat(TOKENS // 2)[:, None]
    assert _factors(same, gradient)[1] == pytest.approx(TOKENS, rel=0.3)
    assert _factors(same, gradient * signs)[1] == pytest.approx(0, abs=1e-6)
    assert _factors(torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH))[1] == pytest.approx(1, rel=0.3)


def test_the_sketch_estimates_the_weight_gradients_norm() -> None:
    torch.manual_seed(0)
    x, gradient = torch.randn(2, TOKENS, WIDTH), torch.randn(2, TOKENS, WIDTH)
    units = torch.nn.functional.normalize(x, dim=-1).flatten(0, 1)
    exact = (gradient.flatten(0, 1).mT @ units).square().sum() / gradient.square().sum()
    assert _factors(x, gradient)[1] == pytest.approx(float(exact), rel=0.15)


def test_branch_is_what_the_block_adds_to_the_gradient() -> None:
    x, gradient = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)
    assert _factors(x, gradient, branch=0.0)[2] == 0
    assert _factors(x, gradient, branch=0.25)[2] == pytest.approx((0.25 / 1.25) ** 2)


def test_a_loss_scale_cancels() -> None:
    torch.manual_seed(0)
    x, gradient = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)
    assert _factors(x, gradient * 1024, 0.5)[1:] == pytest.approx(_factors(x, gradient, 0.5)[1:], rel=1e-5)


def test_a_window_has_four_numbers_a_block_and_drops_what_is_not_finite() -> None:
    impact = InfluenceImpact(2, CPU)
    for scale in (1.0, float("inf")):
        for index in range(2):
            x = torch.ones(4, 8, requires_grad=True)
            y = x * 2
            impact.watch(index, y, ((x,), {}))
            y.backward(torch.ones(4, 8) * scale)
        impact.end_step()
    *values, count, dropped = impact.take_window().tolist()
    assert len(values) == 8
    assert (count, dropped) == (1, 1)
    assert values[:2] == [1.0, 1.0]
    assert values[4:6] == [1.0, 1.0], "g_in - g_out = g_out"
    assert values[6:] == [4.0, 4.0]


def test_other_shapes_and_the_users_random_numbers() -> None:
    impact = InfluenceImpact(1, CPU)
    state = torch.get_rng_state()
    x = torch.ones(4, 8, requires_grad=True)
    y = (x * 2)[:, :3]
    impact.watch(0, {"hidden": y, "n": 1}, ((x, 3), {"mask": None}))
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert [float(part) for part in first_order(impact.step_values())] == [1.0, 1.0, 1.0]
