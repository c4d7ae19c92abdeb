"""The object that stands in for a module's forward, and leaves no trace in copies of the module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import itemgetter
from types import MethodType
from typing import Any

from torch import nn

Call = Callable[..., Any]
Run = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]
"""Given the plain call, the positional and the keyword arguments."""


class SwitchedForward:
    """Takes the place of one callable attribute of a module: ``forward``, or ``_compiled_call_impl``.

    A deep copy or a pickle of the module holds what was there before instead: the copy never runs the original, and
    loading needs neither this package nor its state. ``original`` is the attribute that the instance itself had, or
    ``None`` where the class's method served.
    """

    __slots__ = ("_module", "_run", "original")

    def __init__(self, module: nn.Module, original: Call | None, run: Run) -> None:
        self._module = module
        self.original = original
        self._run: Run | None = run

    @property
    def active(self) -> bool:
        """Whether it has not been retired."""
        return self._run is not None

    def retire(self) -> None:
        """Call the original from now on: someone may still hold this object."""
        self._run = None

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """What the module would do without the switch."""
        if self.original is not None:
            return self.original(*args, **kwargs)
        return type(self._module).forward(self._module, *args, **kwargs)

    def instead(self, call: Call, args: tuple[Any, ...]) -> Any:
        """Run ``call`` as the switch would run the module's own forward."""
        return call(*args) if self._run is None else self._run(call, args, {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self._run
        return self.plain(*args, **kwargs) if run is None else run(self.plain, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Call:
        if self.original is not None:
            return copy.deepcopy(self.original, memo)
        return MethodType(forward, copy.deepcopy(self._module, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.original is not None:
            return itemgetter(0), ((self.original,),)
        # The module is still without attributes when this is loaded: the name leads to its class's method.
        return getattr, (self._module, "forward")


def is_switched(module: nn.Module) -> bool:
    """Whether one of this module's attributes is switched now."""
    return any(
        isinstance(found := module.__dict__.get(name), SwitchedForward) and found.active
        for name in ("forward", "_compiled_call_impl")
    )


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a copy: that of its class, looked up at each call, as ``fully_shard`` may change the class.

    A bound method is pickled by the name of its function; this one is found again in the copy's class.
    """
    return type(module).forward(module, *args, **kwargs)
