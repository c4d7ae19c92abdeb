"""A way into one block's backward, at the moment when the gradients at its outputs are known.

Hooks of tensors run before those of the node that made them. So where FSDP gathers parameters by hooks on the output
tensors, and ZeRO-3 by a node behind them, the parameters are there when this is called. Nothing is put into the graph:
views, in-place changes and the gradients themselves stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

Gradients = dict[int, torch.Tensor]
"""By position among the outputs."""


class Trap:
    """Calls ``fire`` once, in the first backward that comes to ``outputs``, with the gradients that they have then.

    A gradient is the whole one: where one output is computed from another, it holds the part that came through the
    block itself. ``fire`` is not called in a backward that makes a graph (``create_graph``), nor for an output that no
    node made. ``disarm`` lets go of the graph; until then it may be kept alive.
    """

    def __init__(self, outputs: Sequence[torch.Tensor], fire: Callable[[Gradients], None]) -> None:
        self._fire: Callable[[Gradients], None] | None = fire
        self._gradients: Gradients = {}
        self._left = 0
        places: dict[Any, list[tuple[int, int]]] = {}
        for position, output in enumerate(outputs):
            if output.grad_fn is not None:
                places.setdefault(output.grad_fn, []).append((output.output_nr, position))
        self._nodes = list(places)
        self._handles: list[RemovableHandle] = [
            node.register_prehook(_Catch(self, where)) for node, where in places.items()
        ]

    def disarm(self) -> None:
        """Take the hooks away, and let go of everything."""
        self._fire = None
        for handle in self._handles:
            handle.remove()
        self._handles, self._nodes, self._gradients = [], [], {}

    def caught(self, gradients: Gradients) -> None:
        """A node's backward is about to run."""
        if self._fire is None:
            return
        if torch.is_grad_enabled():
            self.disarm()
            return
        if not self._left:
            self._left = sum(map(torch._C._will_engine_execute_node, self._nodes))
        self._left -= 1
        self._gradients |= gradients
        if not self._left:
            fire, gradients = self._fire, self._gradients
            self.disarm()
            fire(gradients)


class _Catch:
    """One node's hook."""

    __slots__ = ("_trap", "_where")

    def __init__(self, trap: Trap, where: list[tuple[int, int]]) -> None:
        self._trap = trap
        self._where = where

    def __call__(self, gradients: tuple[torch.Tensor | None, ...]) -> None:
        found = {position: gradients[number] for number, position in self._where}
        self._trap.caught({position: grad for position, grad in found.items() if grad is not None})
