"""The plugin's state goes where ``Accelerator.save_state`` puts the model's."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradckpt_dist.engine import Engine
from gradckpt_dist.errors import MaskError

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("gradckpt_dist")

_LAUNCHED = "ACCELERATE_MIXED_PRECISION"
"""What all of Accelerate's launchers set."""

_loaded_from: weakref.WeakKeyDictionary[Accelerator, str] = weakref.WeakKeyDictionary()
"""The folder of the last checkpoint, until an engine takes its state from there."""


def save_with(accelerator: Accelerator, engine: Engine) -> Callable[[], None]:
    """Let ``accelerator.save_state`` and ``load_state`` take the engine's state along; the call undoes it.

    ``enable`` does this for a model that was prepared before. The state is a file of its own in the checkpoint's folder
    (``gradckpt.pt``, ``gradckpt_1.pt`` for a second engine): with ``register_for_checkpointing``, Accelerate would
    refuse to load a checkpoint of a run without this plugin, and the other way round.
    """
    names = itertools.chain(["gradckpt.pt"], (f"gradckpt_{number}.pt" for number in itertools.count(1)))
    taken = {file.name for file in _files(accelerator)}
    file = _CheckpointFile(accelerator, engine, next(name for name in names if name not in taken))
    handles = accelerator.register_save_state_pre_hook(file.save), accelerator.register_load_state_pre_hook(file.load)
    if (folder := _loaded_from.pop(accelerator, None)) is not None:
        file.load([], folder)

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def remember_loads() -> None:
    """Have engines take over what an Accelerator loaded before, if this process was started by Accelerate's launcher.

    For ``run``: a script resumes before the first forward, at which its model is found. Each Accelerator that is made
    from now on gets a hook.
    """
    if _LAUNCHED not in os.environ:
        return
    from accelerate import Accelerator  # noqa: PLC0415

    initialise = Accelerator.__init__

    @functools.wraps(initialise)
    def with_hook(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        self.register_load_state_pre_hook(functools.partial(_remember, weakref.ref(self)))

    Accelerator.__init__ = with_hook


class _CheckpointFile:
    """One engine's file in an Accelerator's checkpoints; every rank calls ``save`` and ``load``."""

    def __init__(self, accelerator: Accelerator, engine: Engine, name: str) -> None:
        self._accelerator = accelerator
        self._engine = engine
        self.name = name

    def save(self, _models: list[nn.Module], _weights: list[Any], folder: str) -> None:
        state = self._engine.state_dict()
        if self._accelerator.is_main_process:
            torch.save(state, Path(folder, self.name))

    def load(self, _models: list[nn.Module], folder: str) -> None:
        from accelerate.utils import broadcast_object_list  # noqa: PLC0415

        path = Path(folder, self.name)
        state: list[dict[str, Any] | None] = [None]
        if self._accelerator.is_main_process and path.is_file():
            state = [torch.load(path, weights_only=True)]
        broadcast_object_list(state)
        if state[0] is None:
            logger.info("gradckpt: %s was saved without the plugin, which starts anew", folder)
            return
        try:
            self._engine.load_state_dict(state[0])
        except MaskError as error:  # the same on all ranks
            logger.warning("gradckpt: the state in %s is not taken, and the plugin starts anew: %s", path, error)


def _remember(accelerator: weakref.ref[Accelerator], _models: list[nn.Module], folder: str) -> None:
    if (alive := accelerator()) is not None and not _files(alive):
        _loaded_from[alive] = folder


def _files(accelerator: Accelerator) -> list[_CheckpointFile]:
    owners = (getattr(hook, "__self__", None) for hook in accelerator._save_model_state_pre_hook.values())
    return [owner for owner in owners if isinstance(owner, _CheckpointFile)]
