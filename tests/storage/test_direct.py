"""Kernels called directly: as the eager function, only where that has been seen, and guarded where it must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradckpt_dist.storage import kernels
from gradckpt_dist.storage.direct import DirectKernel
from gradckpt_dist.storage.kernels import GROUP, LANES

SIZES = (2, 3, 100)


def chunks(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, GROUP, LANES, generator=torch.Generator().manual_seed(size)).to(dtype)


def kernel(function: Any = kernels.quantise8) -> DirectKernel:
    torch._dynamo.reset()
    return DirectKernel(function, kernels.CPU_OPTIONS)


def assert_same(ones: Any, others: Any) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_size_is_as_eager(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    quantise = kernel()
    with torch.no_grad():
        assert_same(quantise(chunks(2, dtype)), kernels.quantise8(chunks(2, dtype)))
        monkeypatch.setattr(quantise, "_compiled", None)  # from now on it is not asked
        for size in SIZES:
            assert_same(quantise(chunks(size, dtype)), kernels.quantise8(chunks(size, dtype)))


def test_misaligned_tensors_go_through_the_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    quantise = kernel()
    x = chunks(3)
    misaligned = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    assert misaligned.data_ptr() % 64
    with torch.no_grad():
        quantise(chunks(2))
        inner = quantise._inner
        monkeypatch.setattr(quantise, "_call_inner", None)
        assert_same(quantise(misaligned), kernels.quantise8(x))
        monkeypatch.undo()
        assert quantise._inner is inner
        assert_same(quantise(x), kernels.quantise8(x))


def test_what_guards_compile_anew_does_not_replace_what_has_been_seen_to_agree() -> None:
    quantise = kernel()
    with torch.no_grad():
        quantise(chunks(2))
        inner = quantise._inner
        quantise._compiled(chunks(2).double())
        assert quantise._inner is inner


def test_code_that_disagrees_is_never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def wrong(self: DirectKernel, tensors: Any) -> Any:
        asked.append(len(tensors))
        return tuple(torch.zeros_like(result) for result in kernels.quantise8(*tensors))

    monkeypatch.setattr(DirectKernel, "_call_inner", wrong)
    quantise = kernel()
    with torch.no_grad():
        for size in SIZES:
            assert_same(quantise(chunks(size)), kernels.quantise8(chunks(size)))
    assert asked == [1]  # for the comparison alone
