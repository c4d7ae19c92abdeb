"""Accelerate: the plugin's state goes where ``Accelerator.save_state`` puts the model's."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradckpt_dist.adapters.base import Adapter
from gradckpt_dist.engine import Engine
from gradckpt_dist.errors import MaskError

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("gradckpt_dist")


class AccelerateAdapter(Adapter):
    """A model that ``Accelerator.prepare`` returned, whatever it was wrapped in."""

    framework = "accelerate"

    def recognises(self, model: nn.Module) -> bool:
        return getattr(model, "_is_accelerate_prepared", False) is True

    def attach(self, engine: Engine, model: nn.Module) -> Callable[[], None]:
        undo = [save_with(accelerator, engine) for accelerator in _accelerators_of(model)]

        def detach() -> None:
            for remove in undo:
                remove()

        return detach


def save_with(accelerator: Accelerator, engine: Engine) -> Callable[[], None]:
    """Let ``accelerator.save_state`` and ``load_state`` take the engine's state along; the call undoes it.

    ``enable`` does this for a model that was prepared before. The state is a file of its own in the checkpoint's folder
    (``gradckpt.pt``, ``gradckpt_1.pt`` for a second engine): with ``register_for_checkpointing``, Accelerate would
    refuse to load a checkpoint of a run without this plugin, and the other way round.
    """
    hooks = accelerator._save_model_state_pre_hook.values()
    number = sum(isinstance(getattr(hook, "__self__", None), _CheckpointFile) for hook in hooks)
    file = _CheckpointFile(accelerator, engine, f"gradckpt_{number}.pt" if number else "gradckpt.pt")
    handles = accelerator.register_save_state_pre_hook(file.save), accelerator.register_load_state_pre_hook(file.load)

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


class _CheckpointFile:
    """One engine's file in an Accelerator's checkpoints; every rank calls ``save`` and ``load``."""

    def __init__(self, accelerator: Accelerator, engine: Engine, name: str) -> None:
        self._accelerator = accelerator
        self._engine = engine
        self._name = name

    def save(self, _models: list[nn.Module], _weights: list[Any], folder: str) -> None:
        if self._accelerator.is_main_process:
            torch.save(self._engine.state_dict(), Path(folder, self._name))

    def load(self, _models: list[nn.Module], folder: str) -> None:
        from accelerate.utils import broadcast_object_list  # noqa: PLC0415

        path = Path(folder, self._name)
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


def _accelerators_of(model: nn.Module) -> list[Accelerator]:
    """Those that prepared this model, which neither knows them nor is, as DDP, what they know: that is inside it.

    Accelerate itself keeps no list of them.
    """
    from accelerate import Accelerator  # noqa: PLC0415

    parts = set(model.modules())
    found = (thing for thing in gc.get_objects() if issubclass(type(thing), Accelerator))
    return [accelerator for accelerator in found if not parts.isdisjoint(accelerator._models)]
