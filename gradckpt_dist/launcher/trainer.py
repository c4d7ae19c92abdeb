"""transformers' ``Trainer``: a callback that enables the plugin, logs its figures and saves its state."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState, TrainerCallback
from transformers.training_args import TrainingArguments

from gradckpt_dist.api import ConfigLike, resolve_config
from gradckpt_dist.engine import Engine
from gradckpt_dist.errors import MaskError
from gradckpt_dist.launcher.figures import figures_of
from gradckpt_dist.launcher.script import ModelWatch
from gradckpt_dist.launcher.trainer_events import at_next_event

logger = logging.getLogger("gradckpt_dist")


class GradckptCallback(TrainerCallback, ExportableState):
    """Enables the plugin on the model that a ``Trainer`` trains, wrapped as it is, until training ends.

    ``config`` is what ``gradckpt_dist.enable`` takes. The plugin's figures join the training logs under ``gradckpt/``,
    for all trackers and for ``state.log_history``. Its state is the Trainer's callback state, in the checkpoint's
    ``trainer_state.json``; resuming takes it up. The first training step raises what ``gradckpt_dist.enable`` does.

    Raises:
        ConfigError: ``config`` cannot be used.
    """

    def __init__(self, config: ConfigLike = None) -> None:
        self._config = None if config is None else resolve_config(config)
        self._watch: ModelWatch | None = None
        self.engine: Engine | None = None
        """From the first training forward on; disabled when training has ended."""
        self.saved: dict[str, Any] | None = None
        """The engine's state in the checkpoint that training resumes from, until it is taken up."""
        self._of_all_ranks: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """What the Trainer saves with a checkpoint, in plain values; it asks the rank that writes, and no other."""
        config = None if self._config is None else self._config.to_dict()
        saved = self.saved if self.engine is None else self._of_all_ranks or self.engine.state_dict(alone=True)
        return {"args": {"config": config}, "attributes": {"saved": saved}}

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the first training forward: only then does the wrapped model show itself."""
        self._stop()
        if args.activation_checkpointing:
            logger.info("gradckpt: activation_checkpointing of transformers is taken over; the mask decides")
        model = kwargs["model"]
        self._watch = ModelWatch(self._config, model=model, on_enabled=self._enabled)
        self._watch.arm()
        at_next_event(model, self.join)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the figures to the logs of training; those of evaluation and of the end stay as they are."""
        if self.engine is not None and self.engine.enabled and "loss" in logs:
            figures = figures_of(self.engine)
            logs |= figures
            state.log_history[-1] |= figures

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Resume, where the engine was enabled before this callback was there; see to a checkpoint that is due."""
        self._resume()
        self._add_up(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See to a checkpoint that is due."""
        self._add_up(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the model as it was."""
        self._stop()

    def join(self, handler: CallbackHandler, state: Any) -> None:
        """Take the place between the Trainer's own flow, which says when to save, and the trackers."""
        others = [callback for callback in handler.callbacks if callback is not self]
        flow = [callback for callback in others if isinstance(callback, DefaultFlowCallback)]
        handler.callbacks = [*flow, self, *(callback for callback in others if callback not in flow)]
        # A checkpoint that was saved without this callback has no entry for it; saving the next one would need it.
        entry = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.saved = entry["attributes"]["saved"] if state.global_step else None

    def _enabled(self, engine: Engine, _: nn.Module) -> None:
        self.engine = engine
        self._resume()

    def _add_up(self, control: Any) -> None:
        """Before a checkpoint, take the state while all ranks are here: of those, the Trainer will ask one alone."""
        self._of_all_ranks = None
        if control.should_save and self.engine is not None and self.engine.enabled:
            self._of_all_ranks = self.engine.state_dict()

    def _resume(self) -> None:
        saved, self.saved = self.saved, None
        if saved is None or self.engine is None or not self.engine.enabled:
            return
        try:
            self.engine.load_state_dict(saved)
        except MaskError as error:
            logger.warning("gradckpt: the state in the checkpoint is left out, and costs are measured anew: %s", error)

    def _stop(self) -> None:
        self._of_all_ranks = None
        if self._watch is not None:
            self._watch.disarm()
        if self.engine is not None:
            self.engine.disable()


def follow(engine: Engine, root: nn.Module) -> None:
    """Add the callback to the Trainer that trains ``root`` or a module in it, at that Trainer's next event."""
    callback = GradckptCallback(engine.config)
    callback.engine = engine
    at_next_event(root, callback.join)
