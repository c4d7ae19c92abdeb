"""Models that call ``deepspeed.checkpointing.checkpoint`` themselves: the mask decides at each call."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gradckpt_dist.adapters.deepspeed_parts import checkpointing
from gradckpt_dist.adapters.deepspeed_sites import CallSite
from gradckpt_dist.engine import Engine

logger = logging.getLogger("gradckpt_dist")

Run = Callable[..., Any]


class CallSites:
    """Takes the place of what ``deepspeed.checkpointing.checkpoint`` and ``non_reentrant_checkpoint`` do.

    In a training forward of the model, the k-th call outside of blocks is a block itself, if calls are blocks;
    is left to the blocks inside of it, if there are any; or else is DeepSpeed's own. Calls within a block, and all
    those in a recomputation, are plain: their block decides.
    """

    def __init__(self, engine: Engine) -> None:
        blocks = engine.blocks
        self._engine = weakref.ref(engine)
        self._blocks = weakref.WeakSet(block.module for block in blocks)
        self._sites = [weakref.ref(block.module) for block in blocks if isinstance(block.module, CallSite)]
        self._holds_blocks: dict[int, bool] = {}
        self._forward = self._calls = 0
        self._warned = False

    def install(self) -> Callable[[], None]:
        """Take over; the call undoes it."""
        calls = checkpointing()
        own = self._own, self._own_non_reentrant = calls.CheckpointFunction, calls.non_reentrant_checkpoint
        ours = self, self._non_reentrant
        calls.CheckpointFunction, calls.non_reentrant_checkpoint = ours

        def undo() -> None:
            if (calls.CheckpointFunction, calls.non_reentrant_checkpoint) == ours:
                calls.CheckpointFunction, calls.non_reentrant_checkpoint = own

        return undo

    def apply(self, function: Run, all_outputs: list[Any], *args: Any) -> None:
        """What ``CheckpointFunction.apply`` does: run the function, and put what it returns into ``all_outputs``."""
        run = self._next()
        if run is not None:
            outputs = run(function, args)
            all_outputs += [outputs] if isinstance(outputs, torch.Tensor) else outputs
            return
        with self._left_to_deepspeed():
            self._own.apply(function, all_outputs, *args)

    def _non_reentrant(self, function: Run, *args: Any) -> Any:
        run = self._next()
        if run is not None:
            outputs = run(function, args)
            return outputs if isinstance(outputs, torch.Tensor) or len(outputs) > 1 else outputs[0]
        with self._left_to_deepspeed():
            return self._own_non_reentrant(function, *args)

    def _next(self) -> Callable[[Run, tuple[Any, ...]], Any] | None:
        """How the call that begins now is run; None for DeepSpeed's own way."""
        engine = self._engine()
        if engine is None or not engine.enabled or not torch.is_grad_enabled():
            return None
        gate = engine.gate
        if not gate.open or gate.depth:
            return _plain
        if gate.forwards != self._forward:
            self._forward, self._calls = gate.forwards, 0
        self._calls += 1
        if self._sites:
            return self._site(self._calls)
        return _plain if self._holds_blocks.get(self._calls) else None

    def _site(self, call: int) -> Callable[[Run, tuple[Any, ...]], Any] | None:
        site = self._sites[call - 1]() if call <= len(self._sites) else None
        if site is None and not self._warned:
            self._warned = True
            logger.warning(
                "gradckpt: the model calls deepspeed.checkpointing.checkpoint more often than number_checkpoints (%d) "
                "says; DeepSpeed recomputes the calls after those",
                len(self._sites),
            )
        return None if site is None else site.run

    @contextmanager
    def _left_to_deepspeed(self) -> Iterator[None]:
        """Have blocks run plainly, as in DeepSpeed's second run of the call; see, the first time, whether any do."""
        engine = self._engine()
        if engine is None or not engine.gate.open:
            yield
            return
        gate, call, found = engine.gate, self._calls, []
        known = call in self._holds_blocks or not torch.is_grad_enabled()
        looked_at = () if known else self._blocks
        handles = [block.register_forward_pre_hook(lambda *_: found.append(True)) for block in looked_at]
        gate.open = False
        try:
            yield
        finally:
            gate.open = True
            for handle in handles:
                handle.remove()
            if not known:
                self._holds_blocks[call] = bool(found)


def _plain(function: Run, args: tuple[Any, ...]) -> Any:
    return function(*args)
