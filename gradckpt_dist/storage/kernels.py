"""The quantiser's arithmetic on [groups, 128], written once: plain operations that torch.compile fuses.

A group's origin is its minimum, in the input's dtype: one of its values, hence exact. Its scale is rounded up to what
a bfloat16 holds, so that the largest value still has a code; beside float16, which code generation for the CPU does not
mix with bfloat16, it is kept as a float32. What is not finite, or spans more than half of what a float32 can hold,
makes the origin of its group NaN, and so the whole group when it comes back.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128
_HALF = GROUP // 2
_SMALLEST_SCALE = 2.0**-126
"""The smallest normal number, whose inverse is finite: constant groups have it too."""
_WIDEST_RANGE = 1.7e38
_FRACTION_BITS = 16

Packed = tuple[Tensor, Tensor, Tensor]
"""Codes, origins and scales."""


def quantise8(x: Tensor) -> Packed:
    """Round to nearest: codes are uint8 [groups, 128], one each."""
    values = x.float()
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    origin, scale, inverse = _affine(low, high, 255)
    codes = ((values - low) * inverse).round().clamp(max=255).to(torch.uint8)
    return codes, origin.to(x.dtype), scale.to(_scale_dtype(x.dtype))


def dequantise8(codes: Tensor, origin: Tensor, scale: Tensor) -> Tensor:
    """The values of ``quantise8``, [groups, 128] in the dtype of ``origin``."""
    return _value(codes, origin, scale)


def quantise4(x: Tensor, seed: Tensor) -> Packed:
    """Stochastic rounding, unbiased to 2^-17 of a level: codes are uint8 [groups, 64], those of both halves of a group.

    ``seed``: int32 [1]. Each code is rounded by 16 bits of its own.
    """
    first, second = x[:, :_HALF].float(), x[:, _HALF:].float()
    low = torch.minimum(first, second).amin(1, keepdim=True)
    high = torch.maximum(first, second).amax(1, keepdim=True)
    origin, scale, inverse = _affine(low, high, 15)
    inverse = inverse * (1 << _FRACTION_BITS)
    noise = _noise(x, seed)
    codes = _round((first - low) * inverse, noise) | _round((second - low) * inverse, noise >> 16) << 4
    return codes.to(torch.uint8), origin.to(x.dtype), scale.to(_scale_dtype(x.dtype))


def dequantise4(codes: Tensor, origin: Tensor, scale: Tensor) -> Tensor:
    """The values of ``quantise4``, [groups, 128] in the dtype of ``origin``."""
    wide = codes.to(torch.int32)
    return torch.cat([_value(wide & 15, origin, scale), _value(wide >> 4, origin, scale)], 1)


def _affine(low: Tensor, high: Tensor, levels: int) -> Packed:
    """Origin, scale and its inverse, float32 [groups, 1]."""
    span = high - low
    scale = _round_up((span * (1 / levels)).clamp(min=_SMALLEST_SCALE))
    origin = torch.where(span <= _WIDEST_RANGE, low, torch.nan)
    return _once(origin), _once(scale), _once(1 / scale)


def _round_up(x: Tensor) -> Tensor:
    """To the next number that a bfloat16 can hold, for positive float32."""
    return (x.view(torch.int32) + 0xFFFF >> 16 << 16).view(torch.float32)


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else torch.bfloat16


def _once(x: Tensor) -> Tensor:
    """``x``; keeps the compiler from computing it again for each element of its group."""
    return x.as_strided(x.shape, x.stride())


def _round(scaled: Tensor, noise: Tensor) -> Tensor:
    return (scaled.to(torch.int32) + (noise & 0xFFFF) >> _FRACTION_BITS).clamp(max=15)


def _value(codes: Tensor, origin: Tensor, scale: Tensor) -> Tensor:
    value = codes.float() * scale.float() + origin.float()
    return value.clamp(max=torch.finfo(origin.dtype).max).to(origin.dtype)


def _noise(x: Tensor, seed: Tensor) -> Tensor:
    """32 random bits for each pair of values: int32 [groups, 64], Wellons' lowbias32 hash of the pair's number."""
    group = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    pair = torch.arange(_HALF, dtype=torch.int32, device=x.device)
    bits = (group[:, None] * _HALF + pair) ^ seed
    bits = (bits ^ (bits >> 16 & 0xFFFF)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15 & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return bits ^ (bits >> 16 & 0xFFFF)
