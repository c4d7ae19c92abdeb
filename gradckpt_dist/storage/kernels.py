"""The quantiser's arithmetic, written once: plain operations that torch.compile fuses.

A tensor comes as [chunks, 128, 16], and the 128 values of a group lie 16 apart: code for a CPU then works on 16 groups
at once, with nothing to add up across a vector. Codes are int32 words of 4 to 8 values of one group, which
takes fewer instructions than single bytes do. A group's scale is rounded up to what a bfloat16 holds, so that the
largest value still has a code. Its origin is its minimum, in the input's dtype: one of its values, hence exact. Beside
float16, which code generation for the CPU does not mix with bfloat16, the scale is kept as a float32.

Of float32 in 8 and 6 bits, the origin is the next whole number of scales below the minimum: one of 16 bits, which
shares an int32 with the scale, and is exact when multiplied by it. That takes one level, of which 4 bits have too few.

What is not finite, or spans more than half of what a float32 can hold, makes the origin of its group NaN, or the scale
in such an int32, and with it the whole group when it comes back.

Quantising works on [chunks, 16, rows]: with ``CPU_OPTIONS`` the compiler keeps loops in this order, so that its loops
for the extremes, the scale and the codes have chunks and lanes in common and become one, whose second read of a chunk
comes from the cache. This takes that none of the three can be iterated as chunks * lanes: see ``_extremes``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GROUP = 128
LANES = 16
CHUNK = GROUP * LANES
OPTIONS: dict[str, Any] = {"pick_loop_orders": False}
"""For torch.compile when it compiles the quantising: keep the loops in order, so that a GPU reads a chunk once, too."""
CPU_OPTIONS: dict[str, Any] = {
    **OPTIONS,
    "cpp.enable_floating_point_contract_flag": "fast",
    "realize_acc_reads_threshold": 32,
    "realize_opcount_threshold": 256,
}
"""On a CPU, keep a word's codes in one loop, too, and multiply and add at once, which rounds once less."""
_SMALLEST_SCALE = 2.0**-126
"""The smallest normal number, whose inverse is finite: constant groups have it too."""
_MOST_STEPS = 32767
"""From 0 to an origin that is held as a number of steps."""
_WIDEST_SPAN = 1.7e38
_LARGEST = 3.3e38
_FRACTION_BITS = 27
"""Of a 4-bit code before its noise is added and its fraction cut off."""
_NOISE = (1 << _FRACTION_BITS) - (1 << 9)
"""The bits of a hash that are noise; without the lowest ones, so that 15 and what it is rounded by cannot become 16."""
_MULTIPLIERS = (
    0x9E3779B1,
    0x85EBCA6B,
    0xC2B2AE35,
    0x27D4EB2F,
    0x165667B1,
    0xCC9E2D51,
    0x1B873593,
    0xE6546B65,
)

Packed = tuple[Tensor, ...]
"""Words of codes, then origins and scales."""


def quantise8(x: Tensor) -> Packed:
    """Round to nearest: codes are int32 [chunks, 16, 32] with the lanes innermost in memory, four values a word."""
    values = _in_words(x, 4)
    low, high = _extremes(values)
    origin, inverse, held = _grid(low, high, 255, x.dtype)
    codes = [((value - origin) * inverse + 0.5).to(torch.int32) for value in values]
    return _word(codes, 8), *held


def dequantise8(codes: Tensor, *grid: Tensor) -> Tensor:
    """The values of ``quantise8``, [chunks, 128, 16] in the dtype that they had."""
    return _values(_codes(codes, 8), grid)


def quantise6(x: Tensor) -> Packed:
    """Round to nearest: codes are three int32 [chunks, 16, 8], lanes innermost in memory, for 16 values: five a word.

    The two highest bits of each word are the sixteenth value's.
    """
    values = _in_words(x, 16)
    low, high = _extremes(values)
    origin, inverse, held = _grid(low, high, 63, x.dtype)
    *codes, last = [((value - origin) * inverse + 0.5).to(torch.int32) for value in values]
    words = [_word(codes[5 * n : 5 * n + 5], 6) | (last >> 2 * n & 3) << 30 for n in range(3)]
    return *words, *held


