"""How the whole gradient is shared out."""

from __future__ import annotations

import pytest
import torch
from frameworks import Model, wrap
from models import backward, batch, build
from probing_support import CPU
from support import run_distributed_test
from torch import nn

from gradckpt_dist.blocks import find_blocks
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


def _check_sharded() -> None:
    shares = {}
    for framework in ("ddp", "fsdp1", "fsdp1_flat", "fsdp2"):
        torch.manual_seed(0)
        model = wrap(Model().eval(), framework)
        weights = GradientWeights(model, [block.module for block in find_blocks(model)], CPU)
        model(torch.linspace(-1, 1, 256).view(8, 32)).square().mean().backward()
        weights.gather(torch.tensor(1.0))
        window = weights.take_window()
        torch.distributed.all_reduce(window)
        before, *blocks, after = (window[:-1] / window[:-1].sum()).tolist()
        assert (before == 0) != (framework == "fsdp1_flat")
        shares[framework] = torch.tensor([*blocks, before + after])
    assert shares["ddp"][0] > 0.01
    for framework, share in shares.items():
        torch.testing.assert_close(share, shares["ddp"], rtol=1e-3, atol=1e-6, msg=framework)


def test_sharded_gradients_add_up() -> None:
    run_distributed_test(_check_sharded, 2)
