"""The way into a block's backward."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor

from gradckpt_dist.cost.trap import Gradients, Trap


def _leaf() -> Tensor:
    return torch.ones(3, requires_grad=True)


def _caught(outputs: list[Tensor]) -> list[Gradients]:
    found: list[Gradients] = []
    Trap(outputs, found.append)
    return found


def test_gives_the_gradients_at_the_outputs_once() -> None:
    x = _leaf()
    one, two = x * 2, x * 3
    found = _caught([one, two])
    (5 * one + 7 * two).sum().backward()
    assert [{key: value.tolist() for key, value in gradients.items()} for gradients in found] == [
        {0: [5.0] * 3, 1: [7.0] * 3}
    ]
    assert x.grad is not None
    assert x.grad.tolist() == [31.0] * 3


def test_an_output_that_no_gradient_comes_to_is_not_waited_for() -> None:
    x = _leaf()
    one, unused, constant = x * 2, x * 3, torch.ones(3)
    found = _caught([one, unused, constant, x])
    one.sum().backward()
    assert [list(gradients) for gradients in found] == [[0]]


def test_several_outputs_of_one_node() -> None:
    first, second = (_leaf() * 2).split([1, 2])
    found = _caught([first, second])
    (first.sum() + 3 * second.sum()).backward()
    assert [[found[0][i].tolist()] for i in (0, 1)] == [[[1.0]], [[3.0, 3.0]]]


def test_comes_after_hooks_of_the_outputs_that_were_registered_later() -> None:
    order: list[str] = []
    y = _leaf() * 2
    Trap([y], lambda gradients: order.append("trap"))
    y.register_hook(lambda grad: order.append("hook"))
    y.sum().backward()
    assert order == ["hook", "trap"]


def test_in_place_changes_and_views_stay_allowed() -> None:
    x = _leaf()
    y = x.view(3, 1)
    found = _caught([y])
    y = y.mul(1)
    z = x * 2
    found_z = _caught([z])
    z.mul_(5)
    (y.sum() + z.sum()).backward()
    assert found[0][0].tolist() == [[1.0]] * 3
    assert found_z[0][0].tolist() == [5.0] * 3, "of the value that the block returned"


def test_not_in_a_backward_that_makes_a_graph() -> None:
    x = _leaf()
    y = x * 2
    found = _caught([y])
    torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert found == []


def test_lets_go_of_the_graph() -> None:
    class Mark:
        pass

    references = []
    for backward in (True, False):
        y = _leaf() * 2
        mark = Mark()
        references.append(weakref.ref(mark))
        trap = Trap([y], lambda gradients, mark=mark: None)
        if backward:
            y.sum().backward()
        else:
            trap.disarm()
        del y, mark, trap
    gc.collect()
    assert [reference() for reference in references] == [None, None]
