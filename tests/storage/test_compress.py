"""Lossy storages: how large the error is."""

from __future__ import annotations

from collections.abc import Callable

import frameworks
import pytest
import torch
import torch.distributed as dist
from compress_support import LOSSY, ROWS, WIDTH, leaf, ledger_bytes, transformer
from models import Function
from storage_support import gradients, relative_error, run, storages
from support import run_distributed_test
from text_model import GPT, read_text
from torch import Tensor, nn
from torch.nn import functional

import gradckpt_dist
from gradckpt_dist.storage import Storage, create_storage
from gradckpt_dist.storage.keep import Keep
from gradckpt_dist.storage.ledger import Ledger

# -- how large the error is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bound"), [("compress8", 0.01), ("compress6", 0.04), ("compress4", 0.12)])
def test_error_of_each_block_of_the_demo_model_at_initialisation(name: str, bound: float) -> None:
    text = read_text(None)
    torch.manual_seed(0)
    model = GPT(vocabulary=text.vocabulary, context=64, width=96, layers=6, heads=4, dropout=0.1)
    windows = text.sample(8, 64, torch.Generator().manual_seed(0))

    def gradients_of(lossy: int | None) -> list[list[Tensor]]:
        kinds = [create_storage(name if index == lossy else "keep", block) for index, block in enumerate(model.blocks)]
        torch.manual_seed(1)
        x = run(kinds, model.dropout(model.tokens(windows[:, :-1]) + model.positions(torch.arange(64))))
        loss = functional.cross_entropy(model.head(model.norm(x).flatten(0, 1)), windows[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        return [[parameter.grad for parameter in block.parameters()] for block in model.blocks]

    exact = gradients_of(None)
    for index in range(len(model.blocks)):
        assert 0 < relative_error(gradients_of(index)[index], exact[index]) <= bound


@pytest.mark.parametrize(("name", "bound"), [("compress8", 0.01), ("compress6", 0.04), ("compress4", 0.13)])
def test_autocast(name: str, bound: float) -> None:
    blocks = transformer()
    x = torch.randn(4, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        reference = gradients([Keep(block) for block in blocks], x)
        assert 0 < relative_error(gradients(storages(name, blocks), x), reference) <= bound


@pytest.mark.parametrize("wrap", ["compile()", "torch.compile"])
def test_compiled_blocks(wrap: str) -> None:
    torch._dynamo.reset()
    (block,) = transformer(1, dropout=0.0)
    if wrap == "compile()":
        block.compile()
    else:
        block = torch.compile(block)
    x = torch.randn(4, 64, 64)
    keep = Keep(block)
    reference = gradients([keep], x)
    exact_bytes = ledger_bytes(keep, x)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for name, bound, share in (("compress8", 0.01, 0.28), ("compress6", 0.04, 0.22), ("compress4", 0.12, 0.19)):
        (storage,) = storages(name, [block])
        assert 0 < relative_error(gradients([storage], x), reference) <= bound
        assert ledger_bytes(storage, x) <= share * exact_bytes
    first = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for name in LOSSY:
        gradients(storages(name, [block]), x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == first >= graphs


def test_four_bits_are_unbiased_where_the_operation_is_linear() -> None:
    block = nn.Linear(WIDTH, WIDTH)
    (storage,) = storages("compress4", [block])
    x = leaf()

    def weight_gradient(one: Storage) -> Tensor:
        return torch.autograd.grad(one.run(block, x), block.weight, torch.ones(ROWS, WIDTH))[0].double()

    exact = weight_gradient(Keep(block))
    draws = torch.stack([weight_gradient(storage) for _ in range(256)])
    error = {n: (draws[:n].mean(0) - exact).norm().item() for n in (1, 16, 256)}
    assert error[16] == pytest.approx(error[1] / 4, rel=0.3)
    assert error[256] == pytest.approx(error[1] / 16, rel=0.3)


@pytest.mark.parametrize("name", LOSSY)
def test_the_random_stream_is_untouched(name: str) -> None:
    blocks = transformer()
    states = []
    for kind in ("keep", name):
        gradients(storages(kind, blocks), torch.ones(4, 64, 64))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_the_outputs_are_exact() -> None:
    blocks = transformer()
    x = torch.randn(4, 64, 64, requires_grad=True)
    outputs = []
    for name in ("keep", *LOSSY):
        torch.manual_seed(1)
        outputs.append(run(storages(name, blocks), x))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.chunk(4, dim=-1)[1].exp(),
        lambda x: x.t().exp().sigmoid(),
        lambda x: x[3:, 1::2].exp() * x[3:, ::2],
        lambda x: (x * 1).view(128, 64)[5].exp() * x[0, 0],
        lambda x: x.to(torch.bfloat16).exp().float() * x,
        lambda x: torch.view_as_complex(x.unflatten(-1, (-1, 2))).conj().exp().abs(),
    ],
)
def test_views_come_back(function: Callable[[Tensor], Tensor], name: str) -> None:
    block = Function(function)
    x = torch.rand(ROWS, WIDTH)
    reference = gradients([Keep(block)], x)
    (storage,) = storages(name, [block])
    assert (
        relative_error(gradients([storage], x), reference)
        <= {"compress8": 0.01, "compress6": 0.04, "compress4": 0.1}[name]
    )
    assert storage.held_bytes == 0


# -- frameworks -------------------------------------------------------------------------------------------------------


def _compare_gradients(framework: str) -> None:
    found = {}
    for name in ("keep", *LOSSY):
        torch.manual_seed(0)
        wrapped = frameworks.wrap(frameworks.Model(), framework)
        engine = gradckpt_dist.enable(
            wrapped, {"storages": ["keep", "recompute", *LOSSY], "gradient_tolerance": 0.5, "log_level": "warning"}
        )
        engine.set_mask([name] * len(engine.mask.storages))
        torch.manual_seed(dist.get_rank())
        x = torch.randn(256, frameworks.WIDTH)
        wrapped(x).square().mean().backward()
        found[name] = [frameworks.local(p.grad).clone() for p in wrapped.parameters() if p.grad is not None]
        engine.disable()
    for name, bound in (("compress8", 0.01), ("compress4", 0.15)):
        error = relative_error(found[name], found["keep"])
        assert 0 < error <= bound, (name, error)


def _hold_no_parameters() -> None:
    torch.manual_seed(0)
    wrapped = frameworks.wrap(frameworks.Model(), "fsdp2")
    ledgers = {}
    for name in ("keep", "compress8"):
        block = wrapped.blocks[0]
        storage = create_storage(name, block)
        ledger = Ledger(1)
        ledger.begin_forward()
        output = ledger.run(0, storage, block, (torch.randn(4096, frameworks.WIDTH, requires_grad=True),), {})
        ledger.end_forward()
        ledgers[name] = ledger.measurement()
        del output
    # A weight of 32 x 128 is 16 KiB: two of them, compressed or counted, would show.
    assert ledgers["compress8"].stored_bytes[0] <= 0.28 * ledgers["keep"].stored_bytes[0]
    assert ledgers["compress8"].keep_bytes == ledgers["keep"].keep_bytes


def _check_frameworks() -> None:
    for framework in ("ddp", "fsdp1", "fsdp1_flat", "fsdp2"):
        _compare_gradients(framework)
    _hold_no_parameters()


@pytest.mark.slow
def test_two_ranks_of_each_framework() -> None:
    run_distributed_test(_check_frameworks, 2)
