"""The two passes of a block under selective recomputation: one fills an operation cache, the other takes from it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradckpt_dist.storage.operation_cache import Entry, OperationCache, random_state
from gradckpt_dist.storage.operations import Kind, Occurrence, Operation, describe, differentiable, signature, written
from gradckpt_dist.storage.parts import part_of
from gradckpt_dist.storage.stopwatch import Stopwatch

_ALWAYS_HELD = (Kind.COMMUNICATION, Kind.ROUTING)


class Selection(Protocol):
    """Which outputs are held, beside those of communication and routing."""

    def considers(self, function: Any, operation: Operation) -> bool:
        """Whether outputs of this operator may be held."""

    def keeps(self, occurrence: Occurrence) -> bool:
        """Whether the output of this call is held."""

    def keeps_gathered(self, args: tuple[Any, ...]) -> bool:
        """Whether what was gathered from these is held."""


class AllExpensive:
    """Every expensive operation and no cheap one; with ``gathers_of`` a block, what it gathers but its weights too.

    A weight is told by its shape: that of a parameter's part on this rank.
    """

    def __init__(self, gathers_of: nn.Module | None = None) -> None:
        self._gathers_of = gathers_of

    def considers(self, function: Any, operation: Operation) -> bool:
        return operation.kind is Kind.EXPENSIVE

    def keeps(self, occurrence: Occurrence) -> bool:
        return True

    def keeps_gathered(self, args: tuple[Any, ...]) -> bool:
        if self._gathers_of is None or not isinstance(args[0], torch.Tensor):
            return False
        return all(part_of(weight).shape != args[0].shape for weight in self._gathers_of.parameters())


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    supports_higher_order_operators = True

    def __init__(self, cache: OperationCache, selection: Selection) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._selection = selection

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions inside the block stay compiled; they are run again as a whole."""
        return True

    def _compares(self, function: Any, operation: Operation, types: Any, args: tuple[Any, ...]) -> bool:
        if is_fixed(operation, types):
            return operation.kind in _ALWAYS_HELD or operation.kind is Kind.EXPENSIVE
        return self._selection.considers(function, operation) and (
            operation.kind is Kind.EXPENSIVE or differentiable(args)
        )


class Recorder(_Mode):  # type: ignore[no-untyped-call]
    """Fills the cache while a block's forward runs; with a stopwatch it takes the time of each compared call."""

    def __init__(self, cache: OperationCache, selection: Selection, stopwatch: Stopwatch | None = None) -> None:
        super().__init__(cache, selection)
        self._stopwatch = stopwatch

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        operation = describe(func)
        kwargs = kwargs or {}
        if operation.kind is Kind.WRITES:
            self._cache.before_write(written(operation, args, kwargs))
            return func(*args, **kwargs)
        if operation.kind is Kind.OTHER or not self._compares(func, operation, types, args):
            if may_redistribute(operation, types):
                return self._listened(func, operation, args, kwargs)
            return func(*args, **kwargs)
        seconds = None
        if self._stopwatch is None:
            output = func(*args, **kwargs)
        else:
            output, seconds = self._stopwatch.time(func, args, kwargs)
        self.note(func, operation, is_fixed(operation, types), args, kwargs, output).seconds = seconds
        return output

    def note(
        self, function: Any, operation: Operation, fixed: bool, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> Entry:
        """Enter a call that has just run into the cache."""
        cache = self._cache
        occurrence = cache.occurrence(function)
        entry = cache.add(signature(function, args, kwargs), operation, occurrence)
        entry.fixed = fixed
        kept = fixed or self._selection.keeps(occurrence)
        if kept and (not operation.gathers or self._selection.keeps_gathered(args)):
            cache.hold(entry, output)
            if operation.draws(args, kwargs):
                entry.random_state = random_state(args)
        return entry

    def _listened(self, function: Any, operation: Operation, args: tuple[Any, ...], kwargs: Any) -> Any:
        listener = _Listener()
        with listener:
            output = function(*args, **kwargs)
        if listener.heard:
            self.note(function, operation, True, args, kwargs, output)
        return output


class Replayer(_Mode):  # type: ignore[no-untyped-call]
    """Answers from the cache while a block's forward runs again in backward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        operation = describe(func)
        kwargs = kwargs or {}
        compares = operation.kind not in (Kind.OTHER, Kind.WRITES) and self._compares(func, operation, types, args)
        if compares or may_redistribute(operation, types):
            found = self._cache.take(signature(func, args, kwargs))
            if found is not None:
                return found[0]
        return func(*args, **kwargs)


def is_fixed(operation: Operation, types: Any) -> bool:
    """Whether ranks have to do the same with this call, so that measured times must not decide.

    Communication; routing, of which communication comes; and what may communicate inside: tensor subclasses (DTensor)
    and operators that are not PyTorch's own.
    """
    return operation.kind in _ALWAYS_HELD or not operation.local or bool(types)


def may_redistribute(operation: Operation, types: Any) -> bool:
    """Whether this is a call on DTensors that may communicate before it computes, and be answered from a cache."""
    return (
        operation.kind is not Kind.WRITES
        and not operation.random
        and any(hasattr(kind, "_local_tensor") for kind in types)
    )


class _Listener(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hears whether anything is sent."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heard = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "_local_tensor") for kind in types):
            return NotImplemented  # first the DTensor, which runs operations on its parts
        self.heard |= describe(func).kind is Kind.COMMUNICATION
        return func(*args, **(kwargs or {}))
