"""``norm`` against gradients taken by autograd itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import backward, batch, build
from torch import Tensor, nn

from gradckpt_dist.impact.norm import NormImpact

CPU = torch.device("cpu")


def _watched(model: nn.Module, impact: NormImpact, outputs: list[Tensor] | None = None) -> list[Any]:
    """Watch every block's output; with ``outputs``, have autograd keep the gradients there, too."""

    def hook(index: int) -> Any:
        def call(module: nn.Module, args: Any, output: Tensor) -> None:
            if outputs is not None:
                output.retain_grad()
                outputs.append(output)
            impact.watch(index, output)

        return call

    return [block.register_forward_hook(hook(i)) for i, block in enumerate(model.get_submodule("blocks").children())]


def _squares(outputs: list[Tensor]) -> list[float]:
    return [output.grad.double().square().sum().item() for output in outputs if output.grad is not None]


def _shares(squares: list[float]) -> list[float]:
    return [square / (sum(squares) / len(squares)) for square in squares]


def test_is_the_gradient_norm_at_the_blocks_outputs() -> None:
    model, impact, expected = build(), NormImpact(4, CPU), [0.0] * 4
    _watched(model, impact, outputs := [])
    for step in range(3):
        outputs.clear()
        backward(model, batch(step))
        impact.end_step()
        expected = [a + b for a, b in zip(expected, _shares(_squares(outputs)), strict=True)]
    *sums, count, dropped = impact.take_window().tolist()
    assert sums == pytest.approx(expected, rel=1e-6)
    assert (count, dropped) == (3, 0)
    assert max(expected) / min(expected) > 1.01
    assert impact.take_window().tolist() == [0.0] * 6


def test_micro_batches_and_repeated_calls_add_up_within_a_step() -> None:
    model, impact = build(), NormImpact(4, CPU)
    _watched(model, impact, outputs := [])
    for step in range(2):
        backward(model, batch(step))
    impact.end_step()
    squares = _squares(outputs)
    expected = _shares([squares[i] + squares[4 + i] for i in range(4)])
    assert impact.take_window().tolist() == pytest.approx([*expected, 1, 0], rel=1e-6)


def _window(scale: float, dtype: torch.dtype = torch.float32) -> list[float]:
    model, impact = build().to(dtype), NormImpact(4, CPU)
    _watched(model, impact)
    torch.manual_seed(1)
    for step in range(2):
        backward(model, batch(step), scale)
        impact.end_step()
    return impact.take_window().tolist()


def test_a_loss_scale_cancels_exactly() -> None:
    assert _window(65536.0) == _window(1.0)


def test_double_and_half_precision_gradients() -> None:
    reference = _window(1.0)
    assert _window(1.0, torch.float64) == pytest.approx(reference, rel=0.05)
    assert _window(1.0, torch.bfloat16) == pytest.approx(reference, rel=0.3)


@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e38])
def test_a_step_that_overflowed_teaches_nothing(scale: float) -> None:
    model, impact = build(), NormImpact(4, CPU)
    _watched(model, impact)
    torch.manual_seed(1)
    backward(model, batch(0))
    impact.end_step()
    clean = impact._window.clone()
    backward(model, batch(1), scale)
    impact.end_step()
    clean[5] = 1
    assert impact.take_window().tolist() == clean.tolist()


def test_a_step_without_a_gradient_is_dropped() -> None:
    model, impact = build(), NormImpact(4, CPU)
    _watched(model, impact)
    impact.end_step()
    model(batch(0))
    impact.end_step()
    with torch.no_grad():
        model(batch(0))
    impact.end_step()
    backward(model, batch(0), 0.0)
    impact.end_step()
    assert impact.take_window().tolist() == [0.0] * 4 + [0.0, 4.0]


def test_a_block_without_gradient_has_no_impact() -> None:
    model, impact = build(), NormImpact(4, CPU)
    _watched(model, impact)
    for part in (model.embedding, model.blocks[0], model.blocks[1]):
        part.requires_grad_(False)
    backward(model, batch(0))
    impact.end_step()
    first, second, third, fourth, count, dropped = impact.take_window().tolist()
    assert (first, second, count, dropped) == (0, 0, 1, 0)
    assert third + fourth == pytest.approx(4)


@pytest.mark.parametrize(
    ("pack", "square"),
    [
        (lambda one, two: one, 3.0),
        (lambda one, two: (one, 0.5, None, torch.ones(2)), 3.0),
        (lambda one, two: {"hidden": one, "extra": (two, "text")}, 15.0),
        (lambda one, two: [one, {"again": one}], 3.0),
    ],
)
def test_every_tensor_in_a_tuple_or_dict_counts_once(pack: Callable[[Tensor, Tensor], Any], square: float) -> None:
    x, impact = torch.ones(3, requires_grad=True), NormImpact(2, CPU)
    one, two, unit = x * 1, x * 1, x[:1] * 1
    impact.watch(0, pack(one, two))
    impact.watch(1, unit)
    (one.sum() + 2 * two.sum() + unit.sum()).backward()
    impact.end_step()
    first, second, *_ = impact.take_window().tolist()
    assert first / second == pytest.approx(square)


def test_gradients_are_left_as_they_are_and_nothing_stays_on_parameters() -> None:
    plain, watched = build(), build()
    impact = NormImpact(4, CPU)
    _watched(watched, impact)
    for model in (plain, watched):
        torch.manual_seed(1)
        backward(model, batch(0))
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    weight = nn.Parameter(torch.ones(3))
    impact.watch(0, {"hidden": weight * 2, "weight": weight})
    assert not weight._backward_hooks
