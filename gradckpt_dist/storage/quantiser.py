"""Tensors in 8, 6 or 4 bits a value: group-wise affine, compiled at its first use."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, overrides
from torch.utils import _python_dispatch

from gradckpt_dist.errors import StorageError
from gradckpt_dist.storage import kernels
from gradckpt_dist.storage.direct import DirectKernel
from gradckpt_dist.storage.noise import NoiseSource

logger = logging.getLogger("gradckpt_dist")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What can be quantised."""
_AS_IT_IS = nullcontext()


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantised:
    """A tensor of ``shape`` as codes, with an origin and a scale for each 128 values, padded to a multiple of 2,048."""

    packed: kernels.Packed
    bits: int
    shape: torch.Size

    @property
    def size_bytes(self) -> int:
        """Bytes that it holds."""
        return sum(part.nbytes for part in self.packed)


def quantise(tensor: Tensor, bits: int, noise: NoiseSource) -> Quantised | None:
    """``tensor`` (float32, float16 or bfloat16, any shape) in 8, 6 or 4 bits a value.

    8 and 6 bits round to nearest, which errs by half a level at most; 4 bits round stochastically, by less than a level
    and without bias, with a seed from ``noise``. A level is (max - min) / (2^bits - 1) of 128 values, and up to 1 %
    more. Of a float32 in 8 and 6 bits it is (max - min) / (2^bits - 2), or |min| / 32767 if that is more, up to 1 %
    more, and zero is exact where a group holds it.

    A tensor that holds a value that is not finite, or spans over 1.7e38 within a group, gives None on the CPU;
    elsewhere finding out would wait for the device, and the whole group comes back as NaN.

    Raises:
        StorageError: another dtype, or other ``bits``.
    """
    if tensor.dtype not in DTYPES or bits not in _KERNELS:
        raise StorageError(
            f"cannot quantise {tensor.dtype} in {bits} bits; give float32, float16 or bfloat16, and 8, 6 or 4 bits"
        )
    with plain_torch():
        packed = pack(tensor, bits, noise)
        if tensor.device.type == "cpu" and _holds_nan(packed):
            return None
        return Quantised(packed=packed, bits=bits, shape=tensor.shape)


def dequantise(quantised: Quantised) -> Tensor:
    """The tensor again: contiguous, in its shape and dtype."""
    with plain_torch():
        return unpack(quantised.packed, quantised.bits, quantised.shape)


def pack(tensor: Tensor, bits: int, noise: NoiseSource) -> kernels.Packed:
    """The codes of ``quantise``, whatever the values; a group that cannot be held comes back as NaN."""
    inputs = [chunked(tensor)]
    if bits == 4:
        inputs.append(torch.full((1,), noise.draw(), dtype=torch.int32, device=tensor.device))
    packed: kernels.Packed = _KERNELS[bits].quantise(*inputs)
    return packed


def unpack(packed: kernels.Packed, bits: int, shape: torch.Size) -> Tensor:
    """A contiguous tensor of ``shape`` from what ``pack`` has made of one with as many elements."""
    chunks: Tensor = _KERNELS[bits].dequantise(*packed)
    padded = chunks.numel() > shape.numel()
    return (chunks.view(-1)[: shape.numel()] if padded else chunks).view(shape)


@dataclass(frozen=True)
class _Source:
    """A function of ``kernels``, and what torch.compile is told about it."""

    function: Callable[..., Any]
    options: dict[str, Any] | None = None


