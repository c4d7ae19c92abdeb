"""The plugin's state in DeepSpeed's own checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from gradckpt_dist.config import SECTION
from gradckpt_dist.engine import Engine
from gradckpt_dist.errors import MaskError

logger = logging.getLogger("gradckpt_dist")


def save_with_checkpoints(engine: Engine, trainer: Any) -> Callable[[], None]:
    """Add the state to ``trainer.save_checkpoint``, and read it in ``load_checkpoint``; the call undoes both.

    It travels as one more key of the client state. A checkpoint without it loads as ever, and one with it loads without
    this package, which then finds the key in the client state that ``load_checkpoint`` returns.
    """
    save, load = trainer.save_checkpoint, trainer.load_checkpoint

    def save_checkpoint(save_dir: Any, tag: Any = None, client_state: Any = None, *args: Any, **kwargs: Any) -> Any:
        state = {**(client_state or {}), SECTION: engine.state_dict()}
        return save(save_dir, tag, state, *args, **kwargs)

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        path, client_state = load(*args, **kwargs)
        state = client_state.pop(SECTION, None) if isinstance(client_state, dict) else None
        if state is not None:
            _resume(engine, state)
        return path, client_state

    ours = {"save_checkpoint": save_checkpoint, "load_checkpoint": load_checkpoint}
    before = {name: trainer.__dict__[name] for name in ours if name in trainer.__dict__}
    trainer.__dict__.update(ours)

    def undo() -> None:
        for name, method in ours.items():
            if trainer.__dict__.get(name) is method:
                del trainer.__dict__[name]
                trainer.__dict__ |= {name: before[name]} if name in before else {}

    return undo


def _resume(engine: Engine, state: dict[str, Any]) -> None:
    try:
        engine.load_state_dict(state)
    except MaskError as error:  # the same on all ranks, as states and configurations are
        logger.warning("gradckpt: the checkpoint's state is not used, the plugin starts anew: %s", error)
