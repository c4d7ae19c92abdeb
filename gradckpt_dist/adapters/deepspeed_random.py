"""DeepSpeed's random states of tensor-parallel ranks, which a forward that is run again has to draw from again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradckpt_dist.adapters.deepspeed_parts import checkpointing
from gradckpt_dist.engine import Engine


def replay_random_states(engine: Engine) -> Callable[[], None]:
    """Where the script has seeded ``deepspeed.checkpointing``'s tracker, save and restore it; the call undoes it.

    Each run of a block's forward but the first, in a recomputation or a probe, starts from the tracked states with
    which the first one started, and leaves those of the training untouched.
    """
    tracker = checkpointing().get_cuda_rng_tracker()
    if not tracker.get_states():
        return lambda: None

    def replayed(forward: Callable[..., Any]) -> Callable[..., Any]:
        begun: dict[str, Any] | None = None

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal begun
            if begun is None:
                begun = tracker.get_states()
                return forward(*args, **kwargs)
            current = tracker.get_states()
            tracker.set_states(dict(begun))
            try:
                return forward(*args, **kwargs)
            finally:
                tracker.set_states(current)

        return call

    gate = engine.gate
    gate.replayed, gate.context.foreign_random_states = replayed, True

    def undo() -> None:
        gate.replayed, gate.context.foreign_random_states = None, False

    return undo