class _Kernel:
    """A function of ``kernels``, compiled at its first call there; eager if that fails, and for one chunk."""

    _warned = False

    def __init__(self, on_cpu: _Source, elsewhere: _Source) -> None:
        self._on_cpu = on_cpu
        self._elsewhere = elsewhere
        self._compiled: dict[tuple[Any, ...], DirectKernel] = {}
        self._eager = False

    def __call__(self, first: Tensor, *others: Tensor) -> Any:
        source = self._on_cpu if first.is_cpu else self._elsewhere
        # torch.compile would make a graph of its own for sizes of 0 and 1.
        if self._eager or first.shape[0] < 2:
            return source.function(first, *others)
        try:
            key = (first.device, first.dtype, *(other.dtype for other in others))
            if key not in self._compiled:
                self._compiled[key] = _compile(source)
            return self._compiled[key](first, *others)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._eager = True
            self._warn(error)
            return source.function(first, *others)

    @classmethod
    def _warn(cls, error: Exception) -> None:
        if not _Kernel._warned:
            _Kernel._warned = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning(
                "gradckpt: torch.compile does not work here (%s), so that compressed blocks run eagerly: right, but "
                "about ten times slower, which makes them slower than recompute; install a C++ compiler (Triton on a "
                "GPU), or take the lossy storages out of the configuration",
                reason,
            )


def _compile(source: _Source) -> DirectKernel:
    if torch._dynamo.config.disable:
        raise RuntimeError("it has been disabled")
    return DirectKernel(source.function, source.options)


@dataclass(frozen=True)
class _Pair:
    """Of one width."""

    quantise: _Kernel
    dequantise: _Kernel


def _pair(quantise: Callable[..., Any], dequantise: Callable[..., Any], elsewhere: Callable[..., Any]) -> _Pair:
    """``elsewhere``: what dequantises on another device than a CPU."""
    return _Pair(
        quantise=_Kernel(_Source(quantise, kernels.CPU_OPTIONS), _Source(quantise, kernels.OPTIONS)),
        dequantise=_Kernel(_Source(dequantise), _Source(elsewhere)),
    )


_KERNELS = {
    8: _pair(kernels.quantise8, kernels.dequantise8, kernels.spread8),
    6: _pair(kernels.quantise6, kernels.dequantise6, kernels.dequantise6),
    4: _pair(kernels.quantise4, kernels.dequantise4, kernels.spread4),
}


def chunked(tensor: Tensor) -> Tensor:
    """[chunks, 128, 16]; padding repeats the last value, so that no group's range leaves that of the tensor."""
    flat = tensor.detach().reshape(-1)
    missing = -flat.numel() % kernels.CHUNK
    if missing:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.view(-1, kernels.GROUP, kernels.LANES)


def _holds_nan(packed: kernels.Packed) -> bool:
    """In one pass: a maximum is NaN if any value is."""
    marks = kernels.marks(packed)
    return marks.numel() > 0 and bool(marks.max().isnan())


def plain_torch() -> AbstractContextManager[None]:
    """No gradients, no autocast and no modes of the caller's: torch.compile would make a graph for each such state."""
    autocast = [device for device in _autocast_devices() if torch.is_autocast_enabled(device)]
    if autocast or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return _WithoutModes(autocast)
    return torch.no_grad() if torch.is_grad_enabled() else _AS_IT_IS


@cache
def _autocast_devices() -> tuple[str, ...]:
    return "cpu", torch._C._get_accelerator().type


class _WithoutModes:
    """Not written with ``contextlib``, as it is entered several times in each block's forward."""

    __slots__ = ("_autocast", "_dispatch_modes", "_function_modes", "_gradients")

    def __init__(self, autocast: list[str]) -> None:
        self._autocast = autocast
        self._dispatch_modes: list[Any] = []
        self._function_modes: list[Any] = []

    def __enter__(self) -> None:
        self._gradients = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        for device in self._autocast:
            torch.set_autocast_enabled(device, False)
        while torch._C._len_torch_dispatch_stack():
            self._dispatch_modes.append(_python_dispatch._pop_mode())
        while torch._C._len_torch_function_stack():
            self._function_modes.append(overrides._pop_mode())  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: object) -> None:
        while self._function_modes:
            overrides._push_mode(self._function_modes.pop())  # type: ignore[no-untyped-call]
        while self._dispatch_modes:
            _python_dispatch._push_mode(self._dispatch_modes.pop())
        for device in self._autocast:
            torch.set_autocast_enabled(device, True)
        torch._C._set_grad_enabled(self._gradients)
