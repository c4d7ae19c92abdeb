"""Codes made and read on a GPU are those of the CPU, but for rounding ties."""

from __future__ import annotations

import pytest
import torch

from gradckpt_dist.storage import kernels
from gradckpt_dist.storage.kernels import CHUNK
from gradckpt_dist.storage.noise import NoiseSource
from gradckpt_dist.storage.quantiser import DTYPES, Quantised, dequantise, quantise

SIZES = (2 * CHUNK, 100 * CHUNK + 17)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size_is_as_on_the_cpu(dtype: torch.dtype, bits: int) -> None:
    for size in SIZES:
        x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        ours, theirs = (quantise(one, bits, NoiseSource()) for one in (x.cuda(), x))
        assert ours is not None
        assert theirs is not None
        differ = dequantise(ours).cpu() != dequantise(theirs)
        assert differ.float().mean() < 1e-3
        assert torch.equal(ours.packed[-1].cpu(), theirs.packed[-1])  # the scales


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_come_back_as_on_the_cpu(dtype: torch.dtype, bits: int) -> None:
    quantised = quantise(torch.randn(50 * CHUNK, device="cuda").to(dtype), bits, NoiseSource())
    assert quantised is not None
    there = Quantised(packed=tuple(part.cpu() for part in quantised.packed), bits=bits, shape=quantised.shape)
    differ = dequantise(quantised).cpu() != dequantise(there)
    assert differ.float().mean() < 1e-3  # by a last bit, where one of them multiplies and adds at once


def test_what_is_not_finite_comes_back_as_nan() -> None:
    x = torch.randn(4 * CHUNK, device="cuda")
    x[5] = torch.inf
    quantised = quantise(x, 8, NoiseSource())
    assert quantised is not None
    back = dequantise(quantised)
    group = back.view(-1, kernels.GROUP, kernels.LANES)[0, :, 5]
    assert group.isnan().all()
    assert back.isnan().sum() == kernels.GROUP
