"""How to reach a ``Trainer``, which gives its callbacks no way to itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.trainer_callback import CallbackHandler, TrainerState


def at_next_event(root: nn.Module, join: Callable[[CallbackHandler, TrainerState], None]) -> None:
    """Have ``join`` called at the next event, and only then, of the Trainer that trains ``root`` or a module in it."""
    handlers: Any = CallbackHandler
    plain = handlers.call_event

    def call_event(handler: Any, event: str, args: Any, state: Any, *others: Any, **kwargs: Any) -> Any:
        if any(part is handler.model for part in root.modules()):
            handlers.call_event = plain
            join(handler, state)
        return plain(handler, event, args, state, *others, **kwargs)

    handlers.call_event = call_event