def dequantise6(first: Tensor, second: Tensor, third: Tensor, *grid: Tensor) -> Tensor:
    """The values of ``quantise6``, [chunks, 128, 16] in the dtype that they had."""
    words = [word.transpose(1, 2) for word in (first, second, third)]
    codes = [word >> shift & 63 for word in words for shift in range(0, 30, 6)]
    last = [(word >> 30 & 3) << 2 * n for n, word in enumerate(words)]
    return _values([*codes, last[0] | last[1] | last[2]], grid)


def quantise4(x: Tensor, seed: Tensor) -> Packed:
    """Stochastic rounding, unbiased to 2^-18 of a level, by noise from ``seed`` (int32 [1]).

    Codes are int32 [chunks, 16, 16] with the lanes innermost in memory, eight values a word.
    """
    values = _in_words(x, 8)
    low, high = _extremes(values)
    origin, inverse, held = _affine(low, high, 15, x.dtype)
    codes = [
        ((value - origin) * inverse * 2.0**_FRACTION_BITS).to(torch.int32) + noise >> _FRACTION_BITS
        for value, noise in zip(values, _noise(x, seed), strict=True)
    ]
    return _word(codes, 4), *held


def dequantise4(codes: Tensor, *grid: Tensor) -> Tensor:
    """The values of ``quantise4``, [chunks, 128, 16] in the dtype that they had."""
    return _values(_codes(codes, 4), grid)


def spread8(codes: Tensor, *grid: Tensor) -> Tensor:
    """What ``dequantise8`` gives, for a GPU: a thread for each value, beside those of its neighbours in memory."""
    return _spread_values(codes, 8, grid)


def spread4(codes: Tensor, *grid: Tensor) -> Tensor:
    """What ``dequantise4`` gives, as ``spread8`` does it."""
    return _spread_values(codes, 4, grid)


def marks(packed: Packed) -> Tensor:
    """[chunks, 16]: NaN for each group that could not be held."""
    last = packed[-1]
    return last.view(torch.float32) if last.dtype == torch.int32 else packed[-2]


