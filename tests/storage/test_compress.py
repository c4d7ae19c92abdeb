"""Lossy storages: how large the error is, what is never compressed, what is refused, and nothing left behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import frameworks
import pytest
import torch
import torch.distributed as dist
from support import run_distributed_test
from text_model import GPT, read_text
from torch import Tensor, nn
from torch.nn import functional

import gradckpt_dist
from gradckpt_dist import StorageError
from gradckpt_dist.storage import Storage, StorageContext, create_storage, deferred
from gradckpt_dist.storage.keep import Keep
from gradckpt_dist.storage.ledger import Ledger
from gradckpt_dist.storage.quantiser import Quantised, dequantise
from gradckpt_dist.storage.saved import SMALL_BYTES

LOSSY = ("compress8", "compress6", "compress4")
ROWS, WIDTH = 64, 128
SIZE = ROWS * WIDTH * 4
"""Bytes of a [64, 128] of float32."""


class Function(nn.Module):
    """A block that calls a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def codes_bytes(elements: int, bits: int) -> int:
    """Codes, and 4 bytes for each 128 values, or 6 beside 4 bits; padded to 2,048."""
    padded = -(-elements // 2048) * 2048
    return padded * bits // 8 + padded // 128 * (6 if bits == 4 else 4)


def transformer(depth: int = 2, width: int = 64, dropout: float = 0.1) -> list[nn.Module]:
    torch.manual_seed(0)
    return list(GPT(vocabulary=5, context=64, width=width, layers=depth, heads=4, dropout=dropout).blocks)


def storages(name: str, blocks: Sequence[nn.Module]) -> list[Storage]:
    context = StorageContext()
    return [create_storage(name, block, context) for block in blocks]


def run(storages: Sequence[Storage], x: Tensor) -> Tensor:
    for storage in storages:
        x = storage.run(storage.block, x)
    return x


def gradients(storages: Sequence[Storage], x: Tensor, **options: Any) -> list[Tensor]:
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    parameters = [parameter for storage in storages for parameter in storage.block.parameters()]
    return list(torch.autograd.grad(run(storages, x).float().square().mean(), [x, *parameters], **options))


def relative_error(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    difference = sum((one.double() - other.double()).square().sum() for one, other in zip(ones, others, strict=True))
    return float((difference / sum(other.double().square().sum() for other in others)) ** 0.5)


def held(function: Callable[..., Any], *args: Any, name: str = "compress8", block: nn.Module | None = None) -> int:
    """Bytes that a block of this function holds after its forward."""
    block = block or Function(function)
    storage = create_storage(name, block)
    output = storage.run(block, *args)
    result = storage.held_bytes
    del output
    assert storage.held_bytes == 0
    return result


def leaf(*shape: int) -> Tensor:
    return torch.randn(*(shape or (ROWS, WIDTH)), requires_grad=True)


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
    exact_bytes = _ledger_bytes(keep, x)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for name, bound, share in (("compress8", 0.01, 0.28), ("compress6", 0.04, 0.22), ("compress4", 0.12, 0.19)):
        (storage,) = storages(name, [block])
        assert 0 < relative_error(gradients([storage], x), reference) <= bound
        assert _ledger_bytes(storage, x) <= share * exact_bytes
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


# -- how much is held -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "fraction"), [("compress8", 0.18), ("compress6", 0.14), ("compress4", 0.12)])
def test_held_bytes_of_a_block(name: str, fraction: float) -> None:
    (block,) = transformer(1, width=256)
    x = torch.randn(8, 128, 256)
    kept = _ledger_bytes(Keep(block), x)
    assert 0 < _ledger_bytes(create_storage(name, block), x) <= fraction * kept


def test_a_storage_is_held_once_and_counted_exactly() -> None:
    x = leaf()
    for name, bits in (("compress8", 8), ("compress6", 6), ("compress4", 4)):
        one = codes_bytes(ROWS * WIDTH, bits)
        assert held(lambda x: x.exp(), x, name=name) == one
        assert held(lambda x: (x * x.flip(0)) + x.t().square().t() + x[3:].sin().sum(), x, name=name) == 2 * one


def test_queries_keys_and_values_have_eight_bits() -> None:
    x = leaf(2, 4, 64, 32)

    def attend(x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x.sin(), x.cos(), x.tanh(), is_causal=True).exp()

    inner = 2 * 4 * 64 * 32
    # Saved: x, its tanh (also the value), sine and cosine, the attention's result and its exponential.
    statistics = 2 * 4 * 64 * 4
    expected = 3 * codes_bytes(inner, 8) + 3 * codes_bytes(inner, 4) + statistics
    assert expected <= held(attend, x, name="compress4") <= expected + 64  # with a random state


def _ledger_bytes(storage: Storage, x: Tensor) -> int:
    ledger = Ledger(1)
    ledger.begin_forward()
    try:
        output = ledger.run(0, storage, storage.block, (x.detach().requires_grad_(),), {})
    finally:
        ledger.end_forward()
    measured = ledger.measurement()
    assert measured.stored_bytes[0] == ledger.live_bytes
    output.sum().backward()
    storage.block.zero_grad()
    del output
    assert ledger.live_bytes == 0
    return measured.stored_bytes[0]


# -- what passes through ----------------------------------------------------------------------------------------------


class Weights(nn.Module):
    """Multiplies by a weight, a buffer, a cast of the weight, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(ROWS, WIDTH))
        self.register_buffer("table", torch.randn(ROWS, WIDTH))


def test_parameters_and_buffers_stay() -> None:
    class Block(Weights):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + x * self.table

    assert held(lambda: None, leaf(), block=Block()) == codes_bytes(ROWS * WIDTH, 8) + SIZE  # x, and the table


def test_what_is_made_of_weights_alone_stays() -> None:
    class Block(Weights):
        def forward(self, x: Tensor) -> Tensor:
            return (x.sin() * (self.weight.t() * 2).to(torch.float16).t()).sum()

    block, x = Block(), leaf()
    # Sine's input x, the sine, and the half-precision weight.
    assert held(lambda: None, x, block=block) == 2 * codes_bytes(ROWS * WIDTH, 8) + SIZE // 2


def test_a_weight_in_the_cache_of_autocast_stays() -> None:
    block = nn.Linear(WIDTH, WIDTH, bias=False)
    x = leaf() * 1  # what autocast makes of a leaf would be in its cache too
    first, second = storages("compress8", [block, block])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [first.run(block, x), second.run(block, x)]
    # Once the block has seen the cast, once it has found it in the cache: in both cases the weight's cast is as it is.
    groups = ROWS * WIDTH // 128
    for storage in (first, second):
        assert storage.held_bytes == ROWS * WIDTH + groups * 4 + WIDTH * WIDTH * 2
    del outputs


def test_inputs_without_gradient_and_what_is_made_of_them_stay() -> None:
    mask, x = torch.randn(ROWS, WIDTH), leaf()
    expected = codes_bytes(ROWS * WIDTH, 8) + 2 * SIZE
    assert held(lambda x, mask: x.sin() * mask + x * (mask + 1).exp(), x, mask) == expected
    block = Function(lambda x, *, mask: x * mask)
    storage = create_storage("compress8", block)
    output = storage.run(block, x, mask=mask)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(gradient, mask)


def test_indices_and_masks_stay() -> None:
    x = leaf()
    index = torch.randint(ROWS, (ROWS, WIDTH))
    # Gathering saves its input too, for its shape.
    assert held(lambda x: x.gather(0, index), x) == ROWS * WIDTH * 8 + codes_bytes(ROWS * WIDTH, 8)
    assert held(lambda x: torch.where(x > 0, x, 0.0), x) == ROWS * WIDTH  # a bool mask


def test_statistics_stay() -> None:
    # Means and deviations are as large as the small limit demands, and exact; the input is codes.
    rows = SMALL_BYTES // 4
    norm = nn.LayerNorm(64, elementwise_affine=False)
    x = leaf(rows, 64)
    assert held(norm, x) == codes_bytes(rows * 64, 8) + 2 * rows * 4


def test_small_and_expanded_tensors_stay() -> None:
    assert held(torch.exp, leaf(SMALL_BYTES // 4 - 1)) == SMALL_BYTES - 4
    assert held(torch.exp, leaf(SMALL_BYTES // 4)) == codes_bytes(SMALL_BYTES // 4, 8)
    x, row = leaf(), leaf(1, 2 * SMALL_BYTES)
    assert held(lambda x, row: (row.expand(4, -1) * row.detach().expand(4, -1) * 2).sum(), x, row) >= SMALL_BYTES


def test_double_precision_stays() -> None:
    assert held(torch.exp, torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)) == 2 * SIZE


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_stays(name: str, bad: float) -> None:
    x = torch.rand(ROWS, WIDTH)
    x[3, 4] = bad
    x.requires_grad_()
    assert held(torch.square, x, name=name) == SIZE
    block = Function(torch.square)
    (gradient,) = torch.autograd.grad(create_storage(name, block).run(block, x).sum(), x)
    assert torch.equal(gradient.nan_to_num(), (2 * x.detach()).nan_to_num())
    assert not gradient[3, 4].isfinite()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSY)
def test_double_backward_is_refused(name: str) -> None:
    blocks = transformer(1)
    with pytest.raises(StorageError, match=r"create_graph=True\).*use an exact storage"):
        gradients(storages(name, blocks), torch.randn(4, 64, 64), create_graph=True)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func.jvp's own
def test_functional_transforms_are_refused(name: str, transform: str) -> None:
    block = nn.Linear(WIDTH, WIDTH)
    storage = create_storage(name, block)
    x = torch.randn(ROWS, WIDTH)

    def call(x: Tensor) -> Tensor:
        return storage.run(block, x).sum()

    with pytest.raises(StorageError, match=r"torch\.func transforms.*use another storage"):
        if transform == "grad":
            torch.func.grad(call)(x)
        elif transform == "vmap":
            torch.func.vmap(call)(x)
        else:
            torch.func.jvp(call, (x,), (x,))


@pytest.mark.parametrize("name", LOSSY)
def test_a_change_after_saving_is_an_error(name: str) -> None:
    block = Function(lambda x: x.exp())
    for shape in ((ROWS, WIDTH), (4,)):
        storage = create_storage(name, block)
        output = storage.run(block, leaf(*shape))
        output.add_(1)
        with pytest.raises(
            RuntimeError, match=r"modified by an inplace operation.*is at version 1, expected version 0"
        ):
            output.sum().backward()


@pytest.mark.parametrize("name", LOSSY)
def test_a_change_inside_the_block_is_an_error(name: str) -> None:
    block = Function(lambda x: x.exp().add_(1))
    storage = create_storage(name, block)
    output = storage.run(block, leaf())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_storage_changed_between_two_saves_is_held_twice() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 1
        z = y.detach()
        first = x * z
        z.add_(1)
        return first.detach() + x * z

    x = leaf()
    block = Function(function)
    storage = create_storage("compress8", block)
    (gradient,) = torch.autograd.grad(storage.run(block, x).sum(), x)
    assert (gradient - x.detach() - 1).abs().max() < 0.02


# -- nothing stays ----------------------------------------------------------------------------------------------------


def _live_bytes() -> int:
    gc.collect()
    tensors = {
        thing.untyped_storage()._cdata: thing.untyped_storage().nbytes()
        for thing in gc.get_objects()
        if type(thing) in (Tensor, nn.Parameter)
    }
    return sum(tensors.values())


@pytest.mark.parametrize("name", LOSSY)
def test_nothing_stays_after_forward_alone_or_backward(name: str) -> None:
    blocks = transformer()
    kinds = storages(name, blocks)
    x = torch.randn(4, 64, 64, requires_grad=True)
    output = run(kinds, x)
    del output
    before = _live_bytes()
    output = run(kinds, x)
    assert sum(storage.held_bytes for storage in kinds) > 0
    del output
    assert [storage.held_bytes for storage in kinds] == [0, 0]
    assert _live_bytes() == before
    torch.autograd.grad(run(kinds, x).sum(), x)
    assert [storage.held_bytes for storage in kinds] == [0, 0]
    assert _live_bytes() == before


@pytest.mark.parametrize("name", LOSSY)
def test_an_output_that_is_saved_does_not_keep_itself_alive(name: str) -> None:
    block = Function(lambda x: (x[:4, :4].exp(), x.exp()))
    storage = create_storage(name, block)
    gc.disable()
    try:
        outputs = storage.run(block, leaf())
        assert storage.held_bytes > 0
        del outputs
        assert storage.held_bytes == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("name", LOSSY)
def test_nothing_stays_after_an_exception(name: str) -> None:
    def fail(x: Tensor) -> Tensor:
        x = x.exp().sigmoid()
        raise ValueError(f"shape {tuple(x.shape)}")

    block = Function(fail)
    storage = create_storage(name, block)
    with pytest.raises(ValueError, match="shape"):
        storage.run(block, leaf())
    gc.collect()
    assert storage.held_bytes == 0


def test_what_is_freed_during_forward_is_not_kept_until_its_end() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        torch.autograd.grad(x.exp().sum(), x)  # saves, restores and frees
        seen.append(storage.held_bytes)
        return x * 2

    block = Function(function)
    storage = create_storage("compress8", block)
    with torch.no_grad():
        x = leaf()
    with torch.enable_grad():
        try:
            storage.run(block, x)
        finally:
            assert seen == [0]


def test_what_the_forward_is_done_with_is_coded_before_its_end() -> None:
    seen = []

    def function(x: Tensor, kept: list[Tensor]) -> Tensor:
        for _ in range(3):
            x = x.exp()
            kept.append(x)
            x = -x
            seen.append(storage.held_bytes)
        return x

    class Forgetful(list[Tensor]):
        def append(self, item: Tensor) -> None: ...

    block = Function(function)
    storage = create_storage("compress8", block)
    coded = codes_bytes(ROWS * WIDTH, 8)
    storage.run(block, leaf(), Forgetful())
    assert seen == [SIZE, SIZE + coded, SIZE + 2 * coded]
    # What is still in use waits for the end.
    seen.clear()
    kept: list[Tensor] = []
    output = storage.run(block, leaf(), kept)
    assert seen == [SIZE, 2 * SIZE, 3 * SIZE]
    assert storage.held_bytes == 3 * coded
    assert len(kept) == 3
    assert output.requires_grad


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of all that is made from codes."""
    shapes = []

    def noting(quantised: Quantised) -> Tensor:
        shapes.append(quantised.shape)
        return dequantise(quantised)

    monkeypatch.setattr(deferred, "dequantise", noting)
    return shapes


def test_what_several_nodes_have_saved_is_decoded_once(decoded: list[torch.Size]) -> None:
    weights = [torch.randn(WIDTH, WIDTH, requires_grad=True) for _ in range(3)]

    def function(x: Tensor) -> Tensor:
        x = x.exp()
        return torch.stack([functional.linear(x, weight) for weight in weights])

    block = Function(function)
    create_storage("compress8", block).run(block, leaf()).sum().backward()
    assert len(decoded) == 1


def test_a_block_may_hold_what_later_ones_have_let_go_of(decoded: list[torch.Size]) -> None:
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(8)]
    kinds = storages("compress8", blocks)
    run(kinds, leaf()).sum().backward()
    # Each decodes its input once; what GELU was given once, or twice where there is no room until GELU asks for it.
    without_room = -(-SIZE // (2 * codes_bytes(ROWS * WIDTH, 8)))
    assert without_room == 2
    assert len(decoded) == 2 * len(blocks) + without_room
    assert kinds[0].account.slack.held_bytes == 0


@pytest.mark.parametrize("name", LOSSY)
def test_a_retained_graph_can_be_used_again(name: str) -> None:
    kinds = storages(name, transformer())
    x = torch.randn(4, 64, 64, requires_grad=True)
    loss = run(kinds, x).square().mean()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    del loss
    assert [storage.held_bytes for storage in kinds] == [0, 0]


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
