"""Telling what the plugin had planned when a step runs out of memory."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import TracebackType

import torch

_CPU_ALLOCATOR_SAYS = ("not enough memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed: the CPU's allocator raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_ALLOCATOR_SAYS)


class OutOfMemoryReport:
    """Calls ``report`` once, when such an error ends the process uncaught; the traceback is printed as ever.

    Backward runs no code of ours around it, so that ``sys.excepthook`` is the one place that sees every such error.
    """

    def __init__(self, report: Callable[[], None]) -> None:
        self._report = weakref.WeakMethod(report)
        self._previous = sys.excepthook
        self._active = True
        sys.excepthook = self

    def remove(self) -> None:
        """Put the former hook back; if another one came on top meanwhile, stay below it without effect."""
        self._active = False
        if sys.excepthook is self:
            sys.excepthook = self._previous

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        report = self._report()
        if self._active and report is not None and is_out_of_memory(error):
            self._active = False
            report()
        self._previous(kind, error, traceback)
