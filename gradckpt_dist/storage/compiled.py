"""``selective`` and ``selective_half`` for compiled blocks: more variants of the block, compiled to hold less.

Selective checkpointing around a compiled block sees one opaque operation and does nothing. torch.compile has a
partitioner of its own, which decides what the compiled forward saves under an activation memory budget.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch.utils._pytree import tree_leaves, tree_map_only

from gradckpt_dist.errors import StorageError
from gradckpt_dist.storage.base import Forward, Storage
from gradckpt_dist.storage.buffers import BufferGuard


def is_compiled(block: nn.Module) -> bool:
    """Whether the user has compiled this block, by ``block.compile()`` or ``torch.compile(block)``."""
    return getattr(block, "_compiled_call_impl", None) is not None or hasattr(block, "dynamo_ctx")


class CompiledSelective(Storage):
    """Calls a variant of the block, compiled under ``budget`` (a fraction: 0 holds the inputs, 1 what it likes).

    torch 2.13's partitioner recomputes some random operations with other random numbers (pytorch#190758), so that the
    first call with each shape compares gradients, bit for bit, with the block as the user compiled it.
    """

    name = "selective"
    exact = True
    reruns = False
    budget: ClassVar[float] = 0.7

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self._core: nn.Module = getattr(block, "_orig_mod", block)
        self._variant = _Variant.of(block, self._core, self.budget)

    def run(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        self.ensure_verified(forward, args, kwargs)
        return self.call_variant(*args, **kwargs)

    def call_variant(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the block's forward."""
        return self._variant(self._core, *args, **kwargs)

    def ensure_verified(self, forward: Forward, args: Any, kwargs: Any) -> None:
        """Before the first call with each shape.

        Raises:
            StorageError: a gradient of the variant differs from one of the user's own compilation.
        """
        shapes = _shapes(args, kwargs)
        if shapes not in self._variant.verified:
            self._verify(forward, args, kwargs)
            self._variant.verified.add(shapes)

    def _verify(self, forward: Forward, args: Any, kwargs: Any) -> None:
        reference = self._gradients(forward, args, kwargs)
        ours = self._gradients(self.call_variant, args, kwargs)
        for one, other in zip(reference, ours, strict=True):
            if not _same(one, other):
                raise StorageError(
                    f"{self.name!r} is refused for the compiled {type(self._core).__name__}: under an activation "
                    "memory budget torch.compile recomputes its random operations with other random numbers "
                    "(pytorch#190758), which makes gradients wrong; use keep, recompute, compress or offload there, "
                    "or set its dropout to 0"
                )

    def _gradients(self, call: Forward, args: Any, kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        """With the random numbers that the coming call will see, and without a trace in buffers or ``.grad``."""
        args, kwargs = tree_map_only(torch.Tensor, _leaf, (args, kwargs))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        inputs += [parameter for parameter in self._core.parameters() if parameter.requires_grad]
        guard = BufferGuard(self._core)
        with torch.random.fork_rng(), guard.substituted(guard.snapshot()):
            outputs = [out for out in tree_leaves(call(*args, **kwargs)) if isinstance(out, torch.Tensor)]
            outputs = [out for out in outputs if out.requires_grad]
            return torch.autograd.grad(outputs, inputs, [torch.ones_like(out) for out in outputs], allow_unused=True)


class CompiledSelectiveHalf(CompiledSelective):
    """The same with about half of ``keep``'s bytes."""

    name = "selective_half"
    budget = 0.45


class _Variant:
    """One compiled variant of a class of blocks. It has a code object of its own, as torch.compile caches by that."""

    _all: ClassVar[dict[tuple[type[nn.Module], float], _Variant]] = {}

    def __init__(self, call: Callable[..., Any], budget: float) -> None:
        self._call = call
        self._budget = budget
        self.verified: set[tuple[Any, ...]] = set()

    @classmethod
    def of(cls, block: nn.Module, core: nn.Module, budget: float) -> _Variant:
        key = (type(core), budget)
        if key not in cls._all:
            name = f"{_call_block.__name__}_{type(core).__name__}_{round(100 * budget)}"
            code = _call_block.__code__.replace(co_name=name)
            cls._all[key] = cls(_compiler(block)(types.FunctionType(code, globals(), name)), budget)
        return cls._all[key]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._budgeted():
            return self._call(*args, **kwargs)

    @contextmanager
    def _budgeted(self) -> Iterator[None]:
        before = functorch_config.activation_memory_budget
        functorch_config.activation_memory_budget = self._budget
        try:
            yield
        finally:
            functorch_config.activation_memory_budget = before


def _call_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def _compiler(block: nn.Module) -> Callable[[Any], Any]:
    """What the user compiled this block with: backend, mode and dynamic shapes included."""
    if hasattr(block, "dynamo_ctx"):
        return block.dynamo_ctx  # type: ignore[return-value]
    compiled: Any = block._compiled_call_impl
    compiled = getattr(compiled, "original", compiled)
    context = inspect.getclosurevars(compiled).nonlocals.get("self")
    return context if callable(context) else torch.compile


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _shapes(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """What the partitioner's choice, and so its correctness, may depend on."""
    tensors = tuple((leaf.shape, leaf.dtype) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
    return (*tensors, torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
