"""Steps that DeepSpeed skips, since gradients overflowed under its loss scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradckpt_dist.engine import Engine


def learn_nothing_from_skipped_steps(engine: Engine, trainer: Any) -> Callable[[], None]:
    """Have the sample dropped that a skipped step would give; the call undoes it."""
    take_step = trainer._take_model_step

    def take_model_step(*args: Any, **kwargs: Any) -> None:
        take_step(*args, **kwargs)
        watch = engine.gate.watch
        if watch is not None and not trainer._step_applied:
            watch.spoil()

    trainer.__dict__["_take_model_step"] = take_model_step

    def undo() -> None:
        if trainer.__dict__.get("_take_model_step") is take_model_step:
            del trainer.__dict__["_take_model_step"]

    return undo
