"""Small compiled functions, called without what torch.compile does before each call.

Guards, autograd's wrappers and inductor's own take some 0.3 ms when their code has left the caches, as it has between
two matrix products: several times what it takes to quantise an activation of a megabyte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64
_MOST_ELEMENTS = 2**31 - 1


class DirectKernel:
    """A function of tensors whose first dimension is the same and may vary, compiled for one device and set of dtypes.

    The first call goes through torch.compile, and through what inductor has made of it: if they agree, bit for bit,
    later calls go to the latter. Tensors without a second dimension are not dynamic.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any] | None) -> None:
        self._options = options
        self._inner: Any = None
        self._compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, backend=self._backend)
        self._state = _UNTRIED

    def __call__(self, *tensors: Tensor) -> Any:
        if self._state is _DIRECT and all(map(_as_compiled_for, tensors)):
            return self._call_inner(tensors)
        if self._state is not _UNTRIED:
            return self._compiled(*tensors)
        for tensor in tensors:
            if tensor.dim() > 1:
                torch._dynamo.mark_dynamic(tensor, 0)
        result = self._compiled(*tensors)
        self._state = _DIRECT if self._agrees(tensors, result) else _COMPILED
        return result

    def _backend(self, graph: Any, inputs: Any) -> Any:
        # Imported here: it takes a second, and not every run compresses.
        from torch._functorch import config  # noqa: PLC0415
        from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415

        # From autograd's cache the function would come without what inductor has made of it.
        with config.patch(enable_autograd_cache=False):
            return compile_fx(graph, inputs, inner_compile=self._compile_inner, config_patches=self._options)

    def _compile_inner(self, graph: Any, inputs: Sequence[Any], **options: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner  # noqa: PLC0415

        code = compile_fx_inner(graph, inputs, **options)
        if self._state is not _UNTRIED:
            return code  # made anew for what guards did not let pass; what was compared stays
        sizes = sum(not isinstance(value, Tensor) for value in inputs)
        leading = not isinstance(inputs[0], Tensor)
        self._inner = getattr(code, "current_callable", None) if sizes == 1 and leading else None
        return code

    def _call_inner(self, tensors: Sequence[Tensor]) -> Any:
        results = self._inner([tensors[0].shape[0], *tensors])
        return results[0] if len(results) == 1 else tuple(results)

    def _agrees(self, tensors: Sequence[Tensor], result: Any) -> bool:
        if self._inner is None:
            return False
        ours = self._call_inner(tensors)
        ones, others = ((value,) if isinstance(value, Tensor) else value for value in (ours, result))
        return len(ones) == len(others) and all(map(same_bits, ones, others))


_UNTRIED, _DIRECT, _COMPILED = "untried", "direct", "compiled"


def _as_compiled_for(tensor: Tensor) -> bool:
    """What guards would see to: the code may rely on alignment, and on indices of 32 bits."""
    return tensor.data_ptr() % _ALIGNMENT == 0 and tensor.numel() <= _MOST_ELEMENTS


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN being one of them."""
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and (torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all()))
