"""Lossy storages: how much is held, and what is never compressed."""

from __future__ import annotations

import pytest
import torch
from compress_support import LOSSY, ROWS, SIZE, WIDTH, codes_bytes, held, leaf, ledger_bytes, transformer
from models import Function
from storage_support import storages
from torch import Tensor, nn
from torch.nn import functional

from gradckpt_dist.storage import create_storage
from gradckpt_dist.storage.keep import Keep
from gradckpt_dist.storage.saved import SMALL_BYTES

# -- how much is held -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "fraction"), [("compress8", 0.18), ("compress6", 0.14), ("compress4", 0.12)])
def test_held_bytes_of_a_block(name: str, fraction: float) -> None:
    (block,) = transformer(1, width=256)
    x = torch.randn(8, 128, 256)
    kept = ledger_bytes(Keep(block), x)
    assert 0 < ledger_bytes(create_storage(name, block), x) <= fraction * kept


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