def _in_words(x: Tensor, count: int) -> list[Tensor]:
    """The first, second, ... values of all words of ``count``, float32 [chunks, 16, 128 / count] each."""
    words = x.view(-1, GROUP // count, count, LANES).float()
    return [words[:, :, number].transpose(1, 2) for number in range(count)]


def _extremes(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each group, [chunks, 16].

    Over a word's values first: one long chain of minima would wait for each of them in turn. The maximum takes in the
    first value once more: it changes nothing, but what reads the input cannot be iterated as chunks * lanes.

    Of integers, as minima of floats look for NaN in both arguments, each time. NaN is beyond infinity here, on the side
    of its sign, hence among the two.
    """
    lows = highs = [_swapped(value.view(torch.int32)) for value in values]
    first = lows[0][:, :, 0]
    while len(lows) > 1:
        lows = [torch.minimum(*pair) for pair in zip(lows[::2], lows[1::2], strict=True)]
        highs = [torch.maximum(*pair) for pair in zip(highs[::2], highs[1::2], strict=True)]
    low, high = lows[0].amin(2), torch.maximum(highs[0].amax(2), first)
    return _swapped(low).view(torch.float32), _swapped(high).view(torch.float32)


def _swapped(bits: Tensor) -> Tensor:
    """From the bits of a float32 to an int32 in the same order, and back."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def _grid(low: Tensor, high: Tensor, levels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Packed]:
    """Origin and inverse of the scale, float32 [chunks, 16, 1]; then how they are held, [chunks, 16]."""
    if dtype != torch.float32:
        return _affine(low, high, levels, dtype)
    span = high - low
    least = (low.abs() * (1 / _MOST_STEPS)).clamp(min=_SMALLEST_SCALE)
    scale = _rounded_up(torch.maximum(span * (1 / (levels - 1)), least))
    inverse = 1 / scale
    steps = (low * inverse).floor()
    origin = steps * scale
    word = _or_nan(scale, low, high).view(torch.int32) | steps.to(torch.int32) & 0xFFFF
    return _once(origin)[:, :, None], _once(inverse)[:, :, None], (word,)


def _affine(low: Tensor, high: Tensor, levels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Packed]:
    """As ``_grid``, with the minimum as origin, held in ``dtype``."""
    scale = _rounded_up(((high - low) * (1 / levels)).clamp(min=_SMALLEST_SCALE))
    held = _or_nan(low, low, high).to(dtype), scale.to(_scale_dtype(dtype))
    return low[:, :, None], _once(1 / scale)[:, :, None], held


def _or_nan(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``x``, but NaN for groups that cannot be held."""
    return torch.where((high - low <= _WIDEST_SPAN) & (high <= _LARGEST) & (low >= -_LARGEST), x, torch.nan)


def _rounded_up(x: Tensor) -> Tensor:
    """The next number that a bfloat16 can hold, for positive float32."""
    return (x.view(torch.int32) + 0xFFFF >> 16 << 16).view(torch.float32)


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else torch.bfloat16


def _once(x: Tensor) -> Tensor:
    """``x``; keeps the compiler from computing it again for each element of its group."""
    return x.as_strided(x.shape, x.stride())


def _word(codes: list[Tensor], bits: int) -> Tensor:
    word = codes[0]
    for number, code in enumerate(codes[1:], 1):
        word = word | code << bits * number
    return word


def _codes(words: Tensor, bits: int) -> list[Tensor]:
    words = words.transpose(1, 2)
    return [words >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)]


def _values(codes: list[Tensor], grid: Packed) -> Tensor:
    origin, scale = grid if len(grid) == 2 else _unpacked_grid(*grid)
    origin, scale = origin[:, None], scale[:, None]
    return torch.stack([_value(code, origin, scale) for code in codes], 2).view(-1, GROUP, LANES)


def _spread_values(words: Tensor, bits: int, grid: Packed) -> Tensor:
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    codes = words.transpose(1, 2)[:, :, None] >> shifts[:, None] & (1 << bits) - 1
    origin, scale = grid if len(grid) == 2 else _unpacked_grid(*grid)
    return _value(codes, origin[:, None, None], scale[:, None, None]).view(-1, GROUP, LANES)


def _unpacked_grid(word: Tensor) -> Packed:
    scale = (word >> 16 << 16).view(torch.float32)
    return (word << 16 >> 16).float() * scale, scale


def _value(codes: Tensor, origin: Tensor, scale: Tensor) -> Tensor:
    value = codes.float() * scale.float() + origin.float()
    if origin.dtype == torch.float16:
        value = value.clamp(max=torch.finfo(torch.float16).max)
    return value.to(origin.dtype)


def _noise(x: Tensor, seed: Tensor) -> list[Tensor]:
    """Uniform in [0, 2^27), int32 [chunks, 16, 16], for each of the values of a word.

    Each group starts from a well mixed number, which differs between draws; each of its words then changes bits of
    that, and each value multiplies by a number of its own, whose upper bits are what counts.
    """
    lanes = torch.arange(x.shape[0] * LANES, dtype=torch.int32, device=x.device).view(-1, LANES)
    words = torch.arange(CHUNK // len(_MULTIPLIERS), dtype=torch.int32, device=x.device)
    bits = _once(_hash(lanes ^ seed))[:, :, None] ^ _once(_hash(words + 1)).view(-1, LANES).t()
    return [bits * _signed(multiplier) & _NOISE for multiplier in _MULTIPLIERS]


def _hash(x: Tensor) -> Tensor:
    """lowbias32 (Wellons, "Hash function prospector"), on int32."""
    x = (x ^ (x >> 16 & 0xFFFF)) * _signed(0x7FEB352D)
    x = (x ^ (x >> 15 & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ (x >> 16 & 0xFFFF)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
