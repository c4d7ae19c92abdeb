"""``selective`` and ``selective_half``: exact, without the work whose results they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from selective_support import (
    NAMES,
    WIDTH,
    Function,
    assert_exact,
    counted,
    step,
    transformer,
    work_in_backward,
)
from storage_support import run, storages
from text_model import Block
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gradckpt_dist import StorageError
from gradckpt_dist.storage import StorageContext, create_storage
from gradckpt_dist.storage.half_choice import PROFILED_CALLS, HalfChoice

# -- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_transformer_is_bitwise(name: str, autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_exact(name, transformer, torch.randn(2, 64, 64))


def custom_function(weight: Tensor, x: Tensor) -> Tensor:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
            product = one @ other
            product += 1  # as DeepSpeed adds a bias
            ctx.save_for_backward(one, other, product)
            return product

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            one, other, product = ctx.saved_tensors
            gradient = gradient * product.sign()
            return gradient @ other.t(), one.t() @ gradient

    return Product.apply(Product.apply(x, weight).exp().clamp(max=2), weight)


def attention_with_dropout(weight: Tensor, x: Tensor) -> Tensor:
    q, k, v = ((x @ (weight * n)).unflatten(-1, (2, -1)).transpose(0, 1) for n in (1, 2, 3))
    mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    return functional.dropout(mixed.transpose(0, 1).flatten(1), 0.2)


def top_k_routing(weight: Tensor, x: Tensor) -> Tensor:
    values, chosen = (x @ weight).softmax(-1).topk(2)
    chosen_by_max = (x @ weight).max(-1).indices
    return (weight[chosen] * values.unsqueeze(-1)).sum(1) + weight[chosen_by_max]


def nested_checkpoint(weight: Tensor, x: Tensor) -> Tensor:
    inner = checkpoint(lambda y: functional.dropout((y @ weight).relu(), 0.3) @ weight, x, use_reentrant=False)
    return (inner.tanh() @ weight).sigmoid()


def written_in_place(weight: Tensor, x: Tensor) -> Tensor:
    y = x @ weight
    y.relu_()
    z = y @ weight
    z[:, ::2].mul_(2)
    z.add_(1)
    return torch.sigmoid(z @ weight) * z


def chunks_and_views(weight: Tensor, x: Tensor) -> Tensor:
    one, two = (x @ weight).chunk(2, -1)
    return torch.cat([two.exp(), one.t().contiguous().t().sin()], -1) @ weight.t()


def the_same_product_again(weight: Tensor, x: Tensor) -> Tensor:
    for _ in range(4):
        x = (x @ weight).tanh()
    return x


def random_choice(weight: Tensor, x: Tensor) -> Tensor:
    chosen = torch.multinomial((x @ weight).softmax(-1), 3)
    return functional.dropout((x @ weight).gather(1, chosen), 0.5).sin() @ weight[:3]


FUNCTIONS = (
    custom_function,
    attention_with_dropout,
    top_k_routing,
    nested_checkpoint,
    written_in_place,
    chunks_and_views,
    the_same_product_again,
    random_choice,
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_function_is_bitwise(name: str, function: Callable[..., Any]) -> None:
    assert_exact(name, lambda: [Function(function), Function(lambda weight, x: x @ weight)], torch.randn(16, WIDTH))


@pytest.mark.parametrize("name", NAMES)
def test_running_statistics_are_updated_once(name: str) -> None:
    def make() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))]

    ones = assert_exact(name, make, torch.randn(2, 4, 8, 8))
    assert ones[0].block.get_submodule("1").num_batches_tracked == PROFILED_CALLS + 2


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_function_inside_is_bitwise(name: str) -> None:
    @torch.compile(backend="aot_eager")
    def inside(x: Tensor, weight: Tensor) -> Tensor:
        return (x @ weight).tanh() @ weight

    def function(weight: Tensor, x: Tensor) -> Tensor:
        return functional.dropout(inside(x @ weight, weight), 0.2) @ weight

    assert_exact(name, lambda: [Function(function)], torch.randn(16, WIDTH))


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_is_exact(name: str) -> None:
    block = Function(lambda weight, x: (x @ weight).sigmoid() * (x @ weight).exp())
    second = []
    for one in (*storages("keep", [block]), *storages(name, [block])):
        x = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH).requires_grad_()
        (first,) = torch.autograd.grad(one.run(block, x).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), [x, block.weight]))
        del first
    for one, other in zip(*second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_a_retained_graph_can_be_used_again(name: str) -> None:
    ones = storages(name, transformer())
    x = torch.randn(2, 64, 64, requires_grad=True)
    with counted(ones) as (ledger, forward):
        loss = forward(x).square().mean()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert [one.recomputes for one in ones] == [0, 0]
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    assert [one.recomputes for one in ones] == [1, 1]
    del loss
    assert ledger.live_bytes == 0


# -- work -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_selective_does_no_product_again(function: Callable[..., Any]) -> None:
    x = torch.randn(16, WIDTH)
    block = Function(function)
    assert work_in_backward(storages("selective", [block]), x) == work_in_backward(storages("keep", [block]), x)
    if function is not nested_checkpoint:  # which recomputes under keep too
        assert work_in_backward(storages("recompute", [block]), x) > work_in_backward(storages("keep", [block]), x)


def test_selective_does_no_convolution_and_no_attention_again() -> None:
    blocks = [nn.Sequential(nn.Conv1d(64, 64, 3, padding=1), nn.Dropout(0.1)), *transformer(1)]
    ones = storages("selective", blocks)
    assert work_in_backward(ones, torch.randn(2, 64, 64)) == work_in_backward(
        storages("keep", blocks), torch.randn(2, 64, 64)
    )
    assert [one.recomputes for one in ones] == [0, 0]


def test_a_block_without_anything_to_hold_is_recomputed() -> None:
    (one,) = storages("selective", [nn.Sequential(nn.Tanh(), nn.Tanh())])
    one.run(one.block, torch.randn(4, requires_grad=True)).sum().backward()
    assert one.recomputes == 1


def test_without_gradients_nothing_is_held() -> None:
    ones = storages("selective", transformer())
    with counted(ones) as (ledger, forward), torch.no_grad():
        output = forward(torch.randn(2, 64, 64))
        assert ledger.live_bytes == 0
    assert not output.requires_grad


def test_the_choice_is_made_once_for_all_blocks_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[HalfChoice] = []
    learn = HalfChoice.learn

    def noted(self: HalfChoice, *args: Any) -> Any:
        learned.append(self)
        return learn(self, *args)

    monkeypatch.setattr(HalfChoice, "learn", noted)
    context = StorageContext()
    ones = [create_storage("selective_half", block, context) for block in transformer(PROFILED_CALLS + 1)]
    x = torch.randn(2, 64, 64, requires_grad=True)
    run(ones, x)
    run(ones, x)
    assert learned == learned[:1] * PROFILED_CALLS
    run(ones, x[:, :32])
    with torch.autocast("cpu", torch.bfloat16):
        run(ones, x)
    run([create_storage("selective_half", Block(64, 2, 0.5), context)], x)
    assert len(context.half_choices) == len(set(learned)) == 4
    assert len(learned) == 3 * PROFILED_CALLS + 1


# -- what others do in between --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_output_changed_after_the_block_is_made_again(name: str) -> None:
    gradients = []
    block = Function(lambda weight, x: (x @ weight).sin() @ weight)
    for one in (*storages("keep", [block]), *storages(name, [block])):
        x = torch.ones(4, WIDTH, requires_grad=True)
        y = one.run(block, x)
        y.mul_(2)
        gradients.append(torch.autograd.grad(y.sum(), [x, block.weight]))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_the_callers_own_hooks_apply_to_what_is_held() -> None:
    blocks = transformer()
    x = torch.randn(2, 64, 64)
    theirs = step(storages("keep", blocks), x)
    with save_on_cpu():
        ours = step(storages("selective", blocks), x)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_table_made_in_the_first_forward_only() -> None:
    class Rotary(Function):
        table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.outer(torch.arange(16.0), torch.ones(WIDTH)).cos() @ torch.eye(WIDTH)
            return ((x @ self.weight) * self.table).sin() @ self.weight

    for name in NAMES:
        assert_exact(name, lambda: [Rotary(lambda: None)], torch.randn(16, WIDTH))


def test_outputs_that_cannot_be_told_apart_are_an_error() -> None:
    class Cached(Function):
        first = True

        def forward(self, x: Tensor) -> Tensor:
            if self.first:
                self.first = False
                with torch.no_grad():
                    self.table = torch.ones(16, WIDTH) @ self.weight
            return (x @ self.weight).sin()

    (one,) = storages("selective", [Cached(lambda: None)])
    output = one.run(one.block, torch.randn(16, WIDTH, requires_grad=True))
    with pytest.raises(StorageError, match=r"mm.* 2 times in its forward and 1 times when it was run again"):
        output.sum().backward()
    output = one.run(one.block, torch.randn(16, WIDTH, requires_grad=True))
    output.sum().backward()
