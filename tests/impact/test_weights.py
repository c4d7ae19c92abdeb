"""How the whole gradient is shared out."""

from __future__ import annotations

import pytest
import torch
from models import backward, batch, build
from probing_support import CPU
from torch import nn

from gradckpt_dist.impact.weights import GradientWeights


def _squares(*modules: nn.Module) -> float:
    return sum(p.grad.square().sum().item() for module in modules for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("scale", [1.0, 4096.0])
def test_before_blocks_and_after(scale: float) -> None:
    model = build()
    weights = GradientWeights(model, list(model.blocks), CPU)
    backward(model, batch(0), scale)
    weights.gather(torch.tensor(2.0))
    squares = [_squares(part) for part in (model.embedding, *model.blocks, model.head)]
    *shares, steps = weights.take_window().tolist()
    assert shares == pytest.approx([square / 2 for square in squares], rel=1e-4)
    assert steps == 1
    assert weights.take_window().tolist() == [0.0] * 7


def test_steps_without_usable_gradients_teach_nothing() -> None:
    model = build()
    weights = GradientWeights(model, list(model.blocks), CPU)
    weights.gather(torch.tensor(1.0))
    for scale in (0.0, float("inf"), float("nan")):
        model.zero_grad()
        backward(model, batch(0), scale)
        weights.gather(torch.tensor(1.0))
    weights.gather(torch.tensor(float("nan")))
    assert weights.take_window().tolist() == [0.0] * 7
