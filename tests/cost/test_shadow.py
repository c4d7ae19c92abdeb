"""A call run again leaves no trace, and gives the gradients of the true one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Block, Transformer, batch
from probing_support import CPU
from torch import Tensor, nn

from gradckpt_dist.cost.clock import DeviceClock
from gradckpt_dist.cost.shadow import ShadowCall, ShadowRun, output_tensors, parameters_of
from gradckpt_dist.cost.trap import Trap
from gradckpt_dist.storage import create_storage
from gradckpt_dist.storage.ledger import Ledger

CLOCK = DeviceClock(CPU)


def _shadow(
    block: nn.Module,
    *args: Any,
    use: Callable[[Any], Tensor] = lambda output: output.square().sum(),
    storage: str = "keep",
    ledger: Ledger | None = None,
    **kwargs: Any,
) -> tuple[list[ShadowRun], ShadowCall]:
    """Train the block for one backward; inside of it, run it again."""
    call = ShadowCall(block, type(block).forward.__get__(block), args, kwargs)
    output = block(*args, **kwargs)
    runs: list[ShadowRun] = []
    Trap(
        output_tensors(output),
        lambda gradients: runs.append(
            call.run(create_storage(storage, block), call.separated(gradients), CLOCK, ledger)
        ),
    )
    use(output).backward()
    return runs, call


def _assert_true_gradients(run: ShadowRun, block: nn.Module, *inputs: Tensor) -> None:
    for ours, parameter in zip(run.parameter_gradients, parameters_of(block), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=0, atol=0)
    for ours, tensor in zip(run.input_gradients, inputs, strict=True):
        torch.testing.assert_close(ours, tensor.grad, rtol=0, atol=0)


@pytest.mark.parametrize("storage", ["keep", "recompute", "offload"])
def test_dropout_is_that_of_the_true_forward(storage: str) -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 8, 16, requires_grad=True)
    (run,), _ = _shadow(block, x, storage=storage)
    _assert_true_gradients(run, block, x)


def test_random_numbers_and_buffers_stay_as_they_are() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.seen: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(random.random())
            return self.norm(x) * torch.rand(4)

    block, x = Noisy(), torch.randn(6, 4, requires_grad=True)
    states: list[Any] = []

    def use(output: Tensor) -> Tensor:
        states.extend([torch.get_rng_state(), random.getstate(), *(b.clone() for b in block.buffers())])
        return output.square().sum()

    (run,), _ = _shadow(block, x, use=use)
    _assert_true_gradients(run, block, x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    for buffer, before in zip(block.buffers(), states[2:], strict=True):
        assert torch.equal(buffer, before)
    assert block.norm.num_batches_tracked == 1
    assert len(block.seen) == 2
    assert block.seen[0] == block.seen[1]


def test_autocast_is_that_of_the_true_forward() -> None:
    block, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        call = ShadowCall(block, type(block).forward.__get__(block), (x,), {})
        output = block(x)
    runs: list[ShadowRun] = []
    Trap([output], lambda gradients: runs.append(call.run(create_storage("keep", block), gradients, CLOCK)))
    output.float().square().sum().backward()
    _assert_true_gradients(runs[0], block, x)


class Routed(nn.Module):
    """Returns what it is made from, and a second thing that the first depends on: a mixture with its routing."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.up, self.side = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, *, scale: float) -> dict[str, Any]:
        routing = self.route(x)
        hidden = self.up(x) * routing.softmax(-1) * scale
        return {"hidden": hidden, "extra": (routing, self.side(x)), "same": hidden, "mask": torch.ones(4) > 0, "n": 3}


def test_outputs_that_depend_on_each_other() -> None:
    block, x = Routed(), torch.randn(6, 4, requires_grad=True)
    (run,), _ = _shadow(
        block,
        x,
        scale=2.0,
        use=lambda out: (out["hidden"] * 2 + out["same"]).square().sum() + out["extra"][0].logsumexp(-1).sum(),
    )
    for ours, parameter in zip(run.parameter_gradients, parameters_of(block), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(ours, parameter.grad)
    torch.testing.assert_close(run.input_gradients[0], x.grad)


def test_hooks_and_gradients_of_parameters_are_left_alone() -> None:
    block, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    calls: list[str] = []
    block.weight.register_hook(lambda grad: calls.append("tensor"))
    block.weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    block.register_forward_hook(lambda *_: calls.append("forward"))
    (run,), _ = _shadow(block, x)
    _assert_true_gradients(run, block, x)
    assert sorted(calls) == ["accumulated", "forward", "tensor"]


def test_frozen_parameters_and_inputs_without_gradient() -> None:
    block, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    block[0].requires_grad_(False)
    (run,), call = _shadow(block, x)
    _assert_true_gradients(run, block)
    assert len(run.parameter_gradients) == 2
    assert call.tokens == 3


def test_bytes_are_those_of_the_storage() -> None:
    held = {}
    for storage in ("keep", "recompute"):
        block, x = Block(), torch.randn(2, 8, 16, requires_grad=True)
        (run,), _ = _shadow(block, x, storage=storage, ledger=Ledger(1))
        assert run.measurement is not None
        held[storage] = run.measurement
    assert held["recompute"].stored_bytes == (2 * 8 * 16 * 4,)
    assert held["keep"].stored_bytes == held["keep"].keep_bytes == held["recompute"].keep_bytes
    assert held["recompute"].peak_bytes >= held["keep"].stored_bytes[0]


def test_marks_are_in_order() -> None:
    (run,), _ = _shadow(Block(), torch.randn(2, 8, 16, requires_grad=True))
    start, between, end = run.marks
    assert start < between < end
    assert CLOCK.seconds(*run.span) == pytest.approx(end - start)


def test_inputs_changed_in_place_are_noticed() -> None:
    x = torch.randn(3, 4)
    call = ShadowCall(nn.ReLU(), torch.relu, (x,), {})
    assert call.intact
    x.add_(1)
    assert not call.intact


class _Cache:
    pass


class _Box:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize(
    ("argument", "possible"),
    [
        (torch.ones(2), True),
        ([None, {"a": (1, "b", 2.0)}, torch.float16, torch.Size([1])], True),
        (len, True),
        (_Box(torch.ones(2)), True),
        (_Box(torch.ones(2, requires_grad=True)), False),
        (_Cache(), False),
    ],
)
def test_which_arguments_a_second_run_may_be_given(argument: Any, possible: bool) -> None:
    assert ShadowCall.possible((argument,), {"b": argument}) is possible


def test_a_compiled_block_compiles_nothing_more() -> None:
    from torch._dynamo.utils import counters

    model = Transformer(2)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    counters.clear()
    graphs = []
    for step in range(4):
        x = model.embedding(batch(step))
        for block in model.blocks:
            call = ShadowCall(block, block._compiled_call_impl, (x,), {})
            x = block(x)
            if step:
                keep = create_storage("keep", block)
                runs: list[ShadowRun] = []
                Trap(
                    [x],
                    lambda gradients, call=call, keep=keep, runs=runs: runs.append(call.run(keep, gradients, CLOCK)),
                )
        model.head(x).square().mean().backward()
        if step:
            assert runs
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] == 1
