"""The quantiser's arithmetic, written once: plain operations that torch.compile fuses.

A tensor comes as [chunks, 128, 16], and the 128 values of a group lie 16 apart: code for a CPU then works on 16 groups
at once, with nothing to add up across a vector. A group's origin is its minimum, in the input's dtype: one of its
values, hence exact. Its scale is rounded up to what a bfloat16 holds, so that the largest value still has a code.
Beside float16, which code generation for the CPU does not mix with bfloat16, it is kept as a float32. What is not
finite, or spans more than half of what a float32 can hold, makes the origin of its group NaN, and with it the whole
group when it comes back.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128
LANES = 16
CHUNK = GROUP * LANES
_HALF = GROUP // 2
_SMALLEST_SCALE = 2.0**-126
"""The smallest normal number, whose inverse is finite: constant groups have it too."""
_WIDEST_SPAN = 1.7e38
_LARGEST = 3.3e38
_UNIT = 2.0**-32 * (1 - 2.0**-18)
"""What makes int32 noise of at most half a level, and not so much that 15 would become 16."""

Packed = tuple[Tensor, Tensor, Tensor]
"""Codes, origins and scales."""


def quantise8(x: Tensor) -> Packed:
    """Round to nearest: codes are uint8 [chunks, 128, 16], one each."""
    values = x.float()
    low, high = _extremes(values)
    origin, scale, inverse = _affine(low, high, 255)
    codes = ((values - low) * inverse).round().to(torch.uint8)
    return codes, origin.to(x.dtype), scale.to(_scale_dtype(x.dtype))


def dequantise8(codes: Tensor, origin: Tensor, scale: Tensor) -> Tensor:
    """The values of ``quantise8``, [chunks, 128, 16] in the dtype of ``origin``."""
    return _value(codes, origin, scale)


def quantise4(x: Tensor, seed: Tensor) -> Packed:
    """Stochastic rounding, unbiased to 2^-18 of a level, by noise from ``seed`` (int32 [1]).

    Codes are uint8 [chunks, 64, 16]: those of the first halves of the groups, and in the upper bits of the second ones.
    """
    values = x.float()
    low, high = _extremes(values)
    origin, scale, inverse = _affine(low, high, 15)
    first, second = (
        ((half - low) * inverse + noise).to(torch.int32)
        for half, noise in zip(values.chunk(2, 1), _noise(x, seed), strict=True)
    )
    return (first + second * 16).to(torch.uint8), origin.to(x.dtype), scale.to(_scale_dtype(x.dtype))


def dequantise4(codes: Tensor, origin: Tensor, scale: Tensor) -> Tensor:
    """The values of ``quantise4``, [chunks, 128, 16] in the dtype of ``origin``."""
    wide = codes.to(torch.int32)
    return torch.cat([_value(wide & 15, origin, scale), _value(wide >> 4, origin, scale)], 1)


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each group, [chunks, 1, 16].

    By quarters first: one long chain of minima would wait for each of them in turn.
    """
    one, two, three, four = values.chunk(4, 1)
    low = torch.minimum(torch.minimum(one, two), torch.minimum(three, four))
    high = torch.maximum(torch.maximum(one, two), torch.maximum(three, four))
    return low.amin(1, keepdim=True), high.amax(1, keepdim=True)


def _affine(low: Tensor, high: Tensor, levels: int) -> Packed:
    """Origin, scale and its inverse, float32 [chunks, 1, 16]."""
    span = high - low
    scale = _rounded_up((span * (1 / levels)).clamp(min=_SMALLEST_SCALE))
    origin = torch.where((span <= _WIDEST_SPAN) & (high <= _LARGEST), low, torch.nan)
    return _once(origin), _once(scale), _once(1 / scale)


def _rounded_up(x: Tensor) -> Tensor:
    """The next number that a bfloat16 can hold, for positive float32."""
    return (x.view(torch.int32) + 0xFFFF >> 16 << 16).view(torch.float32)


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else torch.bfloat16


def _once(x: Tensor) -> Tensor:
    """``x``; keeps the compiler from computing it again for each element of its group."""
    return x.as_strided(x.shape, x.stride())


def _value(codes: Tensor, origin: Tensor, scale: Tensor) -> Tensor:
    value = codes.float() * scale.float() + origin.float()
    if origin.dtype == torch.float16:
        value = value.clamp(max=torch.finfo(torch.float16).max)
    return value.to(origin.dtype)


def _noise(x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform in (0, 1) for both halves of the groups, float32 [chunks, 64, 16] each.

    Each group starts from a well mixed number, which differs between draws; each of its rows then changes bits of that
    and multiplies, whose upper bits are what counts.
    """
    lanes = torch.arange(x.shape[0] * LANES, dtype=torch.int32, device=x.device).view(-1, 1, LANES)
    rows = torch.arange(_HALF, dtype=torch.int32, device=x.device).view(_HALF, 1)
    bits = _once(_hash(lanes ^ seed)) ^ _once(_hash(rows + 1))
    first, second = (bits * _signed(multiplier) for multiplier in (0x9E3779B1, 0x85EBCA6B))
    return first.float() * _UNIT + 0.5, second.float() * _UNIT + 0.5


def _hash(x: Tensor) -> Tensor:
    """lowbias32 (Wellons, "Hash function prospector"), on int32."""
    x = (x ^ (x >> 16 & 0xFFFF)) * _signed(0x7FEB352D)
    x = (x ^ (x >> 15 & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ (x >> 16 & 0xFFFF)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
