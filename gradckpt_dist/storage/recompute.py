"""``recompute``: keep the inputs, run the forward again in backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, Self

from torch import nn
from torch.utils.checkpoint import checkpoint

from gradckpt_dist.storage.base import Forward, Storage
from gradckpt_dist.storage.buffers import BufferGuard
from gradckpt_dist.storage.context import StorageContext


class Passes(Protocol):
    """What surrounds the passes of one call of a block through its forward."""

    def around(self) -> AbstractContextManager[None]:
        """Entered around the call, where checkpoint saves its inputs and its hooks are not in force."""

    def first(self) -> AbstractContextManager[None]:
        """Entered around the forward pass."""

    def again(self) -> AbstractContextManager[None]:
        """Entered around each run in backward, which may be left by an exception: checkpoint's early stop."""


class Recompute(Storage):
    """PyTorch's non-reentrant checkpoint, with the RNG preserved and early stop on."""

    name = "recompute"
    exact = True
    reruns = True

    def __init__(self, block: nn.Module, context: StorageContext | None = None) -> None:
        super().__init__(block)
        self._buffers = BufferGuard(block)
        self._context = context

    @classmethod
    def create(cls, block: nn.Module, context: StorageContext) -> Self:
        return cls(block, context)

    def run(self, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        # Keyword values travel as positions: checkpoint then holds tensors among them as saved tensors, finds their
        # device, and cannot mistake a block's `debug=` for its own.
        keywords = tuple(kwargs)
        buffers = self._buffers
        snapshot, versions = buffers.snapshot(), buffers.versions()
        passes = self._passes((*args, *kwargs.values()))
        first = True

        def call(*values: Any) -> Any:
            nonlocal first
            split = len(values) - len(keywords)
            keyword_values = dict(zip(keywords, values[split:], strict=True))
            if first:
                first = False
                with passes.first():
                    result = forward(*values[:split], **keyword_values)
                buffers.settle(versions, snapshot)
                return result
            with buffers.substituted(snapshot), passes.again():
                return forward(*values[:split], **keyword_values)

        with passes.around():
            return checkpoint(call, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=True)

    def _passes(self, inputs: tuple[Any, ...]) -> Passes:
        """What surrounds the passes of a call with these inputs, made anew for each call."""
        kept_inputs = None if self._context is None else self._context.kept_inputs
        return _InFull(self, nullcontext() if kept_inputs is None else kept_inputs.around(self.account))


class _InFull:
    def __init__(self, storage: Storage, around: AbstractContextManager[None]) -> None:
        self._storage = storage
        self._around = around

    def around(self) -> AbstractContextManager[None]:
        return self._around

    def first(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def again(self) -> Iterator[None]:
        self._storage.recomputes += 1
        yield
