"""The quantiser as operators: the same values as it gives, and what torch.compile asks of an operator."""

from __future__ import annotations

import pytest
import torch

from gradckpt_dist.storage.code_operators import DEQUANTISE, QUANTISE, seeds_from
from gradckpt_dist.storage.noise import NoiseSource
from gradckpt_dist.storage.quantiser import dequantise, quantise

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("shape", [(7,), (3, 2048), (5, 1000)])
def test_values_are_those_of_the_quantiser(bits: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    quantised = quantise(x, bits, NoiseSource(3))
    assert quantised is not None
    with seeds_from(NoiseSource(3)):
        parts = QUANTISE(x, bits)
    assert all(part.dim() == 1 for part in parts)
    assert sum(part.nbytes for part in parts) == quantised.size_bytes
    assert torch.equal(DEQUANTISE(parts, bits, x.numel(), dtype).view(shape), dequantise(quantised))


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_fakes_have_the_shapes_of_what_they_stand_for(bits: int) -> None:
    x = torch.randn(5, 1000)
    with seeds_from(NoiseSource()):
        parts = QUANTISE(x, bits)
        tests = ("test_schema", "test_faketensor") if bits != 4 else ("test_faketensor",)
        found = [torch.library.opcheck(QUANTISE, (x, bits), test_utils=tests)]
    both = ("test_schema", "test_faketensor")
    found.append(torch.library.opcheck(DEQUANTISE, (parts, bits, 5000, torch.float32), test_utils=both))
    assert {outcome for results in found for outcome in results.values()} == {"SUCCESS"}


def test_seeds_come_from_the_innermost_source() -> None:
    x = torch.randn(2, 2048)
    outer, inner = NoiseSource(1), NoiseSource(2)
    with seeds_from(outer):
        with seeds_from(inner):
            QUANTISE(x, 4)
        QUANTISE(x, 4)
        QUANTISE(x, 8)
    assert (outer.draws, inner.draws) == (1, 1)
