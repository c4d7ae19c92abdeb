"""Ranks that run out of data before others, under ``DistributedDataParallel.join``.

There a rank without data goes on with DDP's collectives, and by the same hook with those of the agreement: it holds
the same mask at each step as the ranks that still train.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.distributed.algorithms.join import JoinHook
from torch.nn.parallel import DistributedDataParallel

from gradckpt_dist.engine import Engine

_roots: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Engine]] = weakref.WeakKeyDictionary()
_their_join_hook = DistributedDataParallel.join_hook


def follow_join(engine: Engine, root: nn.Module) -> Callable[[], None]:
    """Have ``engine``, which listens to ``root``, follow DDP's join, wrapped already or later; the call undoes it.

    The hook is put before the class's, so that a copy or a pickle of a model has nothing of it.
    """
    _roots[root] = weakref.ref(engine)
    DistributedDataParallel.join_hook = _join_hook  # type: ignore[method-assign, assignment]

    def undo() -> None:
        _roots.pop(root, None)
        if not _roots:
            DistributedDataParallel.join_hook = _their_join_hook  # type: ignore[method-assign]

    return undo


def _join_hook(model: DistributedDataParallel, **options: Any) -> JoinHook:
    theirs: JoinHook = _their_join_hook(model, **options)  # type: ignore[no-untyped-call]
    engines = [engine for module in model.modules() if module in _roots and (engine := _roots[module]()) is not None]
    return _Following(model, theirs, engines) if engines else theirs


class _Following(JoinHook):
    """What a rank without data runs for each forward of the others, until all have run out."""

    def __init__(self, model: DistributedDataParallel, theirs: JoinHook, engines: Sequence[Engine]) -> None:
        self._model = model
        self._theirs = theirs
        self._engines = engines

    def main_hook(self) -> None:
        self._theirs.main_hook()
        # Theirs has just noted here whether the others exchange this backward's gradients.
        synchronised = bool(self._model.require_forward_param_sync)
        for engine in self._engines:
            engine.miss_forward(synchronised=synchronised)

    def post_hook(self, is_last_joiner: bool) -> None:
        self._theirs.post_hook(is_last_joiner)
