"""The quantiser as two operators of compiled graphs: ``gradckpt::quantise`` and ``gradckpt::dequantise``.

Inductor calls them where they stand in a graph and compiles nothing of theirs into its own loops: the quantiser's are
compiled with options of their own. Parts of codes come flat, so that a graph need not know how a kernel lays them out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from gradckpt_dist.storage import kernels
from gradckpt_dist.storage.noise import NoiseSource
from gradckpt_dist.storage.quantiser import chunked, pack, plain_torch, unpack

_noise: ContextVar[NoiseSource] = ContextVar("gradckpt_noise")
_WORD_PARTS = {8: 1, 6: 3, 4: 1}


@contextmanager
def seeds_from(noise: NoiseSource) -> Iterator[None]:
    """Graphs that run inside take the seeds of stochastic rounding from ``noise``."""
    token = _noise.set(noise)
    try:
        yield
    finally:
        _noise.reset(token)


def _quantise(x: Tensor, bits: int) -> list[Tensor]:
    with plain_torch():
        packed = pack(x, bits, _noise.get())
        words, grid = packed[: _WORD_PARTS[bits]], packed[_WORD_PARTS[bits] :]
        # Lanes are innermost in memory, as a rule, and this no copy.
        return [*(part.transpose(1, 2).reshape(-1) for part in words), *(part.reshape(-1) for part in grid)]


def _quantise_shapes(x: Tensor, bits: int) -> list[Tensor]:
    seed = [x.new_empty(1, dtype=torch.int32)] if bits == 4 else []
    packed = getattr(kernels, f"quantise{bits}")(chunked(x), *seed)
    return [x.new_empty(part.numel(), dtype=part.dtype) for part in packed]


def _dequantise(parts: Sequence[Tensor], bits: int, numel: int, dtype: torch.dtype) -> Tensor:
    with plain_torch():
        words, grid = parts[: _WORD_PARTS[bits]], [part.view(-1, kernels.LANES) for part in parts[_WORD_PARTS[bits] :]]
        laid_out = [part.view(len(grid[0]), -1, kernels.LANES).transpose(1, 2) for part in words]
        return unpack((*laid_out, *grid), bits, torch.Size([numel]))


def _dequantise_shapes(parts: Sequence[Tensor], bits: int, numel: int, dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty(numel, dtype=dtype)


_LIBRARY: Any = torch.library.Library("gradckpt", "DEF")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.cudagraph_unsafe, torch.Tag.pt2_compliant_tag)  # a recorded graph would repeat one seed
_LIBRARY.define("quantise(Tensor x, int bits) -> Tensor[]", tags=_TAGS)
_LIBRARY.define("dequantise(Tensor[] parts, int bits, int numel, ScalarType dtype) -> Tensor", tags=_TAGS)
_LIBRARY.impl("quantise", _quantise, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantise", _dequantise, "CompositeExplicitAutograd")
torch.library.register_fake("gradckpt::quantise", _quantise_shapes, lib=_LIBRARY)
torch.library.register_fake("gradckpt::dequantise", _dequantise_shapes, lib=_LIBRARY)

QUANTISE = torch.ops.gradckpt.quantise.default
DEQUANTISE = torch.ops.gradckpt.dequantise.default
